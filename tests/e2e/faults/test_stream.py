"""A stream is cut, silent, closed in the store, or its peer is dead: its session says so."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import grpc
import grpc.aio

from federation.v1 import neuron_pb2, report_pb2
from tests.support.calls import shown
from tests.support.faults import Peer, Postgres, is_online, issue, presence
from tests.support.federation import BareNeuron, Served, connected, running
from tests.support.plain_neuron import now
from tests.support.proxy import proxy
from tests.support.waiting import eventually

SUSPECT = neuron_pb2.PRESENCE_SUSPECT
OFFLINE = neuron_pb2.PRESENCE_OFFLINE


async def test_a_live_stream_whose_session_was_closed_elsewhere_is_opened_again(
    served: Served, doomed: Postgres
) -> None:
    async with connected(served, "given-up") as neuron:
        await asyncio.to_thread(
            doomed.do,
            "UPDATE neuron_states SET session_open = false, session_close_time = now(),"
            " presence = 'SUSPECT', presence_reason = 'server lost' WHERE neuron_id = 'given-up'",
        )
        await eventually(lambda: is_online(served, "given-up"), describe="it is ONLINE again")
        command = await issue(served, "given-up")
        assert (await neuron.receive()).command.command_id == command.command_id


async def test_a_stream_cut_in_the_middle_of_a_message_is_suspect_then_offline_and_leaves_nothing(
    database_url: str,
) -> None:
    options = {"offline_after": "PT1S", "presence_patience": "PT0S"}
    async with running(database_url, **options) as federation:
        token = await federation.register("cut")

        async def cut_once() -> None:
            async with (
                proxy(federation.address) as through,
                grpc.aio.insecure_channel(through.address) as channel,
            ):
                neuron = BareNeuron(Served(through.address, channel), token)
                await neuron.hello()
                through.cut_after(30_000)
                big = report_pb2.AnalyticsReport(start_time=now(), end_time=now())
                big.events.add(
                    event_time=now(),
                    severity=report_pb2.SEVERITY_INFO,
                    type="t",
                    message="x" * 8000,
                )
                for _ in range(9):
                    big.events.append(big.events[0])
                with suppress(grpc.aio.AioRpcError):
                    await neuron.send(sequence=1, send_time=now(), analytics_report=big)
                assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE

        await cut_once()
        await eventually(lambda: not len(federation.app.sessions), describe="its session ends")
        await federation.app.writer.settled()
        assert await presence(federation, "cut") == SUSPECT

        async def offline() -> bool:
            return await presence(federation, "cut") == OFFLINE

        await eventually(offline, describe="it is OFFLINE after offline_after")
        tasks = len(asyncio.all_tasks())
        for _ in range(10):
            await cut_once()
        await eventually(lambda: not len(federation.app.sessions), describe="all sessions end")
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 2, describe="no task is left")
        rows = "SELECT count(*) FROM reported_events"
        async with federation.app.database.begin() as connection:
            assert (await connection.exec_driver_sql(rows)).scalar() == 0


async def test_a_stream_that_says_nothing_is_ended(served: Served) -> None:
    neuron = BareNeuron(served, await served.register("silent"))
    code, details = await neuron.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "10 s" in details


async def test_a_dead_peer_is_found_by_keepalive(dead_peer: Peer) -> None:
    async def lost() -> bool:
        return not (await shown(dead_peer.served, "dead-peer")).session.open

    left_s = 45 - (time.monotonic() - dead_peer.began)
    await eventually(lost, within=max(5.0, left_s), describe="the dead peer's session is closed")
