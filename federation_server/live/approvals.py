"""Streams of neurons that wait for an admin's approval.

There are few of them, and they wait for hours: one question a second for all of them is enough.
Of each neuron the newest stream waits, so that nobody takes more than one place.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

import psycopg
import structlog

from federation_server.store import applications
from federation_server.store.database import Database, OwnConnection, bounded, first_line

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
MOST_WAITING = 1000
"""How many streams one server lets wait."""


class Waited(Enum):
    """How a stream's wait has ended."""

    DECIDED = "DECIDED"
    """Its neuron was approved, rejected or forgotten, or its token revoked: it is to look."""
    SUPERSEDED = "SUPERSEDED"
    """A newer stream of its neuron waits."""
    TURNED_AWAY = "TURNED_AWAY"
    """It cannot wait here: too many do, or the server stops."""


@dataclass(eq=False, slots=True)
class _Waiter:
    generation: int
    over: asyncio.Future[Waited] = field(default_factory=asyncio.Future)

    def end(self, how: Waited) -> None:
        if not self.over.done():
            self.over.set_result(how)


class Approvals:
    """Tells streams when their neurons have been approved or rejected, or may wait no more."""

    def __init__(self, database: Database) -> None:
        """Asks nothing before `run`."""
        self._connection = OwnConnection(database, "approvals")
        self._waiting: dict[str, _Waiter] = {}
        self._wake = asyncio.Event()
        self._closed = False

    async def wait(self, neuron_id: str, generation: int) -> Waited:
        """Waits for as long as the neuron is PENDING and tokens of that generation are good."""
        before = self._waiting.get(neuron_id)
        if self._closed or (before is None and len(self._waiting) >= MOST_WAITING):
            return Waited.TURNED_AWAY
        if before is not None:
            before.end(Waited.SUPERSEDED)
        waiter = self._waiting[neuron_id] = _Waiter(generation)
        self._wake.set()
        try:
            return await waiter.over
        finally:
            if self._waiting.get(neuron_id) is waiter:
                del self._waiting[neuron_id]

    def close(self) -> None:
        """Sends all who wait away, and whoever comes."""
        self._closed = True
        for waiter in self._waiting.values():
            waiter.end(Waited.TURNED_AWAY)

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
                generations = {neuron_id: each.generation for neuron_id, each in waiting.items()}
                pending = await applications.still_pending(connection, generations)
        except psycopg.Error as error:
            await self._connection.close()
            log.warning("approvals not seen", action="approvals_retry", reason=first_line(error))
            return
        for neuron_id, waiter in waiting.items():
            if neuron_id not in pending:
                waiter.end(Waited.DECIDED)
