"""Who says, sends or reads nothing keeps nothing: each stream and call ends in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from federation.v1 import command_service_pb2, heartbeat_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.rpc import deadlines
from tests.support.calls import issue, shown
from tests.support.faults import report
from tests.support.federation import BareNeuron, Federation, Served, connected, running
from tests.support.plain_neuron import now
from tests.support.waiting import eventually

IMPATIENT = neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=1))
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
REGISTER = "/federation.v1.SessionService/Register"
CHECK = "/grpc.health.v1.Health/Check"


def given_up(federation: Federation, cause: str) -> float:
    name = "federation_streams_given_up_total"
    value = federation.app.metrics.registry.get_sample_value(name, {"cause": cause})
    assert value is not None
    return value


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federation_server.live.silence.CHECK_INTERVAL_S", 0.05)


# neurons' streams


@pytest.mark.usefixtures("_often")
async def test_a_stream_on_which_its_neuron_falls_silent_is_ended_and_another_is_not(
    database_url: str,
) -> None:
    async with (
        running(database_url, silent_stream_after="PT1S") as federation,
        connected(federation, "silent", alert_thresholds=IMPATIENT) as silent,
        connected(federation, "alive", alert_thresholds=IMPATIENT) as alive,
    ):

        async def beats() -> None:
            while True:
                await alive.send(heartbeat=heartbeat_pb2.Heartbeat())
                await asyncio.sleep(0.1)

        beating = asyncio.create_task(beats())
        code, why = await silent.end()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "no message came" in why
        assert given_up(federation, "silent") == 1

        async def closed() -> bool:
            return not (await shown(federation, "silent")).session.open

        await eventually(closed, describe="its session is closed")
        beating.cancel()
        await alive.send(sequence=1, send_time=now(), analytics_report=report("alive"))
        await alive.acked(1)


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize(
    ("thresholds", "settings"),
    [
        (neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=60)), {}),
        (IMPATIENT, {"heartbeat_interval": "PT60S"}),
    ],
    ids=["its own", "told"],
)
async def test_a_stream_is_kept_whose_neuron_need_not_have_spoken_yet(
    database_url: str, thresholds: neuron_pb2.AlertThresholds, settings: dict[str, str]
) -> None:
    async with (
        running(database_url, silent_stream_after="PT0.2S", **settings) as federation,
        connected(federation, "slow", alert_thresholds=thresholds) as slow,
    ):
        ended = asyncio.create_task(slow.end())
        done, _ = await asyncio.wait({ended}, timeout=3.0)
        assert not done
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        assert given_up(federation, "silent") == 0


@pytest.mark.usefixtures("_often")
async def test_a_neuron_that_reads_nothing_is_given_up_although_its_connection_lives(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation_server.live.silence.STALLED_AFTER_S", 1.0)
    async with running(database_url) as federation, deaf_channel(federation) as channel:
        deaf = BareNeuron(Served(federation.address, channel), await federation.register("deaf"))
        await deaf.hello()
        bad = heartbeat_pb2.Heartbeat(
            dependencies=[heartbeat_pb2.DependencyStatus(name="x" * 500)] * 100
        )

        async def talk() -> None:
            while True:
                await deaf.send(heartbeat=bad)

        talking = asyncio.create_task(talk())
        await eventually(
            lambda: given_up(federation, "stalled") == 1, within=20, describe="it is given up"
        )
        await eventually(
            lambda: not len(federation.app.sessions), within=8, describe="its stream has ended"
        )
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        deaf.call.cancel()


@asynccontextmanager
async def deaf_channel(federation: Federation) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(federation.address, options=SMALL_WINDOW) as channel:
        yield channel


async def test_a_neuron_that_sends_too_much_is_read_more_slowly_and_loses_nothing(
    database_url: str,
) -> None:
    rate, burst = 50, 500
    async with (
        running(database_url, neuron_message_rate=rate) as federation,
        connected(federation, "busy") as busy,
        connected(federation, "calm") as calm,
    ):
        loop = asyncio.get_running_loop()
        began = loop.time()
        last = burst + 101

        async def send() -> None:
            for sequence in range(1, last + 1):
                await busy.send(sequence=sequence, send_time=now(), analytics_report=report("busy"))

        sending = asyncio.create_task(send())
        await busy.acked(burst)
        await calm.send(sequence=1, send_time=now(), analytics_report=report("calm"))
        await calm.acked(1)
        message = await busy.receive()
        while message.ack_sequence < last:
            assert not message.HasField("refusal")
            message = await busy.receive()
        # The last one was read only after those beyond the burst had been waited for.
        assert loop.time() - began >= 100 / rate
        await sending


# calls


async def test_a_call_whose_request_never_comes_is_ended_and_one_that_comes_is_not(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "REQUEST_TIMEOUT_S", 1.0)
    async with running(database_url) as federation:
        tasks = len(asyncio.all_tasks())
        # On the wire a call whose client may stream looks the same until its message comes.
        begun: list[Any] = [
            federation.channel.stream_stream(method)(metadata=metadata)
            for method, metadata in [
                (REGISTER, ()),
                (CHECK, ()),
                ("/federation.v1.FleetService/GetNeuron", federation.admin),
                ("/federation.v1.CommandService/WatchCommand", federation.admin),
            ]
        ]
        for call in begun:
            async with asyncio.timeout(10):
                assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert given_up(federation, "unsent") == len(begun)
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks, describe="no task is left")

        await federation.register("n")
        command_id = await issue(federation, "n", "run")
        watch: Any = federation.command.WatchCommand(
            command_service_pb2.WatchCommandRequest(command_id=command_id),
            metadata=federation.admin,
        )
        assert (await watch.read()).command.command_id == command_id
        late = asyncio.ensure_future(watch.read())
        done, _ = await asyncio.wait({late}, timeout=1.5)
        assert not done, "an answer that goes on is not ended"
        watch.cancel()
        await asyncio.gather(late, return_exceptions=True)
        health: Any = HealthStub(federation.channel)
        await health.Check(HealthCheckRequest())
        assert given_up(federation, "unsent") == len(begun)


async def test_an_answer_that_is_not_read_is_ended_and_frees_what_it_held(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "READ_TIMEOUT_S", 1.0)
    async with running(database_url) as federation, deaf_channel(federation) as channel:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        served = Served(federation.address, channel)
        command_id = await issue(federation, "n", "run", text="x" * 100_000)
        delivery = (await neuron.receive()).command
        request = command_service_pb2.WatchCommandRequest(command_id=command_id)
        watch = served.command.WatchCommand(request, metadata=federation.admin)
        await watch.wait_for_connection()

        async def progress() -> None:
            for step in range(1, 1000):
                await neuron.update(
                    delivery, progressed=pb.CommandProgressed(message=str(step), fraction=0.5)
                )
                await asyncio.sleep(0.01)

        working = asyncio.create_task(progress())
        await eventually(
            lambda: given_up(federation, "unread") == 1, within=20, describe="it is given up"
        )
        await eventually(
            lambda: not federation.app.watchers._watches, describe="nobody follows the command"
        )
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        watch.cancel()
        neuron.call.cancel()
