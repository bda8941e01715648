"""This server's lease, and with it the one place that knows whether PostgreSQL answers.

Every few seconds the lease is renewed. While that fails the database counts as away: health turns
NOT_SERVING, the metric says so, and admins' calls fail at once. On the same round the server looks
for sessions of its own that are no longer the newest, and whose ending hint was missed; and for
those that another server closed because this one's lease had ended, and whose streams are open.

With the lease the server publishes what it doubts of itself, and what it has learned here about
PostgreSQL is a part of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import psycopg
import structlog

from federation_server.domain.doubt import Cause
from federation_server.domain.neuron import Lifecycle
from federation_server.live.doubt import SelfDoubt
from federation_server.live.metrics import Metrics
from federation_server.live.pacing import Pacing
from federation_server.live.session import SessionEnd, Sessions
from federation_server.store import servers
from federation_server.store import sessions as session_store
from federation_server.store.database import (
    Connection,
    Database,
    OwnConnection,
    bounded,
    first_line,
)

log = structlog.get_logger(__name__)

RENEW_INTERVAL_S = 2.0
RENEW_TIMEOUT_S = 2.5
PROBE_INTERVAL_S = 0.5
"""How often a PostgreSQL that is away is asked whether it is back."""


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
        pacing: Pacing,
        doubt: SelfDoubt,
        on_change: DatabaseObserver,
        reopen: Callable[[str, int], None],
    ) -> None:
        """`on_change` is awaited whenever PostgreSQL begins or ceases to answer; `reopen` is called
        for each session (neuron_id, epoch) that is closed in the store and has an open stream.
        """
        self._database = database
        self._server_id = server_id
        self._version = version
        self._sessions = sessions
        self._pacing = pacing
        self._metrics = metrics
        self._doubt = doubt
        self._on_change = on_change
        self._reopen = reopen
        self._up: bool | None = None
        self._connection = OwnConnection(database, "lease")

    async def run(self) -> None:
        """Renews until it is cancelled."""
        while True:
            await self.renew()
            await asyncio.sleep(RENEW_INTERVAL_S if self._up else PROBE_INTERVAL_S)

    async def renew(self) -> None:
        """Renews once, and says whether PostgreSQL answered."""
        deadline = time.monotonic() + RENEW_TIMEOUT_S
        kept = self._connection.is_made
        try:
            try:
                await self._renew(deadline)
            except psycopg.Error:
                if not kept or time.monotonic() >= deadline:
                    raise
                # What ended is a connection that was made long ago, and not yet PostgreSQL.
                await self._renew(deadline)
        except (psycopg.Error, TimeoutError) as error:
            self._doubt.notice(Cause.DATABASE_LAG)
            await self._report(up=False, reason=first_line(error))
        else:
            await self._report(up=True, reason="")

    async def _renew(self, deadline: float) -> None:
        """Renews by the connection that is there, else by a new one; gives up one that fails."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                connection = await self._connection.get()
            with bounded(connection, deadline - time.monotonic()):
                interval = self._pacing.to_register()
                asked = time.monotonic()
                await servers.renew(
                    connection,
                    self._server_id,
                    self._version,
                    heartbeat_interval=interval,
                    doubt=self._doubt.look(),
                    sweeping=self._doubt.sweeping,
                )
                self._doubt.measured(Cause.DATABASE_LAG, time.monotonic() - asked)
                self._pacing.registered(interval)
                await self._compare_sessions(connection)
        except psycopg.Error:
            await self._connection.close()
            raise

    async def leave(self) -> None:
        """Takes the server out of the register; without PostgreSQL the lease just ends."""
        if not self._connection.is_made:
            return
        connection = await self._connection.get()
        try:
            with bounded(connection, RENEW_TIMEOUT_S):
                await servers.leave(connection, self._server_id)
        except psycopg.Error as error:
            log.warning("lease left to end", action="lease_left", reason=first_line(error))
        finally:
            await self._connection.close()

    async def _compare_sessions(self, connection: Connection) -> None:
        """Ends the sessions that are over, and opens those again that only seemed to be."""
        current = {session.neuron_id: session for session in self._sessions}
        asked = [(each.neuron_id, each.epoch, each.session_id) for each in current.values()]
        for stale in await session_store.stale(connection, asked):
            session = current[stale.neuron_id]
            if self._sessions.get(stale.neuron_id) is not session:
                continue
            if not stale.newest:
                session.finish(_why_over(stale))
            elif session.end is None:
                log.warning(
                    "session opened again: it was closed while this server seemed dead",
                    action="session_reopened",
                    neuron_id=session.neuron_id,
                    epoch=session.epoch,
                )
                self._reopen(session.neuron_id, session.epoch)

    async def _report(self, *, up: bool, reason: str) -> None:
        if up is self._up:
            return
        self._up = up
        self._metrics.database_up.set(up)
        if up:
            self._database.found()
            log.info("PostgreSQL answers", action="database_up")
        else:
            self._database.lost()
            log.error("PostgreSQL is away", action="database_down", reason=reason)
        await self._on_change(up=up)


def _why_over(stale: session_store.StaleSession) -> SessionEnd:
    """Why a session is over that is not its neuron's newest."""
    if stale.lifecycle is Lifecycle.DEACTIVATED:
        return SessionEnd.DEACTIVATED
    return SessionEnd.SUPERSEDED if stale.superseded else SessionEnd.REVOKED
