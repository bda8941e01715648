"""Many neurons at once, over real gRPC: some are told to come later, and all are slowed down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from federation.v1 import fleet_service_pb2, heartbeat_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from neuron_sdk import Neuron, NeuronConfig
from tests.support.calls import has_presence, online, shown
from tests.support.federation import BareNeuron, Federation, running
from tests.support.waiting import eventually

T = TypeVar("T")

NEVER_AGAIN = {"admission_rate": 1e-6}
"""After the burst nobody is let in while a test lasts. (Of registrations half the burst is.)"""


def turn(error: grpc.aio.AioRpcError) -> float:
    """The seconds after which a refused caller is to come again."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is needed
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (error.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
    return retry.retry_delay.ToMicroseconds() / 1e6


class Herd:
    """Callers that obey."""

    def __init__(self) -> None:
        self.turns: list[float] = []

    async def get_in(self, call: Callable[[], Awaitable[T]]) -> T:
        """Calls until it is let in, each time when it was told to."""
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                self.turns.append(turn(error))
                await asyncio.sleep(self.turns[-1])


def registering(federation: Federation, secret: str, name: str) -> Callable[[], Awaitable[Any]]:
    request = pb.RegisterRequest(
        description=neuron_pb2.NeuronDescription(neuron_id=name, type="worker"),
        enrollment_token=secret,
    )
    return lambda: federation.session.Register(request)


async def welcomed(federation: Federation, token: str) -> BareNeuron:
    """A stream that has been welcomed.

    Raises:
        grpc.aio.AioRpcError: it was refused.
    """
    neuron = BareNeuron(federation, token)
    with suppress(asyncio.InvalidStateError):  # it is over already; reading says how
        await neuron.greet()
    message = await neuron.call.read()
    assert isinstance(message, pb.FederationMessage)
    assert message.HasField("welcome")
    return neuron


def refused(federation: Federation, kind: str) -> float:
    name = "federation_admission_refused_total"
    return federation.app.metrics.registry.get_sample_value(name, {"kind": kind}) or 0.0


async def test_a_burst_beyond_the_bucket_is_given_turns_and_all_who_obey_get_in(
    database_url: str,
) -> None:
    names = [f"n{number}" for number in range(16)]
    async with running(database_url, admission_rate=40, admission_burst=4) as federation:
        secret = await federation.enrollment_token()
        herd = Herd()
        answers = await asyncio.gather(
            *(herd.get_in(registering(federation, secret, name)) for name in names)
        )
        assert len(herd.turns) == refused(federation, "register") >= 10
        assert len(set(herd.turns)) == len(herd.turns), "no two are told the same"

        herd = Herd()

        async def connect(token: str) -> BareNeuron:
            return await herd.get_in(lambda: welcomed(federation, token))

        neurons = await asyncio.gather(*(connect(answer.token.token) for answer in answers))
        assert len(herd.turns) == refused(federation, "connect") >= 8
        assert len(federation.app.sessions) == len(names)
        for neuron in neurons:
            neuron.call.cancel()


async def test_who_is_told_to_come_later_has_cost_the_database_nothing(database_url: str) -> None:
    async with running(database_url, admission_burst=2, **NEVER_AGAIN) as federation:
        token = await federation.register("n")
        neurons = [await welcomed(federation, token) for _ in range(2)]
        federation.app.database.lost()  # whoever asks it now is UNAVAILABLE
        for call in (
            lambda: welcomed(federation, token),
            registering(federation, "fet_any", "other"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert turn(caught.value) > 0
        federation.app.database.found()
        for neuron in neurons:
            neuron.call.cancel()


async def test_nobody_else_is_kept_out_by_a_herd_nor_by_tokens_that_are_no_good(
    database_url: str,
) -> None:
    async with running(database_url, admission_burst=2, **NEVER_AGAIN) as federation:
        token = await federation.register("n")
        metadata = (("authorization", f"Bearer {token}"),)
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await welcomed(federation, token + "x")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        neurons = [await welcomed(federation, token) for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError):
            await welcomed(federation, token)
        for _ in range(5):
            await shown(federation, "n")
            await federation.fleet.GetFleetOverview(
                fleet_service_pb2.GetFleetOverviewRequest(), metadata=federation.admin
            )
            await federation.session.RefreshToken(pb.RefreshTokenRequest(), metadata=metadata)
            await federation.session.SendHeartbeat(
                pb.SendHeartbeatRequest(heartbeat=heartbeat_pb2.Heartbeat(), instance_id="i"),
                metadata=metadata,
            )
        for neuron in neurons:
            neuron.call.cancel()


async def test_neurons_of_the_sdk_wait_for_their_turns_and_get_in(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, admission_rate=4, admission_burst=2) as federation:
        secret = await federation.enrollment_token()
        neurons = [
            Neuron(
                f"n{number}",
                type="worker",
                config=NeuronConfig(
                    federation_url=federation.address,
                    enrollment_token=secret,
                    state_dir=tmp_path / str(number),
                    metrics_enabled=False,
                ),
            )
            for number in range(4)
        ]
        for neuron in neurons:
            await asyncio.to_thread(neuron.start)
        for number in range(len(neurons)):
            await online(federation, f"n{number}")
        assert refused(federation, "register") > 0
        await asyncio.gather(*(asyncio.to_thread(neuron.stop) for neuron in neurons))


# ---- heartbeats


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour at a pace that tests can wait for."""
    monkeypatch.setattr("federation_server.live.pacing.CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr("federation_server.live.pacing.SETTLE_S", 0.1)
    monkeypatch.setattr("federation_server.live.lease.RENEW_INTERVAL_S", 0.05)


class Told:
    """A neuron that holds a stream, and what it was told last."""

    def __init__(self, neuron: BareNeuron, welcome: pb.Welcome) -> None:
        self.neuron = neuron
        self.settings = welcome.settings
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while isinstance(message := await self.neuron.call.read(), pb.FederationMessage):
            if message.HasField("settings"):
                self.settings = message.settings

    @property
    def interval(self) -> float | None:
        """The least between two heartbeats; None if there is none."""
        if not self.settings.HasField("min_heartbeat_interval"):
            return None
        return self.settings.min_heartbeat_interval.ToMicroseconds() / 1e6

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self.neuron.call.cancel()


@asynccontextmanager
async def streams(federation: Federation, number: int) -> AsyncIterator[list[Told]]:
    """So many neurons that have been welcomed."""
    told = []
    for each in range(number):
        neuron = BareNeuron(federation, await federation.register(f"n{each}"))
        told.append(Told(neuron, await neuron.hello()))
    try:
        yield told
    finally:
        for one in told:
            await one.close()


def granted(federation: Federation) -> float | None:
    name = "federation_heartbeat_interval_seconds"
    return federation.app.metrics.registry.get_sample_value(name)


@pytest.mark.usefixtures("_quick")
async def test_intervals_lengthen_with_the_streams_and_shorten_when_they_leave(
    database_url: str,
) -> None:
    async with (
        running(database_url, heartbeat_rate=2.0) as federation,
        streams(federation, 8) as told,
    ):

        async def all_told(least: float, most: float) -> bool:
            intervals = {one.interval or 0.0 for one in told}
            return len(intervals) == 1 and least <= intervals.pop() <= most

        await eventually(lambda: all_told(8 / 2, 8 / 2 * 1.25), describe="all are told")
        assert granted(federation) == told[0].interval
        newcomer = BareNeuron(federation, await federation.register("newcomer"))
        welcome = await newcomer.hello()
        assert welcome.settings.min_heartbeat_interval.ToMicroseconds() / 1e6 >= 8 / 2
        newcomer.call.cancel()

        for one in told[2:]:
            await one.close()
        del told[2:]
        await eventually(lambda: all_told(2 / 2, 2 / 2 * 1.25**2), describe="two are told")
        await told.pop().close()
        await eventually(lambda: all_told(0.0, 0.0), describe="one may do as it likes")
        assert granted(federation) == 0.0


@pytest.mark.usefixtures("_quick")
async def test_what_neurons_are_told_to_keep_is_lengthened_too(database_url: str) -> None:
    async with (
        running(database_url, heartbeat_rate=0.1, heartbeat_interval="PT3S") as federation,
        streams(federation, 1) as (told,),
    ):
        assert told.settings.heartbeat_interval == Duration(seconds=3)
        await eventually(lambda: told.interval, describe="it is told")
        assert told.settings.heartbeat_interval == told.settings.min_heartbeat_interval
        assert told.interval == 12.5


@pytest.mark.usefixtures("_quick")
async def test_a_neuron_that_was_slowed_down_is_not_taken_for_dead(database_url: str) -> None:
    impatient = neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=1))
    async with running(database_url, heartbeat_rate=0.01, presence_patience=0) as federation:
        neuron = BareNeuron(federation, await federation.register("n", alert_thresholds=impatient))
        told = Told(neuron, await neuron.hello())
        await neuron.send(heartbeat=heartbeat_pb2.Heartbeat())
        await eventually(lambda: told.interval == 125.0, describe="it is slowed down")
        # Nobody slows down a neuron without a stream; it goes silent later than the other one.
        witness = await federation.register("witness", alert_thresholds=impatient)
        await federation.session.SendHeartbeat(
            pb.SendHeartbeatRequest(heartbeat=heartbeat_pb2.Heartbeat(), instance_id="i"),
            metadata=(("authorization", f"Bearer {witness}"),),
        )
        gone = neuron_pb2.PRESENCE_OFFLINE
        await eventually(
            lambda: has_presence(federation, "witness", gone), describe="the witness is gone"
        )
        assert (await shown(federation, "n")).presence == neuron_pb2.PRESENCE_ONLINE
        await told.close()
