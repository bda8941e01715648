"""What waits for the writer, until a transaction takes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from weakref import WeakSet

from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem


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
class Batch:
    """Items in order, of each kind by itself: within a transaction sessions are opened again first,
    and closed last.
    """

    heartbeats: dict[str, tuple[Sender, HeartbeatItem]] = field(default_factory=dict)
    """The newest of each neuron."""
    replaced: WeakSet[Sender] = field(default_factory=WeakSet)
    """Whose heartbeats gave way to newer ones; who has gone need not be told."""
    durables: list[tuple[Sender, DurableItem, int]] = field(default_factory=list)
    """Each with its size in bytes."""
    reopened: list[tuple[str, int]] = field(default_factory=list)
    """Sessions (neuron_id, epoch)."""
    closed: list[ClosedItem] = field(default_factory=list)

    def __len__(self) -> int:
        """How many items it holds."""
        return len(self.heartbeats) + len(self.durables) + len(self.reopened) + len(self.closed)

    @property
    def bytes(self) -> int:
        """The size of the durable messages."""
        return sum(size_bytes for _, _, size_bytes in self.durables)

    def beat(self, sender: Sender, item: HeartbeatItem) -> bool:
        """Takes a neuron's heartbeat in the place of an older one, and says whether there was one.
        One of an older session comes too late, and is none.
        """
        before = self.heartbeats.get(item.neuron_id)
        if before is not None:
            if 0 < item.epoch < before[1].epoch:
                sender.fenced()
                return True
            self.replaced.add(before[0])
        self.heartbeats[item.neuron_id] = (sender, item)
        return before is not None

    def split(self, most_bytes: int) -> Batch:
        """Takes out what is too much for one transaction, and gives it: the durable messages beyond
        that size, but for the first one, and the ends of sessions, which come after them.
        """
        total_bytes = 0
        for number, (_, _, size_bytes) in enumerate(self.durables):
            total_bytes += size_bytes
            if total_bytes > most_bytes and number:
                rest = Batch(durables=self.durables[number:], closed=self.closed)
                self.durables, self.closed = self.durables[:number], []
                return rest
        return Batch()

    def before(self, newer: Batch) -> Batch:
        """This batch and what has come since, as one."""
        both = Batch(
            dict(self.heartbeats),
            self.replaced | newer.replaced,
            self.durables + newer.durables,
            self.reopened + newer.reopened,
            self.closed + newer.closed,
        )
        for sender, item in newer.heartbeats.values():
            both.beat(sender, item)
        return both

    def halves(self) -> tuple[Batch, Batch]:
        """Of two or more items: two batches, each of fewer, that make up this one in order."""
        kinds = (
            Batch(reopened=self.reopened),
            Batch(self.heartbeats, self.replaced),
            Batch(durables=self.durables),
            Batch(closed=self.closed),
        )
        first, *others = (kind for kind in kinds if len(kind))
        if others:
            return first, functools.reduce(Batch.before, others)
        middle = len(self) // 2
        heartbeats = list(self.heartbeats.items())
        return (
            Batch(
                dict(heartbeats[:middle]),
                self.replaced,
                self.durables[:middle],
                self.reopened[:middle],
                self.closed[:middle],
            ),
            Batch(
                dict(heartbeats[middle:]),
                WeakSet(),
                self.durables[middle:],
                self.reopened[middle:],
                self.closed[middle:],
            ),
        )
