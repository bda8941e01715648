"""The one place where what neurons send becomes durable: a group commit.

Stream readers hand in heartbeats, durable messages and ended sessions without waiting; the
writer's one task takes all that waits and applies it in one transaction (`store/ingest.py`),
then acknowledges. One flush is under way at a time, so load itself makes the batches larger.

    heartbeat ──▶ newest of each neuron ─┐
    durable ────▶ in order of arrival ───┼─▶ one transaction ─▶ acknowledgements, watchers
    closed ─────▶ in order ──────────────┘

Heartbeats may wait for `flush_interval`; a durable message or a closed session starts a flush at
once. While PostgreSQL is away nothing is lost: heartbeats coalesce to the newest of each neuron,
durable messages wait unacknowledged up to a bound, and beyond it the readers wait (`room`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Protocol

import psycopg
import structlog

from federation_server.domain.analytics import AnalyticsReport
from federation_server.domain.command import CommandUpdate
from federation_server.domain.retry import Backoff
from federation_server.live.metrics import Metrics
from federation_server.store import ingest, partitions
from federation_server.store.database import Connection, Database, first_line
from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem, Outcome
from federation_server.store.ingest_commands import ChangedCommand

log = structlog.get_logger(__name__)

CAPACITY_BYTES = 64 * 1024 * 1024
"""How much durable data may wait before the readers do."""

FLUSH_TIMEOUT_S = 15.0
"""How long one transaction may take before its connection is given up."""


_MESSAGE = {AnalyticsReport: "analytics_report", CommandUpdate: "command_update"}


class Sender(Protocol):
    """Who handed something in, and is told what became of it."""

    def stored(self, mark: int, time: datetime) -> None:
        """Everything up to sequence `mark` of the sender's spool is committed (0: it was a
        heartbeat), at that time by PostgreSQL's clock.
        """

    def fenced(self) -> None:
        """The sender's session is no longer the newest: nothing was written."""

    def refused(self, sequence: int, message: str) -> None:
        """The database would not take that message (sequence 0: a heartbeat); `message` is the
        name that the contract's NeuronMessage gives it.
        """


@dataclass(slots=True)
class _Batch:
    heartbeats: dict[str, tuple[Sender, HeartbeatItem]] = field(default_factory=dict)
    replaced: list[Sender] = field(default_factory=list)
    durables: list[tuple[Sender, DurableItem, int]] = field(default_factory=list)
    closed: list[ClosedItem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.heartbeats) + len(self.durables) + len(self.closed)

    def before(self, newer: _Batch) -> _Batch:
        """This batch and what has come since, as one; of heartbeats the newer ones."""
        for neuron_id, (sender, _) in self.heartbeats.items():
            if neuron_id in newer.heartbeats:
                self.replaced.append(sender)
        return _Batch(
            self.heartbeats | newer.heartbeats,
            self.replaced + newer.replaced,
            self.durables + newer.durables,
            self.closed + newer.closed,
        )

    def halves(self) -> tuple[_Batch, _Batch]:
        """Two batches, of at least one item each, that make up this one in order."""
        heartbeats = list(self.heartbeats.items())
        h, d, c = len(heartbeats) // 2, len(self.durables) // 2, len(self.closed) // 2
        if not h + d + c:  # at most one of each kind: split by kind
            h, d, c = (len(heartbeats), 0, 0) if heartbeats else (0, len(self.durables), 0)
        return (
            _Batch(dict(heartbeats[:h]), self.replaced, self.durables[:d], self.closed[:c]),
            _Batch(dict(heartbeats[h:]), [], self.durables[d:], self.closed[c:]),
        )


class Writer:
    """Applies what neurons send, in batches, and says when it is durable."""

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        *,
        flush_interval: timedelta,
        oldest_point: timedelta,
        changed: Callable[[Sequence[ChangedCommand]], None],
    ) -> None:
        """`changed` is called with the commands that a committed batch has changed."""
        self._database = database
        self._metrics = metrics
        self._flush_interval_s = flush_interval.total_seconds()
        self._oldest_point = oldest_point
        self._changed = changed
        self._waiting = _Batch()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._partitions_made = False
        self._backoff = Backoff(first_s=0.1, most_s=2.0)
        self._connection: Connection | None = None

    def heartbeat(self, sender: Sender, item: HeartbeatItem) -> None:
        """Takes a neuron's newest heartbeat; an older one that still waits is dropped."""
        replaced = self._waiting.heartbeats.get(item.neuron_id)
        if replaced is not None:
            self._waiting.replaced.append(replaced[0])
        self._waiting.heartbeats[item.neuron_id] = (sender, item)
        self._wake.set()

    def durable(self, sender: Sender, item: DurableItem, size_bytes: int) -> None:
        """Takes a durable message; the sender should await `room` before it reads the next."""
        self._waiting.durables.append((sender, item, size_bytes))
        self._waiting_bytes += size_bytes
        if self._waiting_bytes > CAPACITY_BYTES:
            self._room.clear()
        self._hurry()

    def close(self, item: ClosedItem) -> None:
        """Takes the end of a session; what it sent before is written before."""
        self._waiting.closed.append(item)
        self._hurry()

    def hurry(self) -> None:
        """Starts a flush at once, for a sender that waits for its heartbeat's."""
        self._hurry()

    async def room(self) -> None:
        """Waits until less than the bound waits to be written."""
        await self._room.wait()

    async def settled(self) -> None:
        """Waits until everything that was handed in is committed."""
        await self._idle.wait()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        try:
            while True:
                await self._wake.wait()
                await self._linger()
                await self._flush(self._take())
        finally:
            await self._disconnect()

    async def stop(self, *, within: timedelta) -> bool:
        """Writes what still waits, in bounded time; says whether all of it is committed."""
        self._stopping = True
        if len(self._waiting):
            self._hurry()
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

    def _hurry(self) -> None:
        self._idle.clear()
        self._urgent.set()
        self._wake.set()

    async def _linger(self) -> None:
        """Lets heartbeats gather, unless something urgent waits."""
        if self._urgent.is_set():
            return
        try:
            async with asyncio.timeout(self._flush_interval_s):
                await self._urgent.wait()
        except TimeoutError:
            pass

    def _take(self) -> _Batch:
        batch, self._waiting = self._waiting, _Batch()
        self._wake.clear()
        if not self._stopping:
            self._urgent.clear()
        self._idle.clear()
        return batch

    async def _flush(self, batch: _Batch) -> None:
        """Commits a batch, or puts it back and waits a little while PostgreSQL is away."""
        try:
            await self._commit(batch)
        except (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError) as error:
            self._waiting = batch.before(self._waiting)
            self._wake.set()
            await self._disconnect()
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
        self._backoff.reset()
        if not len(self._waiting):
            self._idle.set()

    async def _commit(self, batch: _Batch) -> None:
        """Commits a batch; what the database will not take is refused to its sender alone.

        Raises:
            psycopg.OperationalError, TimeoutError: PostgreSQL is away; parts of the batch may be
                committed, and committing them again has no effect.
        """
        started = time.monotonic()
        try:
            outcome = await self._apply(batch)
        except (psycopg.OperationalError, psycopg.InterfaceError, TimeoutError):
            raise
        except psycopg.errors.CheckViolation as error:
            if "no partition" in str(error) and not self._partitions_made:
                await self._make_partitions()
                await self._commit(batch)
            else:
                await self._isolate(batch, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one item's fault
            await self._isolate(batch, error)
            return
        self._partitions_made = False
        self._metrics.flush_seconds.observe(time.monotonic() - started)
        self._metrics.flush_items.observe(len(batch))
        self._metrics.heartbeats.inc(len(batch.heartbeats))
        self._finish(batch, outcome)

    async def _apply(self, batch: _Batch) -> Outcome:
        async with asyncio.timeout(FLUSH_TIMEOUT_S):
            if self._connection is None:
                self._connection = await self._database.connect("writer")
            return await ingest.apply(
                self._connection,
                [item for _, item in batch.heartbeats.values()],
                [item for _, item, _ in batch.durables],
                batch.closed,
                oldest_point=self._oldest_point,
            )

    async def _isolate(self, batch: _Batch, error: Exception) -> None:
        """Commits all of a batch but the item that spoils it, by bisecting."""
        if len(batch) > 1:
            for half in batch.halves():
                if len(half):
                    await self._commit(half)
            return
        log.error("refused by the database", action="writer_refused", exc_info=error)
        self._metrics.refused.inc()
        for sender, _ in batch.heartbeats.values():
            sender.refused(0, "heartbeat")
        for sender, item, size_bytes in batch.durables:
            if item.payload is None:
                raise error
            sender.refused(item.sequence, _MESSAGE[type(item.payload)])
            # The mark moves past it all the same: sending it again would not help.
            empty = _Batch(durables=[(sender, item._replace(payload=None), size_bytes)])
            await self._commit(empty)

    def _finish(self, batch: _Batch, outcome: Outcome) -> None:
        """Tells the senders and the watchers what a committed batch has done."""
        told: set[int] = set()
        for sender, item, size_bytes in batch.durables:
            self._waiting_bytes -= size_bytes
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
        if self._waiting_bytes <= CAPACITY_BYTES:
            self._room.set()
        if outcome.changed:
            self._changed(outcome.changed)

    async def _make_partitions(self) -> None:
        """Makes the partitions that late reports, or a clock that jumped, need."""
        assert self._connection is not None
        day: date = await partitions.today(self._connection)
        days = [
            day + timedelta(days=offset)
            for offset in range(-self._oldest_point.days - 1, partitions.DAYS_AHEAD + 1)
        ]
        await partitions.ensure(self._connection, partitions.PARTITIONED_TABLES, days)
        self._partitions_made = True  # until a commit succeeds: nothing is made twice in a row

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
