"""Imports run one way: rpc → live → store → domain, and the wire stays at the edge.

`violations` reads one file's imports and says which of them break a rule. The first test holds the
project to the rules; the others plant a break of each rule and see it found.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each layer may import itself and those before it.
LAYERS = ["domain", "store", "live", "rpc"]
# Above the layers and imported by none of them: the composition root and the command line.
TOP = {"app", "banner", "cli", "console", "logs", "up", "__main__"}
# For all but domain: every setting, and the package's version.
SHARED = {"settings", "__init__"}
# The server's side of the wire is rpc and app; the command line is a client.
ON_THE_WIRE = {"rpc", "app", "cli", "console"}

WIRE = [
    "federation",
    "google",
    "grpc",
    "grpc_channelz",
    "grpc_health",
    "grpc_reflection",
    "grpc_status",
]
DATABASE = ["alembic", "psycopg", "psycopg_pool", "sqlalchemy"]

Rule = tuple[str, Callable[[str], bool]]


def violations(path: str, source: str) -> list[str]:
    """Say which imports of a file break a rule, one line each.

    Args:
        path: the file's path from the project's root, with slashes.
        source: its text.
    """
    package = PurePosixPath(path).parts[0]
    if package == "federation_server":
        place = PurePosixPath(path).with_suffix("").parts[1]
        if place not in {*LAYERS, *TOP, *SHARED}:
            return [f"{path}: belongs to no layer; move it, or name its place in this test"]
        rules = list(_server_rules(place))
    elif package == "neuron_sdk":
        rules = [("the SDK never imports the server", within("federation_server"))]
    elif package == "examples":
        rules = [("an example shows the public SDK and nothing else of ours", not_public)]
    else:
        raise ValueError(f"no rule for {path}")
    return [
        f"{path}:{line}: {name}: {meaning}"
        for line, name in imports(path, source)
        for meaning, breaks in rules
        if breaks(name)
    ]


def _server_rules(place: str) -> Iterator[Rule]:
    yield "the server never imports the SDK", within("neuron_sdk")
    if place not in ON_THE_WIRE:
        yield "gRPC and protobuf stay in rpc, app and the command line", within(*WIRE)
    if place not in TOP:
        yield "nothing imports what stands on top of it", within(*map(_of_server, TOP))
    if place in LAYERS:
        above = LAYERS[LAYERS.index(place) + 1 :]
        yield "imports run rpc → live → store → domain", within(*map(_of_server, above))
    if place == "domain":
        yield "domain knows no database", within(*DATABASE)
        yield "domain imports nothing of ours", outside_domain


def within(*packages: str) -> Callable[[str], bool]:
    """A predicate: is this name one of the packages, or in one?"""
    return lambda name: any(f"{name}.".startswith(f"{package}.") for package in packages)


def outside_domain(name: str) -> bool:
    return within("federation_server")(name) and not within("federation_server.domain")(name)


def not_public(name: str) -> bool:
    private = any(part.startswith("_") for part in name.split("."))
    return within("federation_server", "federation")(name) or (
        private and within("neuron_sdk")(name)
    )


def _of_server(place: str) -> str:
    return f"federation_server.{place}"


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Give line and full dotted name of each import, wherever in the file it stands.

    `from a import b` gives `a.b`, as b may be a module. `import_module("a.b")` counts as well.
    """
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = [*package[: len(package) - level + 1]] if level else []
                base += [module] if module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


@pytest.mark.parametrize("package", ["federation_server", "neuron_sdk", "examples"])
def test_the_project_keeps_to_its_layers(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no Python file to check"
    found = [
        line
        for file in files
        for line in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_exists(layer: str) -> None:
    assert list((ROOT / "federation_server" / layer).glob("*.py"))


SERVER_MODULE = "federation_server/{}/planted.py".format


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        # one way down
        (SERVER_MODULE("live"), "from federation_server.rpc.errors import refuse", "rpc → live"),
        (SERVER_MODULE("store"), "import federation_server.live.writer", "rpc → live"),
        (SERVER_MODULE("store"), "from federation_server import live", "rpc → live"),
        (SERVER_MODULE("store"), "from ..rpc import convert", "rpc → live"),
        (SERVER_MODULE("store/embedded"), "from ...live import writer", "rpc → live"),
        (SERVER_MODULE("rpc"), "from federation_server.app import build", "on top"),
        (SERVER_MODULE("live"), "from federation_server.console import table", "on top"),
        ("federation_server/settings.py", "from federation_server import cli", "on top"),
        # domain is pure
        (SERVER_MODULE("domain"), "from federation_server.settings import Settings", "of ours"),
        (SERVER_MODULE("domain"), "from federation_server.store import schema", "of ours"),
        (SERVER_MODULE("domain"), "import grpc", "gRPC"),
        (SERVER_MODULE("domain"), "import sqlalchemy as sa", "no database"),
        (SERVER_MODULE("domain"), "from psycopg.types.json import Jsonb", "no database"),
        # the wire stays at the edge
        (SERVER_MODULE("live"), "import grpc.aio", "gRPC"),
        (SERVER_MODULE("live"), "from federation.v1 import command_pb2", "gRPC"),
        (SERVER_MODULE("store"), "from google.protobuf.struct_pb2 import Struct", "gRPC"),
        ("federation_server/settings.py", "import grpc", "gRPC"),
        ("federation_server/banner.py", "import grpc", "gRPC"),
        # server and SDK are strangers
        ("federation_server/cli.py", "import neuron_sdk.cli", "never imports the SDK"),
        ("federation_server/app.py", "from neuron_sdk import Neuron", "never imports the SDK"),
        ("neuron_sdk/spool.py", "from federation_server.domain import retry", "the server"),
        # examples show what users may use
        ("examples/ten.py", "import federation_server", "public SDK"),
        ("examples/ten.py", "from federation.v1 import command_pb2", "public SDK"),
        ("examples/ten.py", "from neuron_sdk._session import Session", "public SDK"),
        ("examples/ten.py", "from neuron_sdk import _spool", "public SDK"),
        # wherever the import stands
        (SERVER_MODULE("domain"), "def f():\n    import grpc", "gRPC"),
        (SERVER_MODULE("domain"), "if TYPE_CHECKING:\n    import grpc", "gRPC"),
        (SERVER_MODULE("domain"), "importlib.import_module('grpc')", "gRPC"),
        # a new place needs a decision
        ("federation_server/helpers.py", "", "belongs to no layer"),
        ("federation_server/misc/planted.py", "", "belongs to no layer"),
    ],
)
def test_a_planted_violation_is_found(path: str, source: str, rule: str) -> None:
    found = violations(path, source)
    assert len(found) >= 1
    assert any(rule in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (SERVER_MODULE("rpc"), "import grpc\nfrom federation.v1 import command_pb2"),
        (SERVER_MODULE("rpc"), "from federation_server.live import writer\nfrom . import errors"),
        (SERVER_MODULE("live"), "from federation_server.settings import Settings"),
        (SERVER_MODULE("live"), "from federation_server import __version__"),
        (SERVER_MODULE("store"), "from ..domain.command import State\nimport psycopg"),
        (SERVER_MODULE("domain"), "from federation_server.domain import retry\nimport enum"),
        (SERVER_MODULE("store"), "import federation_server_of_another"),
        ("federation_server/app.py", "import grpc\nfrom federation_server import live, rpc, store"),
        ("federation_server/cli.py", "import grpc\nfrom federation_server.console import table"),
        (SERVER_MODULE("console"), "from federation.v1 import fleet_service_pb2"),
        ("neuron_sdk/session.py", "import grpc\nfrom federation.v1 import command_pb2"),
        ("neuron_sdk/cli.py", "from neuron_sdk._spool import Spool"),
        ("examples/ten.py", "from neuron_sdk import CommandContext, Neuron\nimport httpx"),
    ],
)
def test_an_import_that_is_allowed_is_let_through(path: str, source: str) -> None:
    assert violations(path, source) == []
