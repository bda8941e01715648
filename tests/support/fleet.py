"""Fleets for tests: neurons in any state, heartbeats, live sessions, and a served FleetService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeAlias

from sqlalchemy import update

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import fleet_service_pb2_grpc as pb_grpc
from federation.v1 import neuron_pb2
from federation_server.live.session import Session, Sessions
from federation_server.rpc.fleet import FleetServicer
from federation_server.rpc.neuron_changes import SessionEnding
from federation_server.store import ingest, partitions
from federation_server.store.database import Connection, Database
from federation_server.store.schema import neuron_states, neurons
from tests.support.neurons import heartbeat, open_session, put_neuron
from tests.support.servers import serving

Fleet: TypeAlias = "pb_grpc.FleetServiceAsyncStub"  # a name for type checkers only

HERE = "server-here"
ELSEWHERE = "server-elsewhere"


@asynccontextmanager
async def migrated(url: str) -> AsyncIterator[Database]:
    """A database with the partitions that a running server has made."""
    database = Database(url)
    async with await database.connect("test") as connection:
        await partitions.ensure_ahead(connection)
    yield database
    await database.close()


@asynccontextmanager
async def serving_fleet(database: Database, sessions: Sessions) -> AsyncIterator[Fleet]:
    """FleetService, served by the server HERE, which holds those sessions."""
    servicer = FleetServicer(database, SessionEnding(sessions, HERE))
    async with serving(
        lambda server: pb_grpc.add_FleetServiceServicer_to_server(servicer, server)
    ) as channel:
        yield pb_grpc.FleetServiceStub(channel)


async def put(database: Database, neuron_id: str, **fields: Any) -> None:
    """A neuron; `fields` of its row or its state are set as said."""
    async with database.begin() as connection:
        await put_neuron(connection, neuron_id, type=fields.pop("type", "worker"))
        for table in (neurons, neuron_states):
            said = {name: value for name, value in fields.items() if name in table.c}
            if said:
                await connection.execute(
                    update(table).where(table.c.neuron_id == neuron_id).values(said)
                )


async def beat(writer: Connection, neuron_id: str, epoch: int = 0, **said: Any) -> ingest.Outcome:
    """A heartbeat of the neuron, written as the server writes it."""
    item = ingest.HeartbeatItem(neuron_id, epoch, "instance-1", heartbeat(**said))
    return await ingest.apply(writer, [item], [], [], oldest_point=timedelta(days=1))


async def get(fleet: Fleet, neuron_id: str) -> neuron_pb2.Neuron:
    return (await fleet.GetNeuron(pb.GetNeuronRequest(neuron_id=neuron_id))).neuron


async def live(
    database: Database, sessions: Sessions | None, neuron_id: str, server_id: str = HERE
) -> Session:
    """A session of the neuron, whose stream is held by the server that has those sessions."""
    opened = await open_session(database, neuron_id, server_id=server_id)
    session = Session(
        neuron_id=neuron_id,
        epoch=opened.epoch,
        session_id="s",
        instance_id="instance-1",
        spool_id="spool-1",
    )
    if sessions is not None:
        sessions.add(session)
    return session
