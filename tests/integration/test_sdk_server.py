"""The SDK against the real server: cancel, attempts with checkpoints, types, and restart."""

from __future__ import annotations

import asyncio
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, Field

from federation.v1 import command_pb2, command_service_pb2, heartbeat_pb2
from neuron_sdk import CommandContext, Neuron, NeuronConfig
from tests.support.calls import FINAL, State, command, issue, online, reached, shown, spec
from tests.support.federation import Federation, Served, running
from tests.support.sdk_neuron import N, Processes, be_quick
from tests.support.servers import refusal
from tests.support.waiting import eventually
from tests.unit.test_sdk_types import TYPES

_quick = pytest.fixture(autouse=True)(be_quick)


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url, drain_timeout="PT0.2S") as federation:
        yield federation


@pytest_asyncio.fixture
async def neuron(federation: Federation, tmp_path: Path) -> AsyncIterator[Neuron]:
    config = NeuronConfig(
        state_dir=tmp_path / "state",
        federation_url=federation.address,
        enrollment_token=await federation.enrollment_token(),
        heartbeat_interval=1,
        metrics_enabled=False,
        stop_grace=0.2,
    )
    neuron = Neuron(N, type="worker", config=config)
    yield neuron
    await asyncio.to_thread(neuron.stop)


async def cancel(federation: Federation, command_id: str, reason: str = "") -> None:
    await federation.command.CancelCommand(
        command_service_pb2.CancelCommandRequest(command_id=command_id, reason=reason),
        metadata=federation.admin,
    )


async def start(federation: Federation, neuron: Neuron) -> None:
    await asyncio.to_thread(neuron.start)
    await online(federation, N)


async def test_a_cancelled_command_ends_as_its_handler_says(
    federation: Federation, neuron: Neuron
) -> None:
    @neuron.command()
    async def give_up(ctx: CommandContext) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ctx.log.info("cleaned up", reason=ctx.cancel_reason)

    @neuron.command()
    def go_on(ctx: CommandContext) -> str:
        while not ctx.cancelled:
            time.sleep(0.005)
        return "done all the same"

    await start(federation, neuron)
    given_up = await issue(federation, N, "give_up")
    gone_on = await issue(federation, N, "go_on")
    for command_id in (given_up, gone_on):
        await reached(federation, command_id, State.COMMAND_STATE_RUNNING)
        await cancel(federation, command_id, "wrong source")
    ended = await reached(federation, given_up, *FINAL)
    assert ended.state == State.COMMAND_STATE_CANCELLED
    assert "cleaned up reason='wrong source'" in ended.log_tail
    ended = await reached(federation, gone_on, *FINAL)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    assert ended.response["result"] == "done all the same"


async def test_a_cancelled_command_whose_handler_is_deaf_fails_and_says_so(
    federation: Federation, neuron: Neuron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.ending.KILLED_S", 0.3)
    release = threading.Event()
    neuron.command("deaf")(lambda: release.wait(30) and None)
    await start(federation, neuron)
    command_id = await issue(federation, N, "deaf")
    await reached(federation, command_id, State.COMMAND_STATE_RUNNING)
    await cancel(federation, command_id)
    ended = await reached(federation, command_id, *FINAL)
    release.set()
    assert ended.state == State.COMMAND_STATE_FAILED
    assert ended.error.code == "CANCEL_IGNORED"


async def test_a_paused_neuron_s_waiting_command_is_cancelled(
    federation: Federation, neuron: Neuron
) -> None:
    neuron.command("task")(lambda: None)
    await start(federation, neuron)
    await reached(federation, await issue(federation, N, "pause"), *FINAL)
    command_id = await issue(federation, N, "task")
    await reached(federation, command_id, State.COMMAND_STATE_ACCEPTED)
    await cancel(federation, command_id)
    assert (await reached(federation, command_id, *FINAL)).state == State.COMMAND_STATE_CANCELLED


async def test_each_attempt_goes_on_from_the_checkpoint_that_the_ledger_holds(
    federation: Federation, neuron: Neuron
) -> None:
    seen: list[tuple[int, int, Any]] = []

    @neuron.command()
    async def task(ctx: CommandContext) -> str:
        seen.append((ctx.attempt, ctx.max_attempts, ctx.checkpoint))
        await ctx.progress(0.1 * ctx.attempt, "on", checkpoint={"rows": 10 * ctx.attempt})
        if ctx.attempt < ctx.max_attempts:
            raise RuntimeError("lost the source")
        return "done"

    await start(federation, neuron)
    wanted = spec(N, "task")
    wanted.max_attempts = 3
    wanted.retry_backoff.CopyFrom(Duration(nanos=100_000_000))
    issued = await federation.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=federation.admin
    )
    ended = await reached(federation, issued.command.command_id, *FINAL)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    assert MessageToDict(ended.checkpoint) == {"rows": 30}
    assert seen == [(1, 3, None), (2, 3, {"rows": 10}), (3, 3, {"rows": 20})]


class Order(BaseModel):
    count: Annotated[int, Field(gt=0)]


async def test_the_federation_takes_every_kind_of_parameter_and_names_each_bad_field(
    federation: Federation, neuron: Neuron
) -> None:
    for number, (hint, *_) in enumerate(TYPES):
        neuron.command(f"kind_{number}")(_taking(hint))

    @neuron.command()
    async def buy(orders: list[Order], name: str) -> int:
        return sum(order.count for order in orders)

    await start(federation, neuron)
    advertised = {each.type for each in (await shown(federation, N)).description.command_types}
    assert {f"kind_{number}" for number in range(len(TYPES))} <= advertised
    bad = issue(federation, N, "buy", orders=[{"count": 1}, {"count": 0}])
    code, _, violations = await refusal(bad)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(violations) == {"command.data.orders[1].count", "command.data.name"}
    command_id = await issue(federation, N, "buy", orders=[{"count": 2}], name="n")
    ended = await reached(federation, command_id, *FINAL)
    assert ended.response["result"] == 2


def _taking(hint: Any) -> Callable[[Any], None]:
    def handler(x: Any) -> None: ...

    handler.__annotations__ = {"x": hint}
    return handler


async def issue_once(served: Served, kind: str) -> str:
    """Issues a command that is never sent twice."""
    wanted = spec(N, kind)
    wanted.execution = command_pb2.EXECUTION_AT_MOST_ONCE
    answer = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=served.admin
    )
    return answer.command.command_id


async def _is_stopping(served: Served) -> bool:
    beat = (await shown(served, N)).last_heartbeat
    return beat.activity == heartbeat_pb2.ACTIVITY_STOPPING


SERVICE = """
    from neuron_sdk import Neuron
    neuron = Neuron("n-1", type="worker")

    @neuron.command()
    def task() -> None:
        open("ran", "a").write("r")

    neuron.on_start(lambda: open("starts", "a").write("s") and None)
    neuron.run()
"""


@pytest.fixture
def processes(federation: Federation, tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    with Processes(federation.address, tmp_path) as processes:
        yield processes


async def test_a_restart_is_running_until_the_new_process_is_back(
    federation: Federation, processes: Processes, tmp_path: Path
) -> None:
    token = await federation.enrollment_token()
    process = processes.spawn("service.py", ENROLLMENT_TOKEN=token, HEARTBEAT_INTERVAL="1")
    await online(federation, N)
    command_id = await issue(federation, N, "restart")
    ended = await reached(federation, command_id, *FINAL)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    assert MessageToDict(ended.response) == {"restarted": True}
    states = [step.state for step in (await command(federation, command_id)).transitions]
    assert State.COMMAND_STATE_RUNNING in states
    await online(federation, N, epoch=2)
    assert (tmp_path / "starts").read_text() == "ss"
    assert process.poll() is None
    stop = await issue(federation, N, "stop")
    assert (await reached(federation, stop, *FINAL)).state == State.COMMAND_STATE_SUCCEEDED
    await eventually(lambda: process.poll() == 0, within=20, describe="the process's end")


async def test_what_a_dead_process_had_not_started_fails_if_it_is_never_sent_twice_and_else_runs(
    federation: Federation, processes: Processes, tmp_path: Path
) -> None:
    token = await federation.enrollment_token()
    process = processes.spawn("service.py", ENROLLMENT_TOKEN=token, HEARTBEAT_INTERVAL="1")
    await online(federation, N)
    await reached(federation, await issue(federation, N, "pause"), *FINAL)
    once, again = await issue_once(federation, "task"), await issue(federation, N, "task")
    for command_id in (once, again):
        await reached(federation, command_id, State.COMMAND_STATE_ACCEPTED)
    process.kill()
    process.wait(10)
    processes.spawn("service.py", HEARTBEAT_INTERVAL="1")
    ended = await reached(federation, once, *FINAL)
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "NOT_STARTED")
    assert (await reached(federation, again, *FINAL)).state == State.COMMAND_STATE_SUCCEEDED
    assert (tmp_path / "ran").read_text() == "r"


async def test_what_a_neuron_that_stops_has_not_started_fails_at_once_if_it_is_never_sent_twice(
    federation: Federation, neuron: Neuron
) -> None:
    neuron.command("task")(lambda: None)
    await start(federation, neuron)
    await reached(federation, await issue(federation, N, "pause"), *FINAL)
    once, again = await issue_once(federation, "task"), await issue(federation, N, "task")
    for command_id in (once, again):
        await reached(federation, command_id, State.COMMAND_STATE_ACCEPTED)
    await asyncio.to_thread(neuron.stop)
    ended = await command(federation, once)
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "NOT_STARTED")
    assert (await command(federation, again)).state == State.COMMAND_STATE_ACCEPTED


async def test_what_comes_too_late_to_a_neuron_that_stops_fails_if_it_is_never_sent_twice(
    federation: Federation, neuron: Neuron
) -> None:
    release = threading.Event()
    neuron.command("hold")(lambda: release.wait(30) and None)
    neuron.command("task")(lambda: None)
    await start(federation, neuron)
    held = await issue(federation, N, "hold")
    await reached(federation, held, State.COMMAND_STATE_RUNNING)
    stopping = asyncio.create_task(asyncio.to_thread(neuron.stop))
    await eventually(lambda: _is_stopping(federation), within=20, describe="STOPPING")
    once = await issue_once(federation, "task")
    ended = await reached(federation, once, *FINAL)
    release.set()
    await stopping
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "NOT_STARTED")
