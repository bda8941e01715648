"""What has to happen although nobody asks: presence and commands' timers, on one server at a time.

A server that is in doubt of itself (`domain/doubt.py`) marks nobody down, and ends no command
that a neuron has: after a restart, an outage of PostgreSQL, or a pause of its own, the neurons need
time to be heard, and their silence is not their fault. The neurons of another server that is in
doubt are left alone, and those whose streams were lost all at once have more time to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import psycopg
import structlog

from federation_server.domain.doubt import MASS_LEAST, Cause, Loss, MassDisconnects
from federation_server.domain.neuron import Presence
from federation_server.live.doubt import SelfDoubt
from federation_server.live.metrics import Metrics
from federation_server.live.turn import turn
from federation_server.live.watchers import CommandWatchers
from federation_server.store import presence, servers
from federation_server.store.database import Connection, Database, bounded, first_line
from federation_server.store.ledger import leases, timers
from federation_server.store.ledger.changes import ChangedCommand

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 1.0
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
        doubt: SelfDoubt,
        changed: Callable[[Sequence[ChangedCommand]], None],
        offline_after: timedelta,
        mass_offline_after: timedelta,
        patience: timedelta,
        lost_after: timedelta,
    ) -> None:
        """Sweeps nothing before `run`; `changed` is called with the commands that it has ended;
        `patience` is the doubt's.
        """
        self._database = database
        self._server_id = server_id
        self._metrics = metrics
        self._watchers = watchers
        self._changed = changed
        self._doubt = doubt
        self._offline_after = offline_after
        self._mass_offline_after = mass_offline_after
        self._masses = MassDisconnects(patience, mass_offline_after)
        self._lost_after = lost_after

    async def run(self) -> None:
        """Sweeps whenever it is this server's turn, until it is cancelled."""
        while True:
            try:
                await self._turn()
            except psycopg.Error as error:
                self._doubt.notice(Cause.DATABASE_LAG)
                log.warning("sweep failed", action="sweeper_retry", reason=first_line(error))
            finally:
                self._doubt.sweeping = False
                self._metrics.sweeper_active.set(0)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def _turn(self) -> None:
        """Sweeps as long as the connection that holds the lock lives; not at all without it."""
        async with turn(self._database, "sweeper", _LOCK) as connection:
            if connection is None:
                return  # another server's turn; `run` asks again
            self._metrics.sweeper_active.set(1)
            self._doubt.sweeping = True
            self._doubt.notice(Cause.JUST_STARTED)
            log.info("sweeping", action="sweeper_active")
            due = presence.NEVER
            while True:
                with bounded(connection, SWEEP_TIMEOUT_S):
                    now = await self._clock(connection, due=due)
                    await self._judge(connection, now)
                    await self._expire(connection)
                # From this round's beginning: a pause within it counts as well.
                due = now + LATE
                await asyncio.sleep(SWEEP_INTERVAL_S)

    async def _clock(self, connection: Connection, *, due: datetime) -> datetime:
        """PostgreSQL's time. If it is late, or its answer, it or this process stood still."""
        asked = time.monotonic()
        now = await presence.clock(connection)
        self._doubt.measured(Cause.DATABASE_LAG, time.monotonic() - asked)
        if now > due:
            self._doubt.notice(Cause.DATABASE_LAG)
        return now

    async def _judge(self, connection: Connection, now: datetime) -> None:
        """Marks neurons down and ends what they have, as far as this server may trust itself."""
        losses = self._masses.take(await self._losses(connection), now)
        if losses:
            self._doubt.notice(Cause.MASS_DISCONNECT)
        else:
            self._doubt.lift(Cause.MASS_DISCONNECT)
        spared = await servers.doubtful(connection, self._server_id)
        until = now + LATE
        if not self._doubt.frozen():
            await self._mark_down(connection, spared=spared, losses=losses, until=until)
        if not self._doubt.frozen():
            await self._end_commands(connection, spared=spared, until=until)

    async def _losses(self, connection: Connection) -> Sequence[Loss]:
        """The streams that were lost together, looked for if there may be so many."""
        counts = await presence.count(connection)
        for kind, number in counts.items():
            self._metrics.neurons.labels(presence=kind.value).set(number)
        if counts[Presence.SUSPECT] < MASS_LEAST:
            return []
        return await presence.losses(connection, newer_than=self._mass_offline_after)

    async def _mark_down(
        self,
        connection: Connection,
        *,
        spared: Sequence[str],
        losses: Sequence[Loss],
        until: datetime,
    ) -> None:
        lost = await presence.close_lost_sessions(connection, until=until)
        if lost:
            log.warning("sessions of a lost server closed", action="presence_lost", sessions=lost)
        for neuron_id, now, reason in await presence.sweep(
            connection,
            offline_after=self._offline_after,
            spared=spared,
            losses=losses,
            mass_offline_after=self._mass_offline_after,
            until=until,
        ):
            log.info(
                "neuron went down",
                action="presence_down",
                neuron_id=neuron_id,
                presence=now,
                reason=reason,
            )

    async def _end_commands(
        self, connection: Connection, *, spared: Sequence[str], until: datetime
    ) -> None:
        """Ends what takes too long, or was lost. Who has to be told finds it by a scan."""
        own = self._server_id
        self._changed(await timers.time_out_late(connection, own, spared=spared, until=until))
        self._changed(await leases.end_expired(connection, own, until=until))
        self._changed(
            await timers.give_up_lost(
                connection, own, lost_after=self._lost_after, spared=spared, until=until
            )
        )

    async def _expire(self, connection: Connection) -> None:
        expired = await timers.expire(connection, self._server_id)
        self._watchers.wake(expired)
        if expired:
            self._metrics.commands_ended.labels(state="EXPIRED").inc(len(expired))
