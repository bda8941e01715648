"""Who follows commands and batches on this server, and what is new for them.

What neurons say of a followed command is read in the transaction that writes it (`followed`,
`tell`). For all else one task reads, for all followers at once, whatever was said to have changed;
and now and then all that is followed, because another server may have changed it. So what a
follower costs the database does not grow with how often its command changes. Who follows a batch
reads it himself, and learns here when to: now and then, and when all that was open has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psycopg

from federation_server.store.database import Database, OwnConnection, bounded
from federation_server.store.ledger import following
from federation_server.store.ledger.following import Asked, News

LOOK_INTERVAL_S = 1.0
"""How long a change can stay unseen that another server made, or that leaves a batch open."""

READ_TIMEOUT_S = 10.0


class WatchersClosed(Exception):
    """The server is shutting down."""


class Watch:
    """One follower of one command."""

    def __init__(self, after: int) -> None:
        """It has seen everything up to the revision `after`; 0: nothing."""
        self.after = after
        self.told = False
        self._news: News | None = None
        self._fault: Exception | None = None
        self._changed = asyncio.Event()

    async def next(self) -> News | None:
        """The command at once, and then whenever it has changed, with what is new; None if there
        is no such command (any more).

        Raises:
            WatchersClosed: the server is shutting down.
            psycopg.Error: PostgreSQL does not answer.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._fault is not None:
            raise self._fault
        news, self._news = self._news, None
        return news

    def tell(self, news: News) -> None:
        """Gives it what is new. What it has not taken yet is joined."""
        if self._news is not None:
            joined = [*self._news.transitions, *news.transitions]
            news = News(news.record, joined, self._news.after)
        self._news = news
        self.after = news.record.revision
        self.told = True
        self._changed.set()

    def end(self, fault: Exception | None = None) -> None:
        """Nothing more will come: the command is gone, or there is a fault."""
        self._fault = fault
        self._news = None
        self._changed.set()


class BatchWatch:
    """One follower of one batch."""

    def __init__(self) -> None:
        """Nothing of the batch has ended yet."""
        self._ended = 0
        self._open = 0
        self._over = asyncio.Event()

    def look(self) -> None:
        """The follower is about to read the batch: it will see what has ended so far."""
        self._ended = self._open = 0
        self._over.clear()

    async def over(self, still_open: int) -> None:
        """Waits until as many commands as it saw open have ended since its `look`, or the server
        shuts down; LOOK_INTERVAL_S at most, because others are not told here.
        """
        self._open = still_open
        if still_open and self._ended >= still_open:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_INTERVAL_S):
                await self._over.wait()

    def ended(self) -> None:
        """A command of the batch has ended."""
        self._ended += 1
        if self._ended == self._open:
            self._over.set()

    def close(self) -> None:
        """The server shuts down."""
        self._over.set()


class CommandWatchers:
    """The followers of all commands and batches."""

    def __init__(self, database: Database) -> None:
        """Reads nothing before `run`."""
        self._watches: dict[str, set[Watch]] = {}
        self._batches: dict[str, set[BatchWatch]] = {}
        self._woken: set[str] = set()
        self._wake = asyncio.Event()
        self._connection = OwnConnection(database, "watchers", shared=True)
        self.closed = False

    @contextmanager
    def watching(
        self, command_id: str, after: int = 0, *, seen: News | None = None
    ) -> Iterator[Watch]:
        """Follows a command, of which everything up to a revision has been seen; or, if it has been
        issued in this very turn of the event loop, what is to be `seen` of it now.
        """
        watch = Watch(after)
        self._watches.setdefault(command_id, set()).add(watch)
        if self.closed:
            watch.end(WatchersClosed())
        elif seen is not None:
            watch.tell(seen)
        else:
            self.wake([command_id])
        try:
            yield watch
        finally:
            watches = self._watches[command_id]
            watches.discard(watch)
            if not watches:
                del self._watches[command_id]

    @contextmanager
    def watching_batch(self, batch_id: str) -> Iterator[BatchWatch]:
        """Follows a batch."""
        watch = BatchWatch()
        self._batches.setdefault(batch_id, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._batches[batch_id]
            watches.discard(watch)
            if not watches:
                del self._batches[batch_id]

    def ended_in(self, batch_id: str) -> None:
        """A command of that batch has ended."""
        for watch in self._batches.get(batch_id, ()):
            watch.ended()

    def followed(self, command_ids: Iterable[str]) -> list[Asked]:
        """Those of the commands that somebody follows, and what is to be read of them."""
        return [
            Asked(
                command_id,
                min(watch.after for watch in watches),
                not all(watch.told for watch in watches),
            )
            for command_id in command_ids
            if (watches := self._watches.get(command_id))
        ]

    def tell(self, found: Mapping[str, News | None]) -> None:
        """Tells the followers what was read. Who came meanwhile, and needs more, was woken."""
        for command_id, news in found.items():
            for watch in tuple(self._watches.get(command_id, ())):
                if news is None:
                    watch.end()
                elif watch.after >= news.after and (
                    news.record.revision > watch.after or not watch.told
                ):
                    watch.tell(news.since(watch.after))

    def wake(self, command_ids: Iterable[str]) -> None:
        """Those commands may have changed."""
        woken = self._watches.keys() & set(command_ids)
        if woken:
            self._woken |= woken
            self._wake.set()

    def close(self) -> None:
        """Ends every follower."""
        self.closed = True
        self._end_all(WatchersClosed())
        for watches in self._batches.values():
            for watch in watches:
                watch.close()

    async def run(self) -> None:
        """Reads for the followers until it is cancelled."""
        try:
            while True:
                try:
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await self._wake.wait()
                except TimeoutError:
                    self._woken.update(self._watches)
                self._wake.clear()
                woken, self._woken = self._woken, set()
                if asked := self.followed(woken):
                    await self._read(asked)
        finally:
            await self._connection.close()

    async def _read(self, asked: Sequence[Asked]) -> None:
        try:
            connection = await self._connection.get()
            with bounded(connection, READ_TIMEOUT_S):
                self.tell(await following.read(connection, asked))
        except psycopg.Error as error:
            await self._connection.close()
            self._end_all(error)

    def _end_all(self, fault: Exception) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.end(fault)
