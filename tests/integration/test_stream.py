"""A neuron's stream over real gRPC: its beginning, its limits, its end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from federation.v1 import (
    errors_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
)
from federation.v1 import session_service_pb2 as pb
from federation_server.rpc import stream
from tests.support.federation import BareNeuron, Federation, connected, running
from tests.support.waiting import eventually


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


async def neuron_state(federation: Federation, neuron_id: str) -> neuron_pb2.Neuron:
    answer = await federation.fleet.GetNeuron(
        fleet_service_pb2.GetNeuronRequest(neuron_id=neuron_id), metadata=federation.admin
    )
    return answer.neuron


def now() -> Timestamp:
    time = Timestamp()
    time.GetCurrentTime()
    return time


def report(rows: float) -> report_pb2.AnalyticsReport:
    return report_pb2.AnalyticsReport(
        start_time=now(),
        end_time=now(),
        points=[report_pb2.MetricPoint(name="rows", counter=rows)],
    )


async def test_a_heartbeat_is_kept_as_it_came(federation: Federation) -> None:
    beat = heartbeat_pb2.Heartbeat(
        heartbeat_time=now(),
        health_score=88.0,
        activity=heartbeat_pb2.ACTIVITY_ACTIVE,
        system=heartbeat_pb2.SystemMetrics(cpu_percent=12.5, memory_used_bytes=2**40),
        application=heartbeat_pb2.ApplicationMetrics(requests=7, p99_response_ms=3.5),
        process=heartbeat_pb2.ProcessInfo(pid=1, threads=2, rss_bytes=3, open_files=4),
        host=heartbeat_pb2.HostInfo(hostname="h", os="Linux", cpu_count=2),
        dependencies=[
            heartbeat_pb2.DependencyStatus(
                name="db",
                state=heartbeat_pb2.DEPENDENCY_STATE_DEGRADED,
                latency_ms=1.5,
                message="slow",
                check_time=now(),
            )
        ],
        versions=heartbeat_pb2.Versions(service="1", sdk="2", runtime="3"),
        spool=heartbeat_pb2.SpoolStatus(
            pending=1,
            pending_bytes=2,
            dropped=9,
            dropped_reports=2,
            dropped_updates=3,
            dropped_error_reports=4,
            shortened_results=5,
            in_memory=True,
        ),
        running_commands=2,
    )
    beat.uptime.FromMilliseconds(1500)
    beat.heartbeat_time.nanos -= beat.heartbeat_time.nanos % 1000
    beat.dependencies[0].check_time.nanos -= beat.dependencies[0].check_time.nanos % 1000
    async with connected(federation, "n") as neuron:
        await neuron.send(heartbeat=beat)

        async def kept() -> bool:
            return (await neuron_state(federation, "n")).HasField("last_heartbeat_time")

        await eventually(kept, describe="the heartbeat is stored")
        state = await neuron_state(federation, "n")
        assert state.last_heartbeat == beat
        assert (state.presence, state.health_score) == (neuron_pb2.PRESENCE_ONLINE, 88.0)
        assert state.totals.requests == 7


async def test_a_neurons_host_stays_known_when_later_heartbeats_leave_it_out(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        host = heartbeat_pb2.HostInfo(hostname="h", os="Linux", architecture="x86_64", cpu_count=2)
        await neuron.send(heartbeat=heartbeat_pb2.Heartbeat(host=host, health_score=1.0))

        async def scored(score: float) -> bool:
            return (await neuron_state(federation, "n")).health_score == score

        await eventually(lambda: scored(1.0), describe="the first heartbeat is stored")
        await neuron.send(heartbeat=heartbeat_pb2.Heartbeat(health_score=2.0))
        await eventually(lambda: scored(2.0), describe="the second heartbeat is stored")
        assert (await neuron_state(federation, "n")).host == host


async def test_a_bad_heartbeat_is_refused_by_name_and_the_stream_lives_on(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        bad = heartbeat_pb2.Heartbeat(
            health_score=101.0,
            system=heartbeat_pb2.SystemMetrics(cpu_percent=math.nan, memory_percent=-1.0),
        )
        await neuron.send(heartbeat=bad)
        refusal = (await neuron.receive()).refusal
        assert refusal.message == "heartbeat"
        assert refusal.reason == errors_pb2.ERROR_REASON_INVALID_FIELD
        assert {violation.field for violation in refusal.field_violations} == {
            "heartbeat.health_score",
            "heartbeat.system.cpu_percent",
            "heartbeat.system.memory_percent",
        }
        await neuron.send(sequence=1, send_time=now(), analytics_report=report(1.0))
        await neuron.acked(1)


async def test_a_refused_report_is_acknowledged_and_has_no_effect(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        bad = report(math.inf)
        await neuron.send(sequence=1, send_time=now(), analytics_report=bad)
        seen = [await neuron.receive(), await neuron.receive()]
        assert any(message.refusal.sequence == 1 for message in seen)
        assert any(message.ack_sequence == 1 for message in seen)


async def test_an_unknown_member_of_the_envelope_is_ignored_and_acknowledged(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        await neuron.send(sequence=1)
        await neuron.acked(1)


async def test_a_replay_is_acknowledged_and_counts_once(federation: Federation) -> None:
    token = await federation.register("n")
    first = BareNeuron(federation, token)
    await first.hello()
    await first.send(sequence=1, send_time=now(), analytics_report=report(2.0))
    await first.acked(1)
    second = BareNeuron(federation, token)
    welcome = await second.hello()
    assert welcome.last_sequence == 1
    await second.send(sequence=1, send_time=now(), analytics_report=report(2.0))
    await second.send(sequence=2, send_time=now(), analytics_report=report(3.0))
    await second.acked(2)
    async with federation.app.database.begin() as connection:
        total = await connection.exec_driver_sql("SELECT sum(value) FROM metric_points")
        assert total.scalar() == 5.0
    second.call.cancel()


async def test_a_newer_session_supersedes_the_older(federation: Federation) -> None:
    token = await federation.register("n")
    first = BareNeuron(federation, token)
    assert (await first.hello()).epoch == 1
    second = BareNeuron(federation, token)
    assert (await second.hello()).epoch == 2
    code, _ = await first.end()
    assert code is grpc.StatusCode.ABORTED
    state = await neuron_state(federation, "n")
    assert (state.session.epoch, state.session.open) == (2, True)
    second.call.cancel()


async def test_a_first_message_that_is_no_hello_ends_the_stream(federation: Federation) -> None:
    neuron = BareNeuron(federation, await federation.register("n"))
    await neuron.send(heartbeat=heartbeat_pb2.Heartbeat())
    code, details = await neuron.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "Hello" in details


async def test_a_second_hello_ends_the_stream(federation: Federation) -> None:
    async with connected(federation, "n") as neuron:
        await neuron.send(hello=pb.Hello(instance_id="i", spool_id="s"))
        assert (await neuron.end())[0] is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_bad_hello_names_its_fields(federation: Federation) -> None:
    neuron = BareNeuron(federation, await federation.register("n"))
    await neuron.send(hello=pb.Hello())
    code, _ = await neuron.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_goodbye_makes_the_neuron_offline_at_once_and_the_stream_ends_well(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        await neuron.send(sequence=1, send_time=now(), analytics_report=report(1.0))
        await neuron.send(goodbye=pb.Goodbye(reason="stopped by SIGTERM"))
        await neuron.call.done_writing()
        await neuron.acked(1)
        assert (await neuron.end())[0] is grpc.StatusCode.OK

        async def offline() -> bool:
            state = await neuron_state(federation, "n")
            return state.presence == neuron_pb2.PRESENCE_OFFLINE

        await eventually(offline, describe="the neuron is OFFLINE")
        assert (await neuron_state(federation, "n")).presence_reason == "stopped by SIGTERM"


async def test_a_stream_lost_without_goodbye_makes_the_neuron_suspect(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        neuron.call.cancel()

        async def suspect() -> bool:
            state = await neuron_state(federation, "n")
            return state.presence == neuron_pb2.PRESENCE_SUSPECT

        await eventually(suspect, describe="the neuron is SUSPECT")


async def test_a_deactivated_neurons_stream_ends_and_it_comes_back_only_once_activated(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    await federation.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n", reason="misbehaves"),
        metadata=federation.admin,
    )
    assert (await neuron.end())[0] is grpc.StatusCode.FAILED_PRECONDITION
    again = BareNeuron(federation, token)
    await again.greet()
    code, details = await again.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "deactivated" in details
    await federation.fleet.ActivateNeuron(
        fleet_service_pb2.ActivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    back = BareNeuron(federation, token)
    await back.hello()
    back.call.cancel()


async def test_a_deleted_neurons_stream_ends_and_its_token_is_dead(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    await federation.fleet.DeleteNeuron(
        fleet_service_pb2.DeleteNeuronRequest(neuron_id="n", force=True),
        metadata=federation.admin,
    )
    assert (await neuron.end())[0] is grpc.StatusCode.UNAUTHENTICATED
    await federation.register("n")
    again = BareNeuron(federation, token)
    await again.greet()
    assert (await again.end())[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_draining_server_tells_its_neurons_when_to_come_back(database_url: str) -> None:
    async with running(database_url) as federation:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        draining = asyncio.create_task(federation.app.drain())
        assert (await neuron.receive()).HasField("reconnect")
        assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE
        await draining


async def test_a_draining_server_leaves_a_stream_open_until_its_neuron_has_read_the_reconnect(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HOME_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(stream, "LAST_WORDS_TIMEOUT_S", 3600.0)
    async with running(database_url, drain_timeout="PT60S") as federation:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        session = federation.app.sessions.get("n")
        assert session is not None
        draining = asyncio.create_task(federation.app.drain())
        await eventually(lambda: session.end, describe="it is sent home")
        assert (await neuron.receive()).HasField("reconnect")
        assert federation.app.sessions.get("n") is session
        await neuron.call.done_writing()
        assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE
        await draining


async def test_a_neuron_that_does_not_obey_the_reconnect_keeps_no_drain_and_is_told_it_again(
    database_url: str,
) -> None:
    async with running(database_url, drain_timeout="PT60S") as federation:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        draining = asyncio.create_task(federation.app.drain())
        after = (await neuron.receive()).reconnect.after.ToMilliseconds()
        async with asyncio.timeout(20):
            await draining
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await neuron.call.read()
        status = rpc_status.from_call(ended.value)  # type: ignore[arg-type]  # it has what is needed
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in status.details)
        assert abs(retry.retry_delay.ToMilliseconds() - after) <= 1


async def test_a_stream_whose_welcome_is_cut_short_still_ends_with_its_status(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LAST_WORDS_TIMEOUT_S", 0.0)
    token = await federation.register("n")
    federation.app.sessions.send_home(timedelta(seconds=1))
    neuron = BareNeuron(federation, token)
    with suppress(AssertionError, grpc.aio.AioRpcError):
        await neuron.hello()
    assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_opens_while_the_server_drains_is_sent_home_as_well(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    federation.app.sessions.send_home(timedelta(seconds=1))
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    assert (await neuron.receive()).HasField("reconnect")
    assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_neuron_without_a_stream_is_online_by_its_heartbeat(
    federation: Federation,
) -> None:
    token = await federation.register("cron-job")
    answer = await federation.session.SendHeartbeat(
        pb.SendHeartbeatRequest(
            heartbeat=heartbeat_pb2.Heartbeat(health_score=50.0), instance_id="i"
        ),
        metadata=(("authorization", f"Bearer {token}"),),
    )
    assert answer.HasField("receive_time")
    state = await neuron_state(federation, "cron-job")
    assert state.presence == neuron_pb2.PRESENCE_ONLINE
    assert state.last_heartbeat_time == answer.receive_time


async def test_a_report_without_a_stream_counts_once(federation: Federation) -> None:
    token = await federation.register("cron-job")
    for _ in range(2):
        answer = await federation.session.ReportAnalytics(
            pb.ReportAnalyticsRequest(
                spool_id="s", sequence=1, send_time=now(), report=report(4.0)
            ),
            metadata=(("authorization", f"Bearer {token}"),),
        )
        assert answer.ack_sequence == 1
    async with federation.app.database.begin() as connection:
        total = await connection.exec_driver_sql("SELECT sum(value) FROM metric_points")
        assert total.scalar() == 4.0


@pytest.mark.parametrize("size_mib", [5])
async def test_a_message_over_4_mib_is_answered_resource_exhausted(
    federation: Federation, size_mib: int
) -> None:
    token = await federation.register("n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await federation.session.Deregister(
            pb.DeregisterRequest(reason="x" * (size_mib << 20)),
            metadata=(("authorization", f"Bearer {token}"),),
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
