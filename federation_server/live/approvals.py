"""Streams of neurons that wait for an admin's approval.

There are few of them, and they wait for hours: one question a second for all of them is enough.
"""

from __future__ import annotations

import asyncio

import psycopg
import structlog

from federation_server.store import applications
from federation_server.store.database import Database, OwnConnection, bounded, first_line

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
MOST_WAITING = 1000
"""How many streams one server lets wait."""


class Approvals:
    """Tells streams when their neurons have been approved or rejected."""

    def __init__(self, database: Database) -> None:
        """Asks nothing before `run`."""
        self._connection = OwnConnection(database, "approvals")
        self._waiting: dict[asyncio.Future[None], str] = {}
        self._wake = asyncio.Event()
        self._closed = False

    async def wait(self, neuron_id: str) -> bool:
        """Waits until the neuron is no longer PENDING; False at once if it cannot wait here: too
        many do, or the server stops.
        """
        if self._closed or len(self._waiting) >= MOST_WAITING:
            return False
        decided: asyncio.Future[None] = asyncio.Future()
        self._waiting[decided] = neuron_id
        self._wake.set()
        try:
            await decided
        finally:
            del self._waiting[decided]
        return not self._closed

    def close(self) -> None:
        """Sends all who wait away, and whoever comes."""
        self._closed = True
        for decided in self._waiting:
            if not decided.done():
                decided.set_result(None)

    async def run(self) -> None:
        """Asks until it is cancelled."""
        try:
            while True:
                await self._wake.wait()
                if not self._waiting:
                    self._wake.clear()
                    continue
                await self._ask()
                await asyncio.sleep(INTERVAL_S)
        finally:
            await self._connection.close()

    async def _ask(self) -> None:
        waiting = dict(self._waiting)
        try:
            connection = await self._connection.get()
            with bounded(connection, TIMEOUT_S):
                pending = await applications.still_pending(connection, list(waiting.values()))
        except psycopg.Error as error:
            await self._connection.close()
            log.warning("approvals not seen", action="approvals_retry", reason=first_line(error))
            return
        for decided, neuron_id in waiting.items():
            if neuron_id not in pending and not decided.done():
                decided.set_result(None)
