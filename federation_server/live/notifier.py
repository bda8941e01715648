"""Hints between server processes, by PostgreSQL's LISTEN and NOTIFY.

Each server listens on a channel of its own. A hint says that something may have to be done now;
it carries no truth. What a hint misses, the dispatcher's and the sweeper's scans find, and a
listener that has just (re)connected calls `missed` so that everything is looked at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import psycopg
import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.live.session import SessionEnd, Sessions
from federation_server.store.database import Database, first_line
from federation_server.store.pipeline import Pipeline

log = structlog.get_logger(__name__)

RETRY_INTERVAL_S = 1.0


def channel(server_id: str) -> str:
    """The name of a server's channel."""
    return f"federation_{server_id}"


async def hint_dispatch(connection: AsyncConnection, server_id: str, neuron_id: str) -> None:
    """Tells a server that a command waits for a neuron of its; sent when `connection` commits."""
    await _notify(connection, server_id, f"dispatch {neuron_id}")


_HINTS = b"""
SELECT pg_notify(channel, hint) FROM unnest($1::text[], $2::text[]) AS b (channel, hint)
"""


def send_hints(send: Pipeline, neurons: Sequence[tuple[str, str]]) -> None:
    """Tells servers that commands wait for neurons (neuron_id, server_id) of theirs, when the
    transaction is committed.
    """
    channels = [channel(server_id) for _, server_id in neurons]
    send(_HINTS, channels, [f"dispatch {neuron_id}" for neuron_id, _ in neurons])


def send_end_hints(send: Pipeline, sessions: Sequence[tuple[str, str, int]]) -> None:
    """Tells servers to end sessions of theirs (server_id, neuron_id, epoch of the new one) that are
    superseded, when the transaction is committed.
    """
    if sessions:
        send(
            _HINTS,
            [channel(server_id) for server_id, _, _ in sessions],
            [_end(SessionEnd.SUPERSEDED, epoch, neuron_id) for _, neuron_id, epoch in sessions],
        )


async def hint_end(
    connection: AsyncConnection,
    server_id: str,
    neuron_id: str,
    end: SessionEnd,
    *,
    below_epoch: int = 2**63,
) -> None:
    """Tells a server to end a neuron's stream if its epoch is below that one; sent when
    `connection` commits.
    """
    await _notify(connection, server_id, _end(end, below_epoch, neuron_id))


def _end(end: SessionEnd, below_epoch: int, neuron_id: str) -> str:
    return f"end:{end}:{below_epoch} {neuron_id}"


async def _notify(connection: AsyncConnection, server_id: str, payload: str) -> None:
    await connection.execute(select(func.pg_notify(channel(server_id), payload)))


class Notifier:
    """Listens on this server's channel and hands each hint to whom it concerns."""

    def __init__(
        self,
        database: Database,
        server_id: str,
        sessions: Sessions,
        *,
        dispatch: Callable[[str], None],
        missed: Callable[[], None],
    ) -> None:
        """`dispatch` is called with a neuron_id, `missed` after each (re)connect."""
        self._database = database
        self._channel = channel(server_id)
        self._sessions = sessions
        self._dispatch = dispatch
        self._missed = missed

    async def run(self) -> None:
        """Listens until it is cancelled, through every outage of PostgreSQL."""
        while True:
            try:
                await self._listen()
            except psycopg.Error as error:
                log.warning("listener lost", action="notifier_lost", reason=first_line(error))
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _listen(self) -> None:
        connection = await self._database.connect("listener")
        async with connection:
            await connection.execute(f'LISTEN "{self._channel}"'.encode())
            self._missed()
            async for notification in connection.notifies():
                self._take(notification.payload)

    def _take(self, payload: str) -> None:
        kind, _, neuron_id = payload.partition(" ")
        try:
            if kind == "dispatch":
                self._dispatch(neuron_id)
                return
            end, below_epoch = kind.removeprefix("end:").split(":")
            over, below = SessionEnd(end), int(below_epoch)
        except ValueError:  # a newer server's
            log.warning("unknown hint", action="notifier_unknown", kind=kind)
            return
        session = self._sessions.get(neuron_id)
        if session is not None and session.epoch < below:
            session.finish(over)
