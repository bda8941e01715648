"""A command that is cancelled: wherever it is, its finish answers, and nothing runs afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from federation.v1 import session_service_pb2 as pb
from neuron_sdk import CommandContext, CommandFailed
from neuron_sdk.testing import FinalState
from tests.support.sdk_neuron import Bench, N, be_quick, code
from tests.support.waiting import eventually_sync
from tests.unit import sdk_isolated_handlers as isolated

_quick = pytest.fixture(autouse=True)(be_quick)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


# ---- before it runs


def test_a_cancelled_command_that_never_came_is_not_run_when_it_comes(bench: Bench) -> None:
    ran: list[int] = []
    neuron = bench.neuron()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        ran.append(ctx.attempt)

    bench.start(neuron)
    given_up = pb.CancelCommand(command_id="c-1", attempt=1, reason="not needed")
    bench.federation.send(pb.FederationMessage(cancel_command=given_up))
    bench.wait_kinds("c-1", "finished")
    neuron.stop()
    bench.start(neuron)  # the journal remembers it
    bench.federation.issue(N, "task", command_id="c-1")
    assert bench.federation.outcome("c-1").state is FinalState.CANCELLED
    second = bench.federation.issue(N, "task", command_id="c-1", attempt=2)
    assert bench.federation.outcome(second).state is FinalState.SUCCEEDED
    assert ran == [2]


@pytest.mark.parametrize("paused", [False, True])
def test_a_command_that_waits_for_its_place_is_cancelled_at_once(
    bench: Bench, paused: bool
) -> None:
    ran: list[str] = []
    release = threading.Event()
    neuron = bench.neuron(max_concurrent_commands=1)

    @neuron.command()
    def task(name: str) -> None:
        ran.append(name)
        release.wait(10)

    bench.start(neuron)
    federation = bench.federation
    if paused:
        federation.outcome(federation.issue(N, "pause"))
    else:
        federation.issue(N, "task", {"name": "first"})
        eventually_sync(lambda: ran)
    waiting = federation.issue(N, "task", {"name": "second"}, expire_after=3600)
    bench.wait_kinds(waiting, "accepted")
    federation.cancel(waiting, "not needed")
    outcome = federation.outcome(waiting)
    assert outcome.state is FinalState.CANCELLED
    assert outcome.run_duration is None
    release.set()
    if paused:
        federation.outcome(federation.issue(N, "resume"))
    federation.outcome(federation.issue(N, "task", {"name": "third"}))
    assert "second" not in ran


def test_a_cancel_that_follows_its_command_at_once_is_never_lost(bench: Bench) -> None:
    neuron = bench.neuron(max_concurrent_commands=100)

    @neuron.command()
    async def endless() -> None:
        await asyncio.Event().wait()

    bench.start(neuron)
    issued = [bench.federation.issue(N, "endless") for _ in range(3)]
    for _ in range(20):
        issued.append(bench.federation.issue(N, "endless"))
        bench.federation.cancel(issued[-1])
    for command_id in issued[:3]:
        bench.federation.cancel(command_id)
    for command_id in issued:
        assert bench.federation.outcome(command_id).state is FinalState.CANCELLED


# ---- while it runs


def test_a_coroutine_sees_why_and_may_clean_up(bench: Bench) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await ctx.progress(0.5, checkpoint={"row": 7})
            ctx.log.info("cleaned up", reason=ctx.cancel_reason)

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id, "wrong source")
    outcome = bench.federation.outcome(command_id)
    assert outcome.state is FinalState.CANCELLED
    assert outcome.error is None
    assert outcome.run_duration is not None
    assert "cleaned up reason='wrong source'" in outcome.log_tail
    (_, *middle, _) = bench.federation.updates_of(command_id)
    assert middle[-1].progressed.checkpoint["row"] == 7


def test_a_function_that_looks_and_returns_nothing_is_cancelled(bench: Bench) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    def task(ctx: CommandContext) -> None:
        started.set()
        while not ctx.cancelled:
            time.sleep(0.005)

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id)
    assert bench.federation.outcome(command_id).state is FinalState.CANCELLED


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_an_answer_in_spite_of_a_cancel_counts(bench: Bench, kind: str) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    def in_thread(ctx: CommandContext) -> str:
        started.set()
        while not ctx.cancelled:
            time.sleep(0.005)
        return "done all the same"

    async def in_loop() -> str:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "done all the same"

    if kind == "thread":
        neuron.command("task")(in_thread)
    else:
        neuron.command("task")(in_loop)
    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id)
    outcome = bench.federation.outcome(command_id)
    assert outcome.state is FinalState.SUCCEEDED
    assert outcome.response == {"result": "done all the same"}


def test_a_function_that_had_done_its_work_unaware_of_the_cancel_has_succeeded(
    bench: Bench,
) -> None:
    started, release = threading.Event(), threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    def task() -> None:
        started.set()
        release.wait(0.2)

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id)
    assert bench.federation.outcome(command_id).state is FinalState.SUCCEEDED


def test_what_a_cancelled_handler_raises_is_told(bench: Bench) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    async def task() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise CommandFailed("HALF_DONE", "rows 1 to 7 are written") from None

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id)
    outcome = bench.federation.outcome(command_id)
    assert outcome.state is FinalState.FAILED
    assert code(outcome) == "HALF_DONE"


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_a_handler_that_does_not_listen_is_interrupted(bench: Bench, kind: str) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    def in_thread() -> None:
        started.set()
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.005)

    async def in_loop() -> None:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    if kind == "thread":
        neuron.command("task")(in_thread)
    else:
        neuron.command("task")(in_loop)
    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    assert started.wait(5)
    bench.federation.cancel(command_id)
    assert bench.federation.outcome(command_id).state is FinalState.CANCELLED


def test_a_handler_that_ignores_everything_is_told_as_such_and_delays_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.ending.KILLED_S", 0.3)
    started, release = threading.Event(), threading.Event()
    neuron = bench.neuron(max_concurrent_commands=1)
    order: list[str] = []

    @neuron.command()
    def deaf() -> None:
        started.set()
        try:
            release.wait(30)  # a call that nobody can end
        finally:
            order.append("deaf ended")

    neuron.command("next")(lambda: order.append("next began"))
    bench.start(neuron)
    federation = bench.federation
    command_id = federation.issue(N, "deaf")
    assert started.wait(5)
    beats = len(federation.neurons[N].heartbeats)
    federation.cancel(command_id, "stop it")
    assert federation.outcome(federation.issue(N, "health_check")).state is FinalState.SUCCEEDED
    outcome = federation.outcome(command_id)
    assert outcome.state is FinalState.FAILED
    assert code(outcome) == "CANCEL_IGNORED"
    assert "stop it" in str(outcome.error)
    federation.wait_for(lambda: len(federation.neurons[N].heartbeats) > beats + 3)
    following = federation.issue(N, "next")
    bench.wait_kinds(following, "accepted")
    release.set()
    federation.outcome(following)
    assert order == ["deaf ended", "next began"], "its place stayed taken until it had ended"
    assert bench.finishes(command_id) == 1


@pytest.mark.parametrize("name", ["sleep_and_clean_up", "wait_for_cancel", "deaf"])
def test_a_process_is_asked_then_interrupted_then_killed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name != "deaf":  # what cleans up has all the time that it needs
        monkeypatch.setattr("neuron_sdk.ending.INTERRUPTED_S", 20.0)
    if name == "wait_for_cancel":
        monkeypatch.setattr("neuron_sdk.ending.ASKED_S", 20.0)
    neuron = bench.neuron()
    neuron.command("task", isolation="process")(getattr(isolated, name))
    bench.start(neuron)
    marker = tmp_path / "marker"
    command_id = bench.federation.issue(N, "task", {"marker": str(marker)})
    pid = eventually_sync(lambda: marker.exists() and int(marker.read_text() or 0), within=20)
    bench.federation.cancel(command_id, "enough")
    outcome = bench.federation.outcome(command_id)
    assert outcome.state is FinalState.CANCELLED
    assert "running" in outcome.log_tail
    said = marker.read_text()
    assert said == {
        "sleep_and_clean_up": "interrupted: enough",
        "wait_for_cancel": "cleaned up: enough",
        "deaf": str(pid),
    }.get(name)
    assert not psutil.pid_exists(pid)


# ---- again and again


def test_a_cancel_comes_again_in_each_session_and_is_answered_once(bench: Bench) -> None:
    started, release = threading.Event(), threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    def task(ctx: CommandContext) -> str:
        started.set()
        release.wait(10)
        return ctx.cancel_reason

    bench.start(neuron)
    federation = bench.federation
    command_id = federation.issue(N, "task")
    assert started.wait(5)
    federation.cancel(command_id, "first")
    federation.cancel(command_id, "second")
    federation.drop_streams()
    federation.wait_connected(N, sessions=2)
    release.set()
    outcome = federation.outcome(command_id)
    assert outcome.response == {"result": "first"}
    assert bench.finishes(command_id) == 1


def test_a_command_that_had_ended_repeats_its_end(bench: Bench) -> None:
    neuron = bench.neuron()
    neuron.command("task")(lambda: 5)
    bench.start(neuron)
    federation = bench.federation
    command_id = federation.issue(N, "task")
    federation.outcome(command_id)
    federation.cancel(command_id)
    federation.wait_for(lambda: bench.finishes(command_id) == 2, describe="the end once more")
    first, second = [u for u in federation.updates_of(command_id) if u.HasField("finished")]
    assert first == second


def test_a_cancel_reaches_a_command_whose_neuron_was_away(bench: Bench) -> None:
    started = threading.Event()
    neuron = bench.neuron()

    @neuron.command()
    async def task() -> None:
        started.set()
        await asyncio.Event().wait()

    bench.start(neuron)
    federation = bench.federation
    command_id = federation.issue(N, "task")
    assert started.wait(5)
    federation.stop()
    federation.start()
    federation.cancel(command_id)
    assert federation.outcome(command_id).state is FinalState.CANCELLED


@pytest.mark.parametrize("again", ["while it waits", "while it runs"])
def test_a_later_attempt_begins_when_the_earlier_one_has_given_up(bench: Bench, again: str) -> None:
    order: list[str] = []
    neuron = bench.neuron(max_concurrent_commands=4)

    @neuron.command()
    async def task(ctx: CommandContext) -> str:
        order.append(f"{ctx.attempt} began")
        try:
            if ctx.attempt < 3:
                await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            order.append(f"{ctx.attempt} ended: {ctx.cancel_reason}")
        return "done"

    bench.start(neuron)
    federation = bench.federation
    if again == "while it waits":
        federation.outcome(federation.issue(N, "pause"))
    command_id = federation.issue(N, "task", command_id="c")
    federation.wait_for(lambda: order or (again == "while it waits" and bench.kinds("c")))
    federation.issue(N, "task", command_id="c", attempt=2)
    federation.issue(N, "task", command_id="c", attempt=3)
    if again == "while it waits":
        federation.wait_for(lambda: bench.finishes("c") == 2, describe="1 and 2 given up")
        federation.outcome(federation.issue(N, "resume"))
    assert federation.outcome(command_id).response == {"result": "done"}
    finished = [u for u in federation.updates_of("c") if u.HasField("finished")]
    assert [u.attempt for u in finished] == [1, 2, 3]
    if again == "while it waits":
        assert order == ["3 began", "3 ended: "]
    else:
        assert order[:2] == ["1 began", "1 ended: attempt 2 of it has come"]
        assert order[-2:] == ["3 began", "3 ended: "]
