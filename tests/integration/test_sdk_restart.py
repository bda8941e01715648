"""Restart and stop by command, in processes: the command ends when it is done, and is answered."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuron_sdk.testing import FakeFederation, FinalState
from tests.support.sdk_neuron import N, Processes, code
from tests.support.waiting import eventually_sync

SERVICE = """
    import asyncio, os, pathlib, sys, time
    from neuron_sdk import Neuron, CommandContext

    neuron = Neuron("n-1", type="worker", max_concurrent_commands=1)

    @neuron.on_start
    def count_starts():
        with open("starts", "a") as file:
            file.write("s")
        if pathlib.Path("broken").exists():
            raise RuntimeError("no database")

    @neuron.command()
    async def hold(ctx: CommandContext) -> None:
        pathlib.Path("held").write_text("x")
        while True:
            await asyncio.sleep(1)

    @neuron.command()
    def hold_until_released() -> None:
        pathlib.Path("held").write_text("x")
        while not pathlib.Path("release").exists():
            time.sleep(0.02)

    @neuron.command()
    def block() -> None:
        pathlib.Path("held").write_text("x")
        try:
            time.sleep(1)
        finally:
            pathlib.Path("ended").write_text("x")

    @neuron.command()
    async def block_loop() -> None:
        pathlib.Path("held").write_text("x")
        time.sleep(3600)

    if pathlib.Path("no-exec").exists():
        sys.executable = "/nowhere/python"
    import neuron_sdk.runtime as r, neuron_sdk.lifecycle as l, neuron_sdk.ending as e
    e.ASKED_S = e.INTERRUPTED_S = e.KILLED_S = l._FORCE_AFTER_S = 0.3
    r.HOOKS_S = 1.0
    neuron.run()
"""


@pytest.fixture
def federation() -> Iterator[FakeFederation]:
    with FakeFederation(heartbeat_interval=0.2) as fake:
        yield fake


@pytest.fixture
def processes(federation: FakeFederation, tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    with Processes(federation.url, tmp_path) as processes:
        yield processes


def test_a_restart_interrupts_what_runs_and_keeps_what_waits(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    processes.spawn("service.py")
    held = federation.issue(N, "hold")
    eventually_sync((tmp_path / "held").exists, within=20)
    waiting = federation.issue(N, "block")
    federation.wait_for(lambda: federation.updates_of(waiting))
    restart = federation.issue(N, "restart")
    assert federation.outcome(restart, within=30).response == {"restarted": True}
    assert code(federation.outcome(held)) == "INTERRUPTED"
    assert federation.outcome(waiting, within=20).state is FinalState.SUCCEEDED


def test_two_restarts_at_once_are_both_answered_by_the_new_process(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    processes.spawn("service.py", STOP_GRACE="60")
    held = federation.issue(N, "hold_until_released")
    eventually_sync((tmp_path / "held").exists, within=20)
    first = federation.issue(N, "restart")
    second = federation.issue(N, "restart")
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == 4, describe="STOPPING"
    )
    third = federation.issue(N, "restart")
    federation.wait_for(lambda: federation.updates_of(third), describe="it joins the others")
    (tmp_path / "release").touch()
    for command_id in (first, second, third):
        assert federation.outcome(command_id, within=30).response == {"restarted": True}
    assert federation.outcome(held).state is FinalState.SUCCEEDED
    assert (tmp_path / "starts").read_text() == "ss", "one restart answers for all"


def test_a_restart_whose_process_is_killed_before_it_is_answered_by_the_next_one(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    first = processes.spawn("service.py", STOP_GRACE="60")
    federation.issue(N, "hold")
    eventually_sync((tmp_path / "held").exists, within=20)
    restart = federation.issue(N, "restart")
    federation.wait_for(lambda: len(federation.updates_of(restart)) >= 2)
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == 4, describe="STOPPING"
    )
    first.kill()
    first.wait(10)
    processes.spawn("service.py")
    assert federation.outcome(restart, within=20).response == {"restarted": True}


def test_a_program_that_cannot_be_executed_again_goes_on_and_says_why(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "no-exec").touch()
    process = processes.spawn("service.py")
    outcome = federation.outcome(federation.issue(N, "restart"), within=30)
    assert outcome.state is FinalState.FAILED
    assert code(outcome) == "RESTART_FAILED"
    assert "No such file" in str(outcome.error)
    federation.wait_connected(N, sessions=2)
    health = federation.outcome(federation.issue(N, "health_check"))
    assert health.state is FinalState.SUCCEEDED, "the neuron goes on in the old process"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_new_process_that_does_not_start_fails_the_restart(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    process = processes.spawn("service.py")
    federation.wait_connected(N, within=20)
    eventually_sync((tmp_path / "starts").exists)
    (tmp_path / "broken").touch()
    restart = federation.issue(N, "restart")
    assert process.wait(30) == 1
    (tmp_path / "broken").unlink()
    processes.spawn("service.py")
    outcome = federation.outcome(restart, within=20)
    assert code(outcome) == "RESTART_FAILED"
    assert "no database" in str(outcome.error)


def test_a_service_that_hangs_is_restarted_all_the_same(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    processes.spawn("service.py")
    blocked = federation.issue(N, "block_loop")
    eventually_sync((tmp_path / "held").exists, within=20)
    restart = federation.issue(N, "restart")
    assert federation.outcome(restart, within=30).response == {"restarted": True}
    assert code(federation.outcome(blocked)) == "INTERRUPTED"


def test_a_cancelled_restart_that_is_under_way_ends_as_it_does(
    federation: FakeFederation, processes: Processes, tmp_path: Path
) -> None:
    processes.spawn("service.py")
    federation.issue(N, "hold")
    eventually_sync((tmp_path / "held").exists, within=20)
    restart = federation.issue(N, "restart")
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == 4, describe="STOPPING"
    )
    federation.cancel(restart)
    assert federation.outcome(restart, within=30).state is FinalState.SUCCEEDED


def test_a_stop_is_acknowledged_before_the_process_ends(
    federation: FakeFederation, processes: Processes
) -> None:
    process = processes.spawn("service.py")
    federation.wait_connected(N, within=20)
    stop = federation.issue(N, "stop", {"reason": "maintenance"})
    assert process.wait(20) == 0
    assert federation.outcome(stop).state is FinalState.SUCCEEDED
    kinds = [kind for _, kind in federation.neurons[N].received]
    assert kinds.count("command_update") == 3, "accepted, started, finished: each sent once"
    processes.spawn("service.py")
    federation.wait_connected(N, sessions=2, within=20)
    hello = federation.neurons[N].hellos[-1]
    assert hello.first_sequence == hello.next_sequence, "nothing was left to be sent again"
