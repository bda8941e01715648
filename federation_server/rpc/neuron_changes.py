"""What every change of a neuron by an admin begins and ends with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import neuron_pb2
from federation_server.live.notifier import hint_end
from federation_server.live.session import SessionEnd, Sessions
from federation_server.rpc import audit, errors
from federation_server.rpc.convert_heartbeat import heartbeat_to_proto
from federation_server.rpc.convert_neuron import neuron_to_proto
from federation_server.store import fleet, heartbeats, neurons, registration
from federation_server.store.registration import EndedSession, Standing


class SessionEnding:
    """Closes the streams of sessions that have been ended."""

    def __init__(self, sessions: Sessions, server_id: str) -> None:
        """`sessions` are those whose streams this server holds."""
        self._sessions = sessions
        self._server_id = server_id

    async def elsewhere(
        self,
        connection: AsyncConnection,
        neuron_id: str,
        ended: EndedSession | None,
        end: SessionEnd,
    ) -> None:
        """Has the server that holds the stream close it, if that is another one; when `connection`
        commits.
        """
        if ended is not None and ended.server_id != self._server_id:
            await hint_end(
                connection, ended.server_id, neuron_id, end, below_epoch=ended.next_epoch
            )

    def here(self, neuron_id: str, ended: EndedSession | None, end: SessionEnd) -> None:
        """Closes the stream if this server holds it, once that is committed. A session that the
        neuron has opened since is not meant.
        """
        session = self._sessions.get(neuron_id)
        if ended is not None and session is not None and session.epoch < ended.next_epoch:
            session.finish(end)


async def lock(connection: AsyncConnection, neuron_id: str) -> Standing:
    """How the neuron stands until the transaction ends.

    Raises:
        errors.Refused: NOT_FOUND.
    """
    standing = await registration.lock_neuron(connection, neuron_id)
    if standing is None:
        raise errors.neuron_not_found(neuron_id)
    return standing


@asynccontextmanager
async def recorded(connection: AsyncConnection, neuron_id: str) -> AsyncIterator[None]:
    """Puts into the audit log what the block changes of a locked neuron."""
    before = await fleet.described(connection, neuron_id)
    yield
    after = await fleet.described(connection, neuron_id)
    await audit.record(connection, "neuron", neuron_id, before, after)


async def shown(connection: AsyncConnection, neuron_id: str) -> neuron_pb2.Neuron:
    """The neuron with its last heartbeat.

    Raises:
        errors.Refused: NOT_FOUND.
    """
    record = await neurons.get(connection, neuron_id)
    if record is None:
        raise errors.neuron_not_found(neuron_id)
    last = None
    if record.last_heartbeat_time is not None:
        last = await heartbeats.get(connection, neuron_id, record.last_heartbeat_time)
    return neuron_to_proto(record, None if last is None else heartbeat_to_proto(last))
