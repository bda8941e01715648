"""Handlers that do what no handler should, in real processes: each command ends, and says how."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from neuron_sdk.testing import FakeFederation, FinalState
from tests.support.sdk_neuron import Bench, N, Processes, code
from tests.support.waiting import eventually_sync

SERVICE = """
    import asyncio, contextlib, os, pathlib, signal, sys, time
    from typing import Any
    from neuron_sdk import Neuron, CommandContext
    import neuron_sdk.ending as e

    e.ASKED_S = e.INTERRUPTED_S = 0.3
    e.KILLED_S = 3.0  # a busy host buries slowly
    neuron = Neuron("n-1", type="worker", max_concurrent_commands=8)

    class Rude:
        def model_dump(self, mode):
            raise SystemExit("from inside")

    def itself():
        whole = {}
        whole["whole"] = whole
        return whole

    ANSWERS = {
        "object": lambda: object(),
        "nan": lambda: {"x": float("nan")},
        "itself": itself,
        "generator": lambda: (x for x in "abc"),
        "surrogate": lambda: {"x": chr(0xD800)},
        "rude": Rude,
        "large": lambda: "x" * (2**20 + 1),
        "huge": lambda: ["x" * 1000] * 100_000,
    }

    def misbehave(how: str) -> Any:
        match how:
            case "raise":
                raise ValueError("no such row")
            case "recurse":
                return misbehave(how)
            case "exit":
                sys.exit(3)
            case _:
                return ANSWERS[how]()

    @neuron.command()
    def in_thread(how: str) -> Any:
        return misbehave(how)

    @neuron.command()
    async def in_loop(how: str) -> Any:
        return misbehave(how)

    @neuron.command(isolation="process")
    def in_process(how: str) -> Any:
        return misbehave(how)

    @neuron.command(isolation="process")
    async def in_process_loop(how: str) -> Any:
        return misbehave(how)

    @neuron.command(isolation="process")
    def end_process(how: str) -> None:
        if how == "os._exit":
            os._exit(7)
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(60)

    @neuron.command(isolation="process")
    def leave_a_child(how: str) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(3600)
        pathlib.Path("child").write_text(str(child))
        if how == "die":
            os._exit(7)

    @neuron.command()
    async def end_neuron(ctx: CommandContext) -> None:
        pathlib.Path("attempts").open("a").write(f"{ctx.attempt} {ctx.checkpoint}\\n")
        await ctx.progress(0.5, "half", checkpoint={"rows": 10 * ctx.attempt})
        if ctx.attempt < 3:
            os._exit(9)

    @neuron.command()
    def hang_in_thread() -> None:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(0.01)

    @neuron.command()
    async def hang_in_loop() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    @neuron.command(isolation="process")
    def hang_in_process() -> None:
        pathlib.Path("pid").write_text(str(os.getpid()))
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    @neuron.command()
    def well() -> str:
        return "well"

    if __name__ == "__main__":
        neuron.run()
"""


@pytest.fixture(scope="module")
def federation() -> Iterator[FakeFederation]:
    with FakeFederation(heartbeat_interval=0.2) as fake:
        yield fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    (folder / "service.py").write_text(textwrap.dedent(SERVICE))
    return folder


@pytest.fixture(scope="module")
def processes(federation: FakeFederation, folder: Path) -> Iterator[Processes]:
    with Processes(federation.url, folder) as processes:
        yield processes


@pytest.fixture(scope="module")
def neuron(federation: FakeFederation, processes: Processes) -> Iterator[psutil.Process]:
    """One process for all that it survives."""
    process = processes.spawn("service.py")
    federation.wait_connected(N, within=20)
    yield psutil.Process(process.pid)
    assert process.poll() is None, "it has survived all of it"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, 70), "70: a handler that hangs in its loop was cut off"


def ask(federation: FakeFederation, name: str, **data: Any) -> str:
    return federation.issue(N, name, data)


@pytest.mark.parametrize(
    ("how", "expected", "says"),
    [
        ("raise", "HANDLER_RAISED", "ValueError: no such row"),
        ("recurse", "HANDLER_RAISED", "RecursionError"),
        ("exit", "HANDLER_RAISED", "SystemExit: 3"),
        ("object", "INVALID_RESPONSE", "builtins.object has no JSON form"),
        ("nan", "INVALID_RESPONSE", "x is nan"),
        ("itself", "INVALID_RESPONSE", "contains itself"),
        ("generator", "INVALID_RESPONSE", "generator has no JSON form"),
        ("surrogate", "INVALID_RESPONSE", "lone surrogate"),
        ("rude", "HANDLER_RAISED", "SystemExit: from inside"),
        ("large", "RESPONSE_TOO_LARGE", "at most 1048576"),
        ("huge", "RESPONSE_TOO_LARGE", "at most 1048576"),
    ],
)
def test_what_a_handler_cannot_answer_fails_its_command_alone(
    federation: FakeFederation, neuron: psutil.Process, how: str, expected: str, says: str
) -> None:
    kinds = ("in_thread", "in_loop", "in_process", "in_process_loop")
    issued = [ask(federation, kind, how=how) for kind in kinds]
    for command_id in issued:
        outcome = federation.outcome(command_id, within=30)
        assert outcome.state is FinalState.FAILED
        assert code(outcome) == expected
        assert says in str(outcome.error)
        assert outcome.response is None
    well = federation.outcome(ask(federation, "well"))
    assert well.response == {"result": "well"}


@pytest.mark.parametrize(
    ("how", "says"),
    [("os._exit", "exit code 7"), ("SIGKILL", "SIGKILL"), ("SIGTERM", "SIGTERM")],
)
def test_a_handler_that_ends_its_own_process_ends_its_command(
    federation: FakeFederation, neuron: psutil.Process, how: str, says: str
) -> None:
    outcome = federation.outcome(ask(federation, "end_process", how=how), within=20)
    assert code(outcome) == "PROCESS_ENDED"
    assert says in str(outcome.error)


@pytest.mark.parametrize(("how", "state"), [("die", FinalState.FAILED), ("", FinalState.SUCCEEDED)])
def test_a_process_s_own_child_cannot_keep_its_command_from_ending(
    federation: FakeFederation, neuron: psutil.Process, folder: Path, how: str, state: FinalState
) -> None:
    outcome = federation.outcome(ask(federation, "leave_a_child", how=how), within=20)
    assert outcome.state is state
    child = int((folder / "child").read_text())
    assert psutil.pid_exists(child)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["hang_in_thread", "hang_in_loop"])
def test_a_handler_that_hangs_and_ignores_everything_is_timed_out_and_says_so(
    federation: FakeFederation, neuron: psutil.Process, kind: str
) -> None:
    outcome = federation.outcome(federation.issue(N, kind, run_timeout=0.2), within=20)
    assert outcome.state is FinalState.TIMED_OUT
    assert "still runs" in str(outcome.error)


def test_a_process_that_hangs_and_ignores_everything_is_killed(
    federation: FakeFederation, neuron: psutil.Process, folder: Path
) -> None:
    command_id = federation.issue(N, "hang_in_process", run_timeout=8)
    marker = folder / "pid"
    pid = eventually_sync(lambda: marker.exists() and int(marker.read_text() or 0), within=20)
    outcome = federation.outcome(command_id, within=20)
    assert outcome.state is FinalState.TIMED_OUT
    assert "still runs" not in str(outcome.error)
    assert not psutil.pid_exists(pid)


def test_a_handler_that_ends_the_neuron_s_process_is_interrupted_and_its_checkpoint_survives(
    tmp_path: Path,
) -> None:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    with (
        FakeFederation(heartbeat_interval=0.2) as federation,
        Processes(federation.url, tmp_path) as processes,
    ):
        command_id = federation.issue(N, "end_neuron", max_attempts=3)
        for _ in range(2):
            assert processes.spawn("service.py").wait(20) == 9
        processes.spawn("service.py")
        assert federation.outcome(command_id, within=20).state is FinalState.SUCCEEDED
        attempts = (tmp_path / "attempts").read_text().splitlines()
        assert attempts == ["1 None", "2 {'rows': 10}", "3 {'rows': 20}"]
        interrupted = [
            update.finished.error
            for update in federation.updates_of(command_id)
            if update.finished.HasField("error")
        ]
        assert {error.code for error in interrupted} == {"INTERRUPTED"}
        assert "process ended while the command was running" in interrupted[0].message


def test_a_command_ends_when_no_thread_is_left_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("command:"):
            raise RuntimeError("can't start new thread")
        begin(thread)

    with Bench(tmp_path) as bench:
        neuron = bench.neuron(max_concurrent_commands=1)
        neuron.command("task")(lambda: "ran")
        bench.start(neuron)
        monkeypatch.setattr(threading.Thread, "start", start)
        outcome = bench.federation.outcome(bench.federation.issue(N, "task"))
        assert code(outcome) == "NOT_STARTED"
        monkeypatch.undo()
        outcome = bench.federation.outcome(bench.federation.issue(N, "task"))
        assert outcome.response == {"result": "ran"}, "its place is free again"
