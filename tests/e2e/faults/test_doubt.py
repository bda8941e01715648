"""What is not the neurons' fault makes none of them OFFLINE: the server or PostgreSQL stands still,
or all streams are lost at once. A neuron that is really gone goes OFFLINE all the same.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import neuron_pb2
from tests.support.calls import ONLINE, shown
from tests.support.faults import (
    Postgres,
    answers_again,
    calling,
    health,
    is_health,
    load,
    presence,
    report,
    serving,
)
from tests.support.federation import BareNeuron, Served, connected, running
from tests.support.plain_neuron import now
from tests.support.processes import FederationProcess
from tests.support.proxy import proxy
from tests.support.waiting import eventually

SUSPECT = neuron_pb2.PRESENCE_SUSPECT
OFFLINE = neuron_pb2.PRESENCE_OFFLINE
MASS_OFFLINE_AFTER_S = 12  # as the servers here are told


async def doubts(served: Served) -> dict[str, set[int]]:
    """The servers in doubt, each with why."""
    answer = await served.fleet.GetFleetOverview(
        pb.GetFleetOverviewRequest(), metadata=served.admin, timeout=10
    )
    return {each.server_id: set(each.causes) for each in answer.doubts}


async def in_doubt(served: Served, cause: int) -> bool:
    return any(cause in causes for causes in (await doubts(served)).values())


async def in_no_doubt(served: Served) -> bool:
    return not await doubts(served)


async def silent(doomed: Postgres, names: Sequence[str], seconds: float) -> None:
    """Waits until nothing was heard of those neurons for that long, by PostgreSQL's clock."""
    listed = ", ".join(f"'{name}'" for name in names)
    query = (
        "SELECT bool_and(now() - greatest(last_heartbeat_time, session_open_time)"  # noqa: S608
        f" > interval '{seconds} s') FROM neuron_states WHERE neuron_id IN ({listed})"
    )
    await eventually(
        lambda: asyncio.to_thread(doomed.ask, query), within=30, describe=f"{seconds} s of silence"
    )


def went_down(server: FederationProcess, since: int, names: Sequence[str]) -> list[str]:
    """What the server's output says of those neurons' having gone down."""
    return [
        line
        for line in server.output[since:].splitlines()
        if '"presence_down"' in line and any(f'"{name}"' in line for name in names)
    ]


async def test_a_server_whose_writes_wait_is_in_doubt_and_serves_on(database_url: str) -> None:
    async with running(database_url) as federation, connected(federation, "n") as neuron:
        assert await in_doubt(federation, pb.DOUBT_CAUSE_JUST_STARTED)
        frozen = partial(
            federation.app.metrics.registry.get_sample_value, "federation_presence_frozen"
        )
        assert frozen({"cause": "JUST_STARTED"}) == 1
        assert frozen({"cause": "FLUSH_LAG"}) == 0
        async with await federation.app.database.connect("test") as connection:
            await connection.execute(b"BEGIN")
            await connection.execute(b"LOCK TABLE spools IN ACCESS EXCLUSIVE MODE")
            await neuron.send(sequence=1, send_time=now(), analytics_report=report("n"))
            await eventually(
                lambda: in_doubt(federation, pb.DOUBT_CAUSE_FLUSH_LAG), describe="it is said"
            )
            assert frozen({"cause": "FLUSH_LAG"}) == 1
            assert await health(federation) == HealthCheckResponse.SERVING
            await connection.execute(b"COMMIT")
        await neuron.acked(1)


# Shorter than the lease, and longer; the neurons' heartbeat_timeout is 2 s.
@pytest.mark.parametrize("silence_s", [3.5, 12])
async def test_a_server_that_stood_still_marks_nobody_down_for_that(
    server: FederationProcess, served: Served, doomed: Postgres, silence_s: float
) -> None:
    await eventually(lambda: in_no_doubt(served), within=20, describe="all is well")
    async with load(served, f"stood-{silence_s:g}".replace(".", "-")) as (_, names):
        epochs = [(await shown(served, name)).session.epoch for name in names]
        said = len(server.output)
        server.process.send_signal(signal.SIGSTOP)
        try:
            await silent(doomed, names, silence_s)
        finally:
            server.process.send_signal(signal.SIGCONT)
        await eventually(
            lambda: in_doubt(served, pb.DOUBT_CAUSE_LOOP_LAG), describe="the overview says so"
        )
        not_serving = HealthCheckResponse.NOT_SERVING
        await eventually(
            lambda: is_health(served, not_serving, "presence"), describe="so does health"
        )
        assert '"presence_frozen"' in server.output[said:]
        await eventually(lambda: in_no_doubt(served), within=20, describe="it goes on")
        assert '"presence_resumed"' in server.output[said:]
        await eventually(
            lambda: is_health(served, HealthCheckResponse.SERVING, "presence"),
            describe="health says that it goes on",
        )
        states = [await shown(served, name) for name in names]
        assert [state.presence for state in states] == [ONLINE] * len(names)
        assert [state.session.epoch for state in states] == epochs
        assert went_down(server, said, names) == []
        assert '"presence_lost"' not in server.output[said:]  # nor were their sessions closed


async def test_postgresql_that_stood_still_is_no_reason_to_mark_anybody_down(
    server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    async with load(served, "db-stood") as (_, names):
        said = len(server.output)
        await asyncio.to_thread(doomed.freeze)
        try:
            await eventually(
                lambda: is_health(served, HealthCheckResponse.NOT_SERVING), describe="it is away"
            )
        finally:
            await asyncio.to_thread(doomed.thaw)
        await answers_again(served, doomed)
        await eventually(
            lambda: in_doubt(served, pb.DOUBT_CAUSE_DATABASE_LAG), describe="the overview says so"
        )
        await eventually(lambda: in_no_doubt(served), within=20, describe="it goes on")
        assert [await presence(served, name) for name in names] == [ONLINE] * len(names)
        assert went_down(server, said, names) == []


async def test_the_neurons_of_another_server_that_stood_still_are_left_alone(
    folder: Path, server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    """The server that sweeps is well all the time."""
    with serving(doomed, folder) as other:
        async with calling(other) as elsewhere:
            await eventually(lambda: in_no_doubt(served), within=20, describe="all is well")
            thresholds = neuron_pb2.AlertThresholds()
            thresholds.heartbeat_timeout.FromSeconds(6)
            async with connected(elsewhere, "elsewhere", alert_thresholds=thresholds) as neuron:
                await neuron.send(heartbeat={})
                await eventually(
                    lambda: asyncio.to_thread(
                        doomed.ask,
                        "SELECT last_heartbeat_time IS NOT NULL FROM neuron_states"
                        " WHERE neuron_id = 'elsewhere'",
                    ),
                    describe="a heartbeat is stored",
                )
                said = len(server.output)
                other.process.send_signal(signal.SIGSTOP)
                try:
                    await neuron.send(heartbeat={})
                    await silent(doomed, ["elsewhere"], 7)  # the lease goes on for 8 s at least
                finally:
                    other.process.send_signal(signal.SIGCONT)
                await eventually(
                    lambda: in_doubt(served, pb.DOUBT_CAUSE_LOOP_LAG), describe="it says so"
                )
                await eventually(lambda: in_no_doubt(served), within=20, describe="it goes on")
                assert went_down(server, said, ["elsewhere"]) == []


@asynccontextmanager
async def fleet(served: Served, prefix: str, number: int) -> AsyncIterator[list[str]]:
    """Neurons that are connected, and do not come back when they are not any more."""
    names = [f"{prefix}-{each}" for each in range(number)]
    tokens = [await served.register(name) for name in names]
    async with AsyncExitStack() as stack:
        for token in tokens:
            neuron = BareNeuron(served, token)
            stack.callback(neuron.call.cancel)
            await neuron.hello()
        yield names


async def are(served: Served, names: Sequence[str], wanted: int) -> bool:
    return all([await presence(served, name) == wanted for name in names])


async def away_s(doomed: Postgres, prefix: str) -> list[float]:
    """For how long each was away when it went OFFLINE, by PostgreSQL's clock."""
    query = (
        "SELECT array_agg(extract(epoch FROM presence_time - session_close_time)::float8)"  # noqa: S608
        f" FROM neuron_states WHERE neuron_id LIKE '{prefix}-%' AND presence = 'OFFLINE'"
    )
    return list(await asyncio.to_thread(doomed.ask, query) or [])


async def test_neurons_whose_streams_are_cut_all_at_once_are_offline_only_if_they_stay_away(
    server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    await eventually(lambda: in_no_doubt(served), within=20, describe="all is well")
    async with (
        proxy(server.address) as through,
        grpc.aio.insecure_channel(through.address) as channel,
        fleet(Served(through.address, channel), "snapped", 12) as names,
    ):
        through.cut()
        await eventually(lambda: are(served, names, SUSPECT), describe="all are SUSPECT")
        await eventually(
            lambda: in_doubt(served, pb.DOUBT_CAUSE_MASS_DISCONNECT), describe="it is said"
        )
        await eventually(lambda: are(served, names, OFFLINE), within=30, describe="all are OFFLINE")
        assert min(await away_s(doomed, "snapped")) >= MASS_OFFLINE_AFTER_S
        await eventually(lambda: in_no_doubt(served), describe="that is over")


async def test_the_neurons_of_a_server_that_drains_have_the_same_time_to_come_back(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    with serving(doomed, folder) as other:
        async with calling(other) as elsewhere, fleet(elsewhere, "sent-home", 12) as names:
            assert await asyncio.to_thread(other.stop) == 0
            await eventually(
                lambda: in_doubt(served, pb.DOUBT_CAUSE_MASS_DISCONNECT), describe="it is said"
            )
            await eventually(
                lambda: are(served, names, OFFLINE), within=30, describe="all are OFFLINE"
            )
            assert min(await away_s(doomed, "sent-home")) >= MASS_OFFLINE_AFTER_S


async def test_a_single_lost_neuron_goes_offline_in_time_beside_a_healthy_fleet(
    server: FederationProcess, served: Served
) -> None:
    await eventually(lambda: in_no_doubt(served), within=20, describe="all is well")
    said = len(server.output)
    async with fleet(served, "healthy", 6) as names, connected(served, "single") as neuron:
        neuron.call.cancel()
        await eventually(lambda: are(served, ["single"], OFFLINE), describe="it is OFFLINE")
        assert await are(served, names, ONLINE)
        assert '"presence_frozen"' not in server.output[said:]
