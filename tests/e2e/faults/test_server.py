"""The server is killed, doubled, or told to end: what a neuron and an operator see of it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from federation.v1 import command_service_pb2, neuron_pb2
from tests.support.calls import ONLINE, shown
from tests.support.faults import (
    Postgres,
    calling,
    issue,
    load,
    presence,
    refused,
    report,
    serving,
    total,
)
from tests.support.federation import BareNeuron, Served, connected
from tests.support.plain_neuron import now
from tests.support.waiting import eventually

OFFLINE = neuron_pb2.PRESENCE_OFFLINE


async def test_a_server_killed_under_load_loses_nothing_and_shows_nobody_offline(
    folder: Path, doomed: Postgres
) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, load(served, "killed") as (under, names):
            token = await served.register("journal")
            neuron = BareNeuron(served, token)
            await neuron.hello()
            command = await issue(served, "journal")
            first = (await neuron.receive()).command
            assert (first.command_id, first.attempt) == (command.command_id, 1)
            server.kill()
            await asyncio.to_thread(server.start)
            seen: set[int] = set()
            again = BareNeuron(served, token)
            await again.hello()
            second = (await again.receive()).command
            assert (second.command_id, second.attempt) == (command.command_id, 1)

            async def all_online() -> bool:
                found = [await presence(served, each) for each in names]
                seen.update(found)
                return set(found) == {ONLINE}

            await eventually(all_online, describe="all are back")
            under.finish()
            await eventually(lambda: not under.waiting, within=20, describe="all is acknowledged")
            assert total(doomed, "killed") == under.sent
            assert OFFLINE not in seen
            again.call.cancel()


async def test_of_two_processes_with_one_id_on_two_servers_the_older_is_told_and_changes_nothing(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    with serving(doomed, folder) as other:
        async with calling(other) as elsewhere:
            token = await served.register("twin")
            older = BareNeuron(served, token)
            assert (await older.hello(spool_id="older")).epoch == 1
            newer = BareNeuron(elsewhere, token)
            assert (await newer.hello(spool_id="newer")).epoch == 2
            await newer.send(sequence=1, send_time=now(), analytics_report=report("twin", 1.0))
            codes = {grpc.StatusCode.ABORTED}
            try:
                late = report("twin", 100.0)
                await older.send(sequence=1, send_time=now(), analytics_report=late)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The end came while it wrote: grpc's client puts INTERNAL in the status's place.
                codes.add(grpc.StatusCode.INTERNAL)
            await newer.acked(1)
            code, _ = await older.end()
            assert code in codes
            assert total(doomed, "twin") == 1.0
            state = await shown(served, "twin")
            assert (state.presence, state.session.epoch) == (ONLINE, 2)
            newer.call.cancel()


def execute(served: Served, neuron_id: str) -> Any:
    return served.command.ExecuteCommand(
        command_service_pb2.ExecuteCommandRequest(
            command=command_service_pb2.CommandSpec(neuron_id=neuron_id, type="run")
        ),
        metadata=served.admin,
    )


async def test_sigterm_drains_streams_and_executions_in_order_and_in_time(
    folder: Path, doomed: Postgres
) -> None:
    # If the drain took all its time, nobody here would wait for it.
    with serving(doomed, folder, FEDERATION_DRAIN_TIMEOUT="PT5M") as server:
        async with calling(server) as served, connected(served, "drained") as neuron:
            following = execute(served, "drained")
            await following.read()
            assert (await neuron.receive()).HasField("command")
            await neuron.send(sequence=1, send_time=now(), analytics_report=report("drained"))
            await neuron.acked(1)
            # It reads already: gRPC may drop what comes together with the end to nobody's read.
            farewell = asyncio.create_task(neuron.receive())
            await asyncio.sleep(0)
            server.process.send_signal(signal.SIGTERM)
            assert (await farewell).HasField("reconnect")
            assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE

            async def to_its_end() -> None:
                while await following.read():
                    pass

            assert await refused(to_its_end()) == (grpc.StatusCode.UNAVAILABLE, True)
            assert await asyncio.to_thread(server.process.wait, 10) == 0
        found = doomed.ask("SELECT presence_reason FROM neuron_states WHERE neuron_id = 'drained'")
        assert found == "server stopped"


async def test_sigterm_ends_in_time_although_postgresql_hangs(
    folder: Path, doomed: Postgres
) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, connected(served, "hung") as neuron:
            await asyncio.to_thread(doomed.freeze)
            try:
                await neuron.send(sequence=1, send_time=now(), analytics_report=report("hung"))
                server.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(server.process.wait, 12) == 0
            finally:
                await asyncio.to_thread(doomed.thaw)


async def test_a_second_signal_ends_the_server_at_once(folder: Path, doomed: Postgres) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, connected(served, "twice"):
            await asyncio.to_thread(doomed.freeze)  # so that the drain takes its time
            try:
                server.process.send_signal(signal.SIGTERM)
                await eventually(lambda: "server_draining" in server.output, describe="it drains")
                server.process.send_signal(signal.SIGTERM)
                status = await asyncio.to_thread(server.process.wait, 10)
            finally:
                await asyncio.to_thread(doomed.thaw)
            assert status == -signal.SIGTERM
