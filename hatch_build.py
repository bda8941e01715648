"""Generates the package `federation` (Python stubs and their types) from proto/.

It is hatchling's build hook, so that every kind of install has stubs: `pip install .`, `-e .`,
a wheel, an sdist. `python hatch_build.py` does the same to a checkout (`make proto`).
Needs grpcio-tools, and mypy-protobuf's two plugins on PATH.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("federation/v1")
# Two empty-bodied packages and PEP 561's mark; protoc writes everything else.
OWN_FILES = {
    "federation/__init__.py": '"""Stubs generated from proto/; never edited."""\n',
    "federation/py.typed": "",
    "federation/v1/__init__.py": '"""Stubs of federation.v1; never edited."""\n',
}


class StubsHook(BuildHookInterface[Any]):
    """Runs before a wheel, editable or not, is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        del version, build_data
        generate(Path(self.root))


def generate(root: Path) -> None:
    """Make `root/federation` say what `root/proto` says.

    Files that stay the same keep their time, and each other one is replaced in one step, so that
    a program that runs from this checkout never reads half a module.

    Raises:
        SystemExit: there is no proto, or protoc refused one (it has printed why).
    """
    with tempfile.TemporaryDirectory(prefix=".stubs-", dir=root) as scratch:
        fresh = Path(scratch)
        _run_protoc(root / "proto", fresh)
        for name, text in OWN_FILES.items():
            (fresh / name).write_text(text)
        _replace(fresh / PACKAGE.parent, root / PACKAGE.parent)


def _run_protoc(proto: Path, out: Path) -> None:
    sources = sorted(str(path) for path in (proto / PACKAGE).glob("*.proto"))
    if not sources:
        raise SystemExit(f"hatch_build.py: no .proto file in {proto / PACKAGE}")
    well_known_types = files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{proto}",
            f"-I{well_known_types}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources,
        ]
    )
    if status:
        raise SystemExit(f"hatch_build.py: protoc failed with status {status}")


def _replace(fresh: Path, target: Path) -> None:
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for name in wanted:
        old, new = target / name, fresh / name
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            new.replace(old)
    for path in target.rglob("*.py*"):
        if path.suffix in {".py", ".pyi"} and path.relative_to(target) not in wanted:
            path.unlink()


if __name__ == "__main__":
    generate(Path(__file__).resolve().parent)
