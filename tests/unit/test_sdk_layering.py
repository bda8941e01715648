"""gRPC and the contract's messages stay at the SDK's edge, and are loaded when they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import neuron_sdk

SDK = Path(neuron_sdk.__file__).parent
EDGE = {"channel", "convert", "inbox", "pull_session", "registration", "session"} | {
    "fake_federation",
    "fake_ledger",
    "fake_server",
}
WIRE = {"grpc", "google", "federation"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_only_the_session_and_its_neighbours_know_the_wire() -> None:
    assert {path.stem for path in SDK.glob("*.py") if _imports(path) & WIRE} == EDGE


def test_building_a_neuron_loads_no_grpc() -> None:
    program = (
        "import sys, neuron_sdk; neuron_sdk.Neuron('n-1', type='worker');"
        "print([m for m in ('grpc', 'google.protobuf', 'prometheus_client') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_sdk_and_the_server_have_one_version() -> None:
    import federation_server

    assert neuron_sdk.__version__ == federation_server.__version__


def test_no_module_is_longer_than_its_limit() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in SDK.glob("*.py")}
    assert {name: size for name, size in long.items() if size > 500} == {}
