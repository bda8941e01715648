"""The one place where what neurons send becomes durable: a group commit.

Stream readers hand in heartbeats, durable messages and ended sessions without waiting; the
writer's one task takes all that waits and applies it in one transaction (`store/ingest.py`),
then acknowledges. One flush is under way at a time, so load itself makes the batches larger.

    heartbeat ──▶ newest of each neuron ─┐
    durable ────▶ in order of arrival ───┼─▶ one transaction ─▶ acknowledgements, watchers
    closed ─────▶ in order ──────────────┘

Heartbeats and reports may wait for `flush_interval`. What somebody waits for starts a flush at
once: a command's end, a closed session, a call without a stream (`hurry`); a command's steps before
its end wait a moment for each other. While PostgreSQL is away nothing is lost: heartbeats coalesce
to the newest of each neuron, durable messages wait unacknowledged up to a bound, and beyond it the
readers wait (`room`). What has gathered meanwhile is written in transactions of bounded size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta

import psycopg
import structlog

from federation_server.domain.analytics import AnalyticsReport
from federation_server.domain.command import CommandUpdate, Finished
from federation_server.domain.retry import Backoff
from federation_server.live.batch import Batch, Sender
from federation_server.live.metrics import Metrics
from federation_server.store import ingest, partitions
from federation_server.store.database import (
    Database,
    OwnConnection,
    bounded,
    first_line,
)
from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem, Outcome
from federation_server.store.ledger.changes import ChangedCommand
from federation_server.store.ledger.following import Followed, News

log = structlog.get_logger(__name__)

CAPACITY_BYTES = 16 * 1024 * 1024
"""How much durable data may wait, as large as it was on the wire, before the readers do. In memory
small messages take some twelve times as much."""

FLUSH_BYTES = 2 * 1024 * 1024
"""How much durable data one transaction takes, so that it ends well within FLUSH_TIMEOUT_S. A
single message may be larger."""

FLUSH_TIMEOUT_S = 15.0
"""How long one transaction may take before its connection is given up."""


STEP_INTERVAL_S = 0.004
"""How long a command's step waits for the next one: a short command is accepted, runs and ends in
one flush in place of three."""

_FAULTS_OF_AN_ITEM = (
    psycopg.DataError,
    psycopg.IntegrityError,
    # A value too large for an index. The class counts as an OperationalError, but repeating the
    # batch would fail for ever.
    psycopg.errors.ProgramLimitExceeded,
)
"""PostgreSQL's errors that a single item of a batch is to blame for. Every other one may be over at
the next try: a broken connection, a full disk, a standby that takes no writes."""

_MESSAGE = {AnalyticsReport: "analytics_report", CommandUpdate: "command_update"}


class Writer:
    """Applies what neurons send, in batches, and says when it is durable."""

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        *,
        flush_interval: timedelta,
        oldest_point: timedelta,
        changed: Callable[[Sequence[ChangedCommand], Mapping[str, News | None]], None],
        followed: Followed,
    ) -> None:
        """`changed` is called with the commands that a committed batch has changed, and with what
        is new of those that are `followed`.
        """
        self._metrics = metrics
        self._flush_interval_s = flush_interval.total_seconds()
        self._oldest_point = oldest_point
        self._changed = changed
        self._followed = followed
        self._waiting = Batch()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._hurried = asyncio.Event()
        self._soon: float | None = None
        self._waiting_since: float | None = None
        self._taken_since: float | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._partitions_made = False
        self._backoff = Backoff(first_s=0.1, most_s=2.0)
        self._connection = OwnConnection(database, "writer")

    def heartbeat(self, sender: Sender, item: HeartbeatItem) -> bool:
        """Takes a neuron's newest heartbeat; an older one that still waits is dropped. Says whether
        there was one, that is, whether the neuron sends faster than is written.
        """
        self._wake.set()
        return self._waiting.beat(sender, item)

    def durable(self, sender: Sender, item: DurableItem, size_bytes: int) -> None:
        """Takes a durable message. Who sends more should await `room` before, or look whether the
        writer is `full`.
        """
        self._waiting.durables.append((sender, item, size_bytes))
        self._waiting_bytes += size_bytes
        if self._waiting_bytes > CAPACITY_BYTES:
            self._room.clear()
        self._idle.clear()
        self._wake.set()
        if isinstance(item.payload, CommandUpdate):
            if isinstance(item.payload.change, Finished):
                self.hurry()
            else:
                self._hurry_soon()
        elif self._waiting_bytes > FLUSH_BYTES:
            self.hurry()

    def reopen(self, neuron_id: str, epoch: int) -> None:
        """Takes that a session's stream is open, although the store may have it as closed."""
        self._waiting.reopened.append((neuron_id, epoch))
        self.hurry()

    def close(self, item: ClosedItem) -> None:
        """Takes the end of a session; what it sent before is written before."""
        self._waiting.closed.append(item)
        self.hurry()

    def hurry(self) -> None:
        """Starts a flush at once, for a sender that waits for its own."""
        self._idle.clear()
        self._urgent.set()
        self._hurried.set()
        self._wake.set()

    @property
    def full(self) -> bool:
        """There is no `room`."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Waits until less than the bound waits to be written."""
        await self._room.wait()

    def lag(self) -> float:
        """For how many seconds the oldest of what is not committed has waited, beyond the
        `flush_interval` that it may. Noted where the writer wakes and takes, and so perhaps a
        little too much: it costs nothing per item.
        """
        since = self._waiting_since if self._taken_since is None else self._taken_since
        if since is None:
            return 0.0
        return max(0.0, time.monotonic() - since - self._flush_interval_s)

    async def settled(self) -> None:
        """Waits until everything that was handed in is committed."""
        await self._idle.wait()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        try:
            while True:
                await self._wake.wait()
                if self._waiting_since is None:
                    self._waiting_since = time.monotonic()
                await self._linger()
                await self._flush(self._take())
        finally:
            await self._connection.close()

    async def stop(self, *, within: timedelta) -> bool:
        """Writes what still waits, in bounded time; says whether all of it is committed."""
        self._stopping = True
        if len(self._waiting):
            self.hurry()
        self._urgent.set()
        try:
            async with asyncio.timeout(within.total_seconds()):
                await self.settled()
        except TimeoutError:
            log.error(
                "stopped with unwritten data",
                action="writer_abandoned",
                items=len(self._waiting),
            )
            return False
        return True

    def _hurry_soon(self) -> None:
        """For a step of a command: the next one, or its end, may follow at once, and shares the
        flush.
        """
        if self._soon is None:
            self._soon = asyncio.get_running_loop().time() + STEP_INTERVAL_S
        self._hurried.set()

    async def _linger(self) -> None:
        """Lets heartbeats gather, unless something urgent waits; and what is soon followed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._flush_interval_s
        while not self._urgent.is_set():
            if self._soon is not None:
                end = min(end, self._soon)
            self._hurried.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._hurried.wait()
            except TimeoutError:
                break
        self._soon = None

    def _take(self) -> Batch:
        batch = self._waiting
        self._waiting = batch.split(FLUSH_BYTES)
        self._taken_since = self._waiting_since
        self._idle.clear()
        if not len(self._waiting):
            self._waiting_since = time.monotonic()  # what comes from now on is younger
            self._wake.clear()
            if not self._stopping:
                self._urgent.clear()
        return batch

    async def _flush(self, batch: Batch) -> None:
        """Commits a batch, or puts it back and waits a little while PostgreSQL is away."""
        try:
            await self._commit(batch)
        except psycopg.Error as error:
            self._waiting = batch.before(self._waiting)
            self._waiting_since = self._taken_since
            self._wake.set()
            await self._connection.close()
            delay_s = self._backoff.next_s()
            self._metrics.flush_failures.inc()
            log.warning(
                "flush failed, will be repeated",
                action="writer_retry",
                reason=first_line(error),
                retry_s=round(delay_s, 2),
                items=len(self._waiting),
            )
            await asyncio.sleep(delay_s)
            return
        self._taken_since = None
        self._backoff.reset()
        self._waiting_bytes -= batch.bytes
        if self._waiting_bytes <= CAPACITY_BYTES:
            self._room.set()
        if not len(self._waiting):
            self._waiting_since = None
            self._idle.set()

    async def _commit(self, batch: Batch) -> None:
        """Commits a batch; what the database will not take is refused to its sender alone.

        Raises:
            psycopg.Error: PostgreSQL is away, or will not write now; parts of the batch may be
                committed, and committing them again has no effect.
        """
        started = time.monotonic()
        try:
            outcome = await self._apply(batch)
        except psycopg.errors.CheckViolation as error:
            no_partition = error.diag.constraint_name is None
            if no_partition and not self._partitions_made:
                await self._make_partitions()
                await self._commit(batch)
            else:
                await self._isolate(batch, error)
            return
        except psycopg.Error as error:
            if not isinstance(error, _FAULTS_OF_AN_ITEM):
                raise
            await self._isolate(batch, error)
            return
        except Exception as error:  # noqa: BLE001 - an item that Python's side cannot adapt
            await self._isolate(batch, error)
            return
        self._partitions_made = False
        self._metrics.flush_seconds.observe(time.monotonic() - started)
        self._metrics.flush_items.observe(len(batch))
        self._metrics.heartbeats.inc(len(batch.heartbeats))
        self._finish(batch, outcome)

    async def _apply(self, batch: Batch) -> Outcome:
        connection = await self._connection.get()
        with bounded(connection, FLUSH_TIMEOUT_S):
            return await ingest.apply(
                connection,
                [item for _, item in batch.heartbeats.values()],
                [item for _, item, _ in batch.durables],
                batch.closed,
                reopened=batch.reopened,
                oldest_point=self._oldest_point,
                followed=self._followed,
            )

    async def _isolate(self, batch: Batch, error: Exception) -> None:
        """Commits all of a batch but the item that spoils it, by bisecting."""
        if len(batch) > 1:
            for half in batch.halves():
                if len(half):
                    await self._commit(half)
            return
        log.warning(
            "refused by the database",
            action="writer_refused",
            reason=first_line(error),
            exc_info=None if isinstance(error, psycopg.Error) else error,
            neurons=sorted({*batch.heartbeats, *(item.neuron_id for _, item, _ in batch.durables)}),
        )
        self._metrics.refused.inc()
        for sender, _ in batch.heartbeats.values():
            sender.refused(0, "heartbeat")
        for sender, item, size_bytes in batch.durables:
            if item.payload is None:
                return  # a mark that cannot be moved stays where it is
            sender.refused(item.sequence, _MESSAGE[type(item.payload)])
            # The mark moves past it all the same: sending it again would not help.
            empty = Batch(durables=[(sender, item._replace(payload=None), size_bytes)])
            await self._commit(empty)

    def _finish(self, batch: Batch, outcome: Outcome) -> None:
        """Tells the senders and the watchers what a committed batch has done."""
        told: set[int] = set()
        for sender, item, _ in batch.durables:
            if id(sender) in told:
                continue
            told.add(id(sender))
            if (item.neuron_id, item.epoch) in outcome.fenced:
                sender.fenced()
            else:
                sender.stored(outcome.marks[item.neuron_id, item.spool_id], outcome.time)
        for sender, beat in batch.heartbeats.values():
            if outcome.fenced and (beat.neuron_id, beat.epoch) in outcome.fenced:
                sender.fenced()
            else:
                sender.stored(0, outcome.time)
        for sender in batch.replaced:
            sender.stored(0, outcome.time)
        if outcome.changed:
            self._changed(outcome.changed, outcome.news)

    async def _make_partitions(self) -> None:
        """Makes the partitions that late reports, or a clock that jumped, need."""
        connection = await self._connection.get()
        day: date = await partitions.today(connection)
        days = [
            day + timedelta(days=offset)
            for offset in range(-self._oldest_point.days - 1, partitions.DAYS_AHEAD + 1)
        ]
        await partitions.ensure(connection, partitions.PARTITIONED_TABLES, days)
        self._partitions_made = True  # until a commit succeeds: nothing is made twice in a row
