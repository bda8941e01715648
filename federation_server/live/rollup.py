"""Adds metrics up by minute, hour and day, on one server at a time.

It is a task of its own, so that days of reports that come at once delay nobody's presence.
"""

from __future__ import annotations

import asyncio

import psycopg
import structlog

from federation_server.live.metrics import Metrics
from federation_server.live.turn import turn
from federation_server.store import presence
from federation_server.store.analytics import rollups
from federation_server.store.database import Database, bounded, first_line

log = structlog.get_logger(__name__)

ROLLUP_INTERVAL_S = 10.0
RETRY_INTERVAL_S = 5.0
CLOCK_TIMEOUT_S = 10.0
_LOCK = 0x6665_6472_6F6C  # "fedrol"


class Rollup:
    """Rolls up on one server at a time."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        """Rolls up nothing before `run`."""
        self._database = database
        self._metrics = metrics

    async def run(self) -> None:
        """Rolls up whenever it is this server's turn, until it is cancelled."""
        while True:
            try:
                await self._turn()
            except psycopg.Error as error:
                log.warning("rollup failed", action="rollup_retry", reason=first_line(error))
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _turn(self) -> None:
        """Rolls up as long as the connection that holds the lock lives."""
        async with turn(self._database, "rollup", _LOCK) as connection:
            while connection is not None:  # else it is another server's turn; `run` asks again
                with bounded(connection, CLOCK_TIMEOUT_S):
                    now = await presence.clock(connection)
                self._metrics.rollups.inc(await rollups.roll_up(connection, now))
                await asyncio.sleep(ROLLUP_INTERVAL_S)
