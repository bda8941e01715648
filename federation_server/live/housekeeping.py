"""Makes room for what is to come and drops what is too old, on one server at a time.

As the sweeper and the rollup it is a task of its own: whoever reads a partition that is to be
dropped, be it for an hour, delays nothing but that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import timedelta

import psycopg
import structlog

from federation_server.live.turn import turn
from federation_server.store import applications, leftovers, partitions, servers
from federation_server.store.database import Connection, Database, bounded, first_line

log = structlog.get_logger(__name__)

INTERVAL_S = 60.0
RETRY_INTERVAL_S = 5.0
FORGET_INTERVAL_S = 3600.0
TIMEOUT_S = 60.0
_LOCK = 0x6665_6468_6F75  # "fedhou"


class Housekeeping:
    """Keeps house on one server at a time."""

    def __init__(
        self, database: Database, retention: Mapping[str, timedelta], *, pending: timedelta
    ) -> None:
        """Does nothing before `run`; `retention` says how long each partitioned table keeps what
        it has, `pending` how long a neuron waits for its approval.
        """
        self._database = database
        self._pending = pending
        self._retention = retention
        self._forget_at = 0.0

    async def run(self) -> None:
        """Keeps house whenever it is this server's turn, until it is cancelled."""
        while True:
            try:
                await self._turn()
            except psycopg.Error as error:
                log.warning(
                    "housekeeping failed", action="housekeeping_retry", reason=first_line(error)
                )
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _turn(self) -> None:
        async with turn(self._database, "housekeeping", _LOCK) as connection:
            while connection is not None:
                with bounded(connection, TIMEOUT_S):
                    await self._keep_house(connection)
                await asyncio.sleep(INTERVAL_S)

    async def _keep_house(self, connection: Connection) -> None:
        await partitions.ensure_ahead(connection)
        await servers.forget_dead(connection)
        today = await partitions.today(connection)
        for table, retention in self._retention.items():
            dropped, left = await partitions.drop_before(connection, table, today - retention)
            for partition in dropped:
                log.info("partition dropped", action="partition_dropped", partition=partition)
            for partition in left:
                log.warning(
                    "partition kept: somebody reads the table; dropped as soon as nobody does",
                    action="partition_busy",
                    partition=partition,
                )
        for neuron_id in await applications.forget(connection, self._pending):
            log.info("nobody approved it", action="pending_forgotten", neuron_id=neuron_id)
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + FORGET_INTERVAL_S
            await leftovers.forget(connection, longest=max(self._retention.values()))
