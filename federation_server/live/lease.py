"""This server's lease, and with it the one place that knows whether PostgreSQL answers.

Every few seconds the lease is renewed. While that fails the database counts as away: health turns
NOT_SERVING, and the metric says so. On the same round the server looks for sessions of its own
that are no longer the newest, and whose ending hint was missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

import psycopg
import structlog
from sqlalchemy.exc import DBAPIError

from federation_server.domain.neuron import Lifecycle
from federation_server.live.metrics import Metrics
from federation_server.live.session import SessionEnd, Sessions
from federation_server.store import servers
from federation_server.store import sessions as session_store
from federation_server.store.database import Connection, Database, first_line

log = structlog.get_logger(__name__)

RENEW_INTERVAL_S = 2.0
RENEW_TIMEOUT_S = 3.0


class DatabaseObserver(Protocol):
    """Is told when PostgreSQL comes and goes."""

    def __call__(self, *, up: bool) -> Awaitable[None]:
        """PostgreSQL answers, or does not any more."""


class Lease:
    """Keeps the server in the register and watches over the database."""

    def __init__(
        self,
        database: Database,
        server_id: str,
        version: str,
        sessions: Sessions,
        metrics: Metrics,
        *,
        on_change: DatabaseObserver,
    ) -> None:
        """`on_change` is awaited whenever PostgreSQL begins or ceases to answer."""
        self._database = database
        self._server_id = server_id
        self._version = version
        self._sessions = sessions
        self._metrics = metrics
        self._on_change = on_change
        self._up: bool | None = None
        self._connection: Connection | None = None

    async def run(self) -> None:
        """Renews until it is cancelled."""
        while True:
            await self.renew()
            await asyncio.sleep(RENEW_INTERVAL_S)

    async def renew(self) -> None:
        """Renews once, and says whether PostgreSQL answered."""
        try:
            async with asyncio.timeout(RENEW_TIMEOUT_S):
                if self._connection is None:
                    self._connection = await self._database.connect("lease")
                await servers.renew(self._connection, self._server_id, self._version)
                await self._end_stale_sessions()
        except (psycopg.Error, DBAPIError, TimeoutError) as error:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()
            await self._report(up=False, reason=first_line(error))
        else:
            await self._report(up=True, reason="")

    async def leave(self) -> None:
        """Takes the server out of the register; without PostgreSQL the lease just ends."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            async with asyncio.timeout(RENEW_TIMEOUT_S):
                await servers.leave(connection, self._server_id)
        except (psycopg.Error, TimeoutError) as error:
            log.warning("lease left to end", action="lease_left", reason=first_line(error))
        finally:
            await connection.close()

    async def _end_stale_sessions(self) -> None:
        current = [(session.neuron_id, session.epoch) for session in self._sessions]
        async with self._database.begin() as connection:
            stale = await session_store.stale(connection, current)
        for neuron_id, lifecycle in stale:
            match lifecycle:
                case None:
                    end = SessionEnd.REVOKED
                case Lifecycle.DEACTIVATED:
                    end = SessionEnd.DEACTIVATED
                case _:
                    end = SessionEnd.SUPERSEDED
            epoch = dict(current)[neuron_id]
            session = self._sessions.get(neuron_id)
            if session is not None and session.epoch == epoch:
                session.finish(end)

    async def _report(self, *, up: bool, reason: str) -> None:
        if up is self._up:
            return
        self._up = up
        self._metrics.database_up.set(up)
        if up:
            log.info("PostgreSQL answers", action="database_up")
        else:
            log.error("PostgreSQL is away", action="database_down", reason=reason)
        await self._on_change(up=up)
