"""What the console's tests share: a scripted federation and messages for it to answer, and the
console as a process against a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from typer.testing import CliRunner, Result

from federation.v1 import command_service_pb2 as commands
from federation.v1.command_pb2 import Command, CommandBatch
from federation.v1.neuron_pb2 import Neuron
from federation_server import cli
from tests.support.processes import FederationProcess, clean_environment
from tests.support.scripted_federation import ScriptedFederation, scripted_federation

_REVISIONS = count(1)

KEY = "fak_a-secret-that-nobody-may-see"


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ScriptedFederation]:
    """A scripted federation that the environment points to."""
    with scripted_federation() as scripted:
        monkeypatch.setenv("FEDERATION_SERVER", scripted.address)
        monkeypatch.setenv("FEDERATION_ADMIN_KEY", KEY)
        monkeypatch.setenv("FEDERATION_DATA_DIR", str(tmp_path))
        yield scripted


def run(*arguments: str, typed: str = "") -> Result:
    """Runs a command in this process; stdout is no terminal."""
    result = CliRunner().invoke(cli.app, arguments, input=typed)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert KEY not in result.output
    return result


def neuron(neuron_id: str, **fields: Any) -> Neuron:
    return ParseDict(
        {
            "neuron_id": neuron_id,
            "lifecycle": "LIFECYCLE_ACTIVE",
            "presence": "PRESENCE_ONLINE",
            "description": {"neuron_id": neuron_id, "type": "scraper"},
            **fields,
        },
        Neuron(),
    )


def command(state: str, *transitions: str, **fields: Any) -> Command:
    """A command in a state, with transitions to the states that are named; each that is made has
    a higher revision than those before.
    """
    return ParseDict(
        {
            "command_id": "c-1",
            "neuron_id": "scraper-1",
            "type": "run_task",
            "state": f"COMMAND_STATE_{state}",
            "revision": next(_REVISIONS),
            "max_attempts": 1,
            "transitions": [
                {"state": f"COMMAND_STATE_{each}", "transition_time": "2026-11-21T12:00:00Z"}
                for each in transitions
            ],
            **fields,
        },
        Command(),
    )


def executed(state: str, *transitions: str, **fields: Any) -> commands.ExecuteCommandResponse:
    return commands.ExecuteCommandResponse(command=command(state, *transitions, **fields))


def watched(state: str, *transitions: str, **fields: Any) -> commands.WatchCommandResponse:
    return commands.WatchCommandResponse(command=command(state, *transitions, **fields))


def batch(matched: int, *, skipped: int = 0, **fields: Any) -> CommandBatch:
    """A batch; upper-case fields are how many of its commands are in that state."""
    counts = [
        {"state": f"COMMAND_STATE_{name}", "count": count}
        for name, count in fields.items()
        if name.isupper()
    ]
    rest = {name: value for name, value in fields.items() if not name.isupper()}
    return ParseDict(
        {
            "batch_id": "b-1",
            "type": "run_task",
            "filter": "type = x",
            "matched_count": matched,
            "skipped_count": skipped,
            "counts": counts,
            **rest,
        },
        CommandBatch(),
    )


def watched_batch(*batches: CommandBatch) -> list[commands.WatchCommandBatchResponse]:
    return [commands.WatchCommandBatchResponse(batch=each) for each in batches]


class Console:
    """Runs commands of the console against one server."""

    def __init__(self, server: FederationProcess) -> None:
        self._environment = clean_environment(
            FEDERATION_SERVER=server.address, FEDERATION_DATA_DIR=str(server.data_dir)
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "federation_server.cli", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code, stdout and stderr of a command."""
        with self.start(*arguments) as child:
            output, errors = child.communicate(timeout=60)
            assert "Traceback" not in errors
            return child.returncode, output, errors

    def says(self, *arguments: str) -> str:
        """The output of a command that must succeed."""
        code, output, errors = self.run(*arguments)
        assert code == 0, errors
        return output

    def json(self, *arguments: str) -> Any:
        return json.loads(self.says(*arguments, "--json"))


def lines_until(child: subprocess.Popen[str], wanted: Callable[[str], bool]) -> list[str]:
    """What a command prints, up to the first line that is wanted."""
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if wanted(line):
            return seen
    raise AssertionError(f"it ended after {seen}")
