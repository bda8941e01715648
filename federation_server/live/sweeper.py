"""What has to happen although nobody asks: presence, commands' timers, partitions, retention.

One server sweeps at a time: the one that holds an advisory lock on a connection of its own. When
it dies PostgreSQL lets go of the lock, and the next one takes it.

A server that has just begun to sweep waits for `patience` before it marks anybody down, or ends a
command that a neuron has: after a restart, or an outage of PostgreSQL, the neurons need time to
come back, and their silence is not their fault. The same goes for one that is late: when the time
between two rounds is too long, by PostgreSQL's clock, this process or PostgreSQL stood still, and
heartbeats with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

import psycopg
import structlog

from federation_server.domain.neuron import Presence
from federation_server.live.metrics import Metrics
from federation_server.live.watchers import CommandWatchers
from federation_server.store import partitions, presence, servers
from federation_server.store.database import Connection, Database, bounded, first_line
from federation_server.store.ledger import leases, timers
from federation_server.store.ledger.changes import ChangedCommand

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 1.0
HOUSEKEEPING_INTERVAL_S = 60.0
LATE = timedelta(seconds=4)
"""How long after a round's beginning its verdicts may be reached, and the next one may begin."""

SWEEP_TIMEOUT_S = 30.0
RETRY_INTERVAL_S = 2.0
_LOCK = 0x6665_6473_7765  # "fedswe"


class Sweeper:
    """Sweeps on one server at a time."""

    def __init__(
        self,
        database: Database,
        server_id: str,
        metrics: Metrics,
        watchers: CommandWatchers,
        *,
        changed: Callable[[Sequence[ChangedCommand]], None],
        offline_after: timedelta,
        lost_after: timedelta,
        patience: timedelta,
        retention: Mapping[str, timedelta],
    ) -> None:
        """Sweeps nothing before `run`; `changed` is called with the commands that it has ended;
        `retention` says how long each partitioned table keeps what it has.
        """
        self._database = database
        self._server_id = server_id
        self._metrics = metrics
        self._watchers = watchers
        self._changed = changed
        self._offline_after = offline_after
        self._lost_after = lost_after
        self._patience_s = patience.total_seconds()
        self._retention = retention

    async def run(self) -> None:
        """Sweeps whenever it is this server's turn, until it is cancelled."""
        while True:
            try:
                await self._turn()
            except psycopg.Error as error:
                log.warning("sweep failed", action="sweeper_retry", reason=first_line(error))
            finally:
                self._metrics.sweeper_active.set(0)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _turn(self) -> None:
        """Sweeps as long as the connection that holds the lock lives; not at all without it."""
        async with await self._database.connect("sweeper") as connection:
            if not await self._locked(connection):
                return  # another server's turn; `run` asks again
            self._metrics.sweeper_active.set(1)
            log.info("sweeping", action="sweeper_active", patience_s=self._patience_s)
            began = time.monotonic()
            kept_house = -HOUSEKEEPING_INTERVAL_S
            due = presence.NEVER
            while True:
                with bounded(connection, SWEEP_TIMEOUT_S):
                    now = await presence.clock(connection)
                    if now > due:
                        log.warning("late: nobody is marked down for now", action="sweeper_late")
                        began = time.monotonic()
                    if time.monotonic() - kept_house >= HOUSEKEEPING_INTERVAL_S:
                        kept_house = time.monotonic()
                        await self._keep_house(connection)
                    if time.monotonic() - began >= self._patience_s:
                        await self._mark_down(connection, until=now + LATE)
                        await self._end_commands(connection, until=now + LATE)
                    await self._expire(connection)
                # From this round's beginning: a pause within it counts as well.
                due = now + LATE
                await asyncio.sleep(SWEEP_INTERVAL_S)

    async def _locked(self, connection: Connection) -> bool:
        cursor = await connection.execute(b"SELECT pg_try_advisory_lock(%s)", (_LOCK,))
        row = await cursor.fetchone()
        return row is not None and bool(row[0])

    async def _mark_down(self, connection: Connection, *, until: datetime) -> None:
        lost = await presence.close_lost_sessions(connection, until=until)
        if lost:
            log.warning("sessions of a lost server closed", action="presence_lost", sessions=lost)
        for neuron_id, now, reason in await presence.sweep(
            connection, offline_after=self._offline_after, until=until
        ):
            log.info(
                "neuron went down",
                action="presence_down",
                neuron_id=neuron_id,
                presence=now,
                reason=reason,
            )
        for kind, number in (await presence.count(connection)).items():
            self._metrics.neurons.labels(presence=Presence(kind).value).set(number)

    async def _end_commands(self, connection: Connection, *, until: datetime) -> None:
        """Ends what takes too long, or was lost. Who has to be told finds it by a scan."""
        own = self._server_id
        self._changed(await timers.time_out_late(connection, own, until=until))
        self._changed(await leases.end_expired(connection, own, until=until))
        self._changed(
            await timers.give_up_lost(connection, own, lost_after=self._lost_after, until=until)
        )

    async def _expire(self, connection: Connection) -> None:
        expired = await timers.expire(connection, self._server_id)
        self._watchers.wake(expired)
        if expired:
            self._metrics.commands_ended.labels(state="EXPIRED").inc(len(expired))

    async def _keep_house(self, connection: Connection) -> None:
        await partitions.ensure_ahead(connection)
        await servers.forget_dead(connection)
        today = await partitions.today(connection)
        for table, retention in self._retention.items():
            dropped = await partitions.drop_before(connection, table, today - retention)
            for partition in dropped:
                log.info("partition dropped", action="partition_dropped", partition=partition)
