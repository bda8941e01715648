"""The console as a process: on a terminal, in a pipe, with Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from federation.v1 import command_service_pb2 as commands
from federation.v1 import fleet_service_pb2 as fleet
from tests.support.console import batch, executed, federation, neuron, watched_batch
from tests.support.scripted_federation import ScriptedFederation, scripted_federation
from tests.support.waiting import eventually_sync

__all__ = ["federation"]  # a fixture

PROGRAM = [sys.executable, "-m", "federation_server.cli"]


def on_terminal(*arguments: str, typed: str = "", **environment: str) -> str:
    """What a command shows on a terminal of 80 columns where somebody has typed something."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm", **environment},
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # Linux's way to say that nobody has the other end open
        pass
    finally:
        os.close(ours)
        child.wait(20)
    return seen.decode()


def test_a_terminal_gets_colours_and_a_table_that_fits(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(
        neurons=[neuron("a-rather-long-name-of-a-neuron-that-folds")]
    )
    seen = on_terminal("neurons", "list")
    assert "\x1b[32mONLINE" in seen
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in seen.splitlines()]
    assert max(len(line) for line in lines) <= 80
    letters = "".join(line.split()[0] for line in lines if line.strip() and "─" not in line)
    assert "a-rather-long-name-of-a-neuron-that-folds" in letters


def test_no_color_is_honoured(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("a")])
    seen = on_terminal("neurons", "list", NO_COLOR="1")
    assert "ONLINE" in seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen)


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running command; killed at the block's end if it still runs."""
    with subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


@pytest.fixture
def held() -> Iterator[Callable[[], None]]:
    """Something that a stream can wait for, released at the test's end."""
    over = threading.Event()

    def wait() -> None:
        over.wait(30)

    yield wait
    over.set()


def test_ctrl_c_leaves_the_command_running_and_says_so(
    federation: ScriptedFederation, held: Callable[[], None]
) -> None:
    federation.answers["ExecuteCommand"] = [executed("RUNNING", "RUNNING"), held]
    with started("command", "exec", "scraper-1", "run_task") as child:
        assert "RUNNING" in line_of(child)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert errors.splitlines() == [
        "the command goes on",
        "  follow it:  federation command follow c-1",
        "  cancel it:  federation command cancel c-1",
    ]


def test_ctrl_c_before_the_answer_says_how_to_find_out_what_became_of_the_order(
    federation: ScriptedFederation, held: Callable[[], None]
) -> None:
    federation.answers["ExecuteCommand"] = [held]
    with started("command", "exec", "a", "b", "--request-id", "r-1") as child:
        eventually_sync(lambda: federation.requests["ExecuteCommand"], describe="it was asked")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "--request-id r-1" in errors


def test_a_command_that_is_followed_on_a_terminal_has_a_bar_that_fits_and_goes_away(
    federation: ScriptedFederation,
) -> None:
    far = {"fraction": 0.5, "message": "a message that is far too long for " + "a line " * 20}
    federation.answers["ExecuteCommand"] = [
        executed("RUNNING", "QUEUED", "RUNNING", progress=far, attempt=2, max_attempts=3),
        executed("FAILED", "FAILED", error={"code": "OOPS", "message": "word " * 40}),
    ]
    seen = on_terminal("command", "exec", "scraper-1", "run_task")
    assert "\x1b[31mFAILED" in seen
    parts = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"\r|\n|\x1b\[2K", seen)
    ]
    bars = [part for part in parts if "━" in part]
    assert any("50%" in bar and "attempt 2 of 3 · a message" in bar for bar in bars)
    assert max(len(bar) for bar in bars) <= 80
    assert "━" not in parts[-1]


@pytest.mark.parametrize("agreed", ["y", "n"])
def test_a_batch_is_ordered_on_a_terminal_if_whoever_sits_there_agrees(
    federation: ScriptedFederation, agreed: str
) -> None:
    found = commands.IssueCommandBatchResponse(batch=batch(3), neuron_ids=["n-1", "n-2", "n-3"])
    found.batch.batch_id = ""
    ordered = commands.IssueCommandBatchResponse(batch=batch(3, QUEUED=3))
    federation.answers["IssueCommandBatch"] = lambda request, context: (
        found if request.dry_run else ordered
    )
    federation.answers["WatchCommandBatch"] = watched_batch(
        batch(3, RUNNING=2, SUCCEEDED=1), batch(3, SUCCEEDED=3, end_time="2026-11-21T12:00:00Z")
    )
    order = ["command", "batch", "run_task", "--filter", "type = x"]
    seen = on_terminal(*order, typed=f"{agreed}\n")
    assert "n-1, n-2, n-3" in seen
    assert "Order it for 3 neurons? [y/N]" in seen
    if agreed == "n":
        assert "nothing is ordered" in seen
        assert len(federation.requests["IssueCommandBatch"]) == 1
        return
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert "1/3" in text
    assert "2 RUNNING, 1 SUCCEEDED" in text
    assert text.rstrip().endswith("b-1  3 commands: 3 SUCCEEDED")


def test_ctrl_c_leaves_the_batch_running_and_says_so(
    federation: ScriptedFederation, held: Callable[[], None]
) -> None:
    federation.answers["WatchCommandBatch"] = [*watched_batch(batch(3, RUNNING=3)), held]
    with started("batches", "follow", "b-1") as child:
        assert "3 RUNNING" in line_of(child)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 130
    assert errors.splitlines() == [
        "the batch goes on",
        "  follow it:  federation batches follow b-1",
        "  cancel it:  federation batches cancel b-1",
    ]


def test_ctrl_c_ends_a_watch_quietly(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("a")])
    with started("neurons", "watch") as child:
        assert json.loads(line_of(child))["change"] == "added"
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=20)
    assert (child.returncode, rest, errors) == (130, "", "")


def test_a_reader_that_goes_away_ends_a_command_quietly(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(
        neurons=[neuron(f"n-{number}") for number in range(3000)]
    )
    with started("neurons", "list", "--json") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""
        assert child.wait(20) == 141


@pytest.mark.parametrize(
    "command", ["--help", "neurons --help", "neurons list", "neurons list --json", "config show"]
)
def test_output_that_cannot_be_written_is_said_in_words(
    federation: ScriptedFederation, tmp_path: Path, command: str
) -> None:
    """A limit of no bytes stands for the full disk."""
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("n-1")])
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *PROGRAM, *command.split()]
    with (tmp_path / "output").open("w") as file:
        ended = subprocess.run(
            limited, stdout=file, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "federation: the output cannot be written (File too large)\n"
        "  what was asked for may have been done all the same\n"
    )


def test_a_watch_prints_changes_and_survives_a_restart(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse()
    with scripted_federation() as first:
        first.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("a"), neuron("b")])
        port = first.port
        with started("neurons", "watch", "--interval", "50ms", "--server", first.address) as child:
            added = [json.loads(line_of(child)) for _ in range(2)]
            assert [each["change"] for each in added] == ["added", "added"]
            eventually_sync(lambda: len(first.requests["ListNeurons"]) > 3)
            first.stop()
            assert child.stderr is not None
            assert "asking again" in child.stderr.readline()
            with scripted_federation(port) as second:
                second.answers["ListNeurons"] = fleet.ListNeuronsResponse(
                    neurons=[neuron("a", presence="PRESENCE_SUSPECT")]
                )
                changes = [json.loads(line_of(child)) for _ in range(2)]
                child.send_signal(signal.SIGINT)
                _, errors = child.communicate(timeout=20)
    assert [(each["change"], each["neuron"]["neuron_id"]) for each in changes] == [
        ("changed", "a"),
        ("removed", "b"),
    ]
    assert child.returncode == 130
    assert errors == "the federation is back\n"
