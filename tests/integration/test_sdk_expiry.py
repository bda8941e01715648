"""A command's time: what comes, or waits, too late is not started, and the journal knows better."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from neuron_sdk import CommandContext, Neuron
from neuron_sdk.context import Progress
from neuron_sdk.delivery import Delivery
from neuron_sdk.executor import Executor
from neuron_sdk.spool import Attempt, Execution, Verdict
from neuron_sdk.testing import CommandOutcome, FinalState
from tests.support.sdk_neuron import Bench, N, be_quick, code
from tests.support.waiting import eventually, eventually_sync

_quick = pytest.fixture(autouse=True)(be_quick)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


class Work:
    """A neuron with one place and a command that runs until it is released."""

    def __init__(self, bench: Bench) -> None:
        self.ran: list[str] = []
        self.release = threading.Event()
        self.neuron = bench.neuron(max_concurrent_commands=1, stop_grace=0.2)
        self.neuron.command("task")(self.task)

    def task(self, ctx: CommandContext) -> str:
        self.ran.append(ctx.command_id)
        while not (self.release.wait(0.01) or ctx.cancelled):
            pass
        return "done"


def test_a_command_that_comes_when_its_time_is_over_is_not_run(bench: Bench) -> None:
    work = Work(bench)
    bench.start(work.neuron)
    command_id = bench.federation.issue(N, "task", expire_after=0.0)
    outcome = bench.federation.outcome(command_id)
    assert outcome.state is FinalState.REJECTED
    assert code(outcome) == "EXPIRED"
    bench.federation.deliver_again(command_id, expire_after=60)
    bench.federation.wait_for(lambda: bench.finishes(command_id) == 2)
    assert work.ran == []


def test_what_runs_goes_on_when_it_is_sent_again_after_its_time(bench: Bench) -> None:
    work = Work(bench)
    bench.start(work.neuron)
    command_id = bench.federation.issue(N, "task", expire_after=60)
    eventually_sync(lambda: work.ran)
    bench.federation.deliver_again(command_id, expire_after=0.0)
    work.release.set()
    assert bench.federation.outcome(command_id).response == {"result": "done"}
    bench.federation.deliver_again(command_id, expire_after=0.0)
    bench.federation.wait_for(lambda: bench.finishes(command_id) == 2, describe="its end again")
    assert work.ran == [command_id]


@pytest.mark.parametrize("left", [0.0, 0.1])
def test_what_waited_when_the_neuron_ended_keeps_its_time(bench: Bench, left: float) -> None:
    work = Work(bench)
    bench.start(work.neuron)
    federation = bench.federation
    federation.issue(N, "task", run_timeout=60)
    eventually_sync(lambda: work.ran)
    waiting = federation.issue(N, "task", expire_after=60)
    bench.wait_kinds(waiting, "accepted")
    work.neuron.stop()
    federation.deliver_again(waiting, expire_after=left)  # the federation's clock went on

    @work.neuron.on_start
    async def takes_its_time() -> None:
        await asyncio.to_thread(federation.outcome, waiting)

    bench.start(work.neuron)
    outcome = federation.outcome(waiting)
    assert outcome.state is FinalState.REJECTED
    assert code(outcome) == "EXPIRED"
    assert waiting not in work.ran


class Noted:
    """The executor's notes, kept."""

    def __init__(self) -> None:
        self.outcomes: list[CommandOutcome] = []
        self.accepted = 0

    async def accept(self, of: Attempt, execution: Execution) -> Verdict:
        self.accepted += 1
        return Verdict.NEW

    async def accept_and_start(self, of: Attempt) -> Verdict:
        raise AssertionError(of)

    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict:
        raise AssertionError(outcome)

    async def start(self, of: Attempt) -> None:
        raise AssertionError(of)

    def progress(self, of: Attempt, progress: Progress) -> Future[None]:
        raise AssertionError(progress)

    async def carry_over(self, of: Attempt) -> None:
        raise AssertionError(of)

    async def finish(self, of: Attempt, outcome: CommandOutcome) -> None:
        self.outcomes.append(outcome)


async def test_a_place_that_comes_free_after_a_command_s_time_does_not_start_it() -> None:
    neuron = Neuron(N, type="worker")
    neuron.command("task")(lambda: None)
    noted = Noted()
    executor = Executor(neuron.commands, noted, max_concurrent=1)
    executor.open(asyncio.get_running_loop())
    executor.pause()
    executor.deliver(Delivery(Attempt("c", 1), "task", expire_after=0.05))
    await eventually(lambda: noted.accepted)
    time.sleep(0.06)  # noqa: ASYNC251 - the timer is late, as on a busy host
    executor.resume()
    await eventually(lambda: noted.outcomes)
    assert code(noted.outcomes[0]) == "EXPIRED"
    assert executor.unfinished() == []
