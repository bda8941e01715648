"""PostgreSQL's pipeline mode, for the statements that every heartbeat and every command costs.

    async with pipeline(connection, transaction=True) as send:
        before = send(_BEFORE, ids)     # goes out with the others; nobody waits
        after = send(_AFTER, values)
        for row in await before: ...    # waits for this answer, and sends what it needs for that
    rows = await after                  # COMMIT was sent along, and has been confirmed

psycopg's own pipeline waits for a BEGIN and a COMMIT of its own, makes a cursor for each statement
and asks the socket for each. Where commands come one by one, and nothing of that is in the
processor's cache, this took most of a command's time; `benchmarks/README.md` has the figures. Here
a statement is one call into libpq, and a whole transaction is written and read at once.

A statement is prepared once for each connection, with $1, $2… for its parameters. These go as text
and have no type, so the statement says it where PostgreSQL cannot know it (`$1::text[]`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

Connection: TypeAlias = psycopg.AsyncConnection[Any]
Row: TypeAlias = tuple[Any, ...]

_prepared: WeakKeyDictionary[Connection, dict[bytes, bytes]] = WeakKeyDictionary()
"""For each connection: the names of the statements that it has prepared."""

_numbers = itertools.count()

_FAILED = frozenset({ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_ABORTED, ExecStatus.BAD_RESPONSE})


class Answer:
    """What a statement gives; to be awaited, as often as one likes."""

    __slots__ = ("_pipeline", "prepares", "rows")

    def __init__(self, pipeline: Pipeline, prepares: bytes = b"") -> None:
        self._pipeline = pipeline
        self.prepares = prepares
        """The statement that this is the preparation of."""
        self.rows: list[Row] | None = None

    def __await__(self) -> Generator[Any, None, list[Row]]:
        """The rows, once they are here.

        Raises:
            psycopg.Error: this statement has failed, or one before it.
        """
        if self.rows is None:
            yield from self._pipeline.receive(self).__await__()
        assert self.rows is not None, "received"
        return self.rows


class Pipeline:
    """Statements under way on one connection; `pipeline` makes and ends it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._libpq = connection.pgconn
        self._texts = Transformer(connection)
        self._prepared = _prepared.setdefault(connection, {})
        self._asked: deque[Answer] = deque()
        self._ending = False
        self._loop = asyncio.get_running_loop()

    def __call__(self, statement: bytes, *parameters: Any) -> Answer:
        """Sends a statement, and gives what its answer will be in."""
        formats = [PyFormat.TEXT] * len(parameters)
        texts = self._texts.dump_sequence(parameters, formats) if parameters else None
        name = self._prepared.get(statement)
        if name is None:
            name = b"federation_%d" % next(_numbers)
            self._libpq.send_prepare(name, statement)
            self._asked.append(Answer(self, statement))
            self._prepared[statement] = name
        self._libpq.send_query_prepared(name, texts)
        return self._ask()

    def simple(self, statement: bytes) -> Answer:
        """Sends a statement without parameters that is not worth preparing."""
        self._libpq.send_query_params(statement, None)
        return self._ask()

    def _ask(self) -> Answer:
        answer = Answer(self)
        self._asked.append(answer)
        return answer

    async def receive(self, wanted: Answer) -> None:
        """Waits until that answer is here."""
        self._libpq.send_flush_request()
        await self._read(wanted)

    async def end(self) -> None:
        """Waits until all that was sent is done; in autocommit mode it is committed then.

        Raises:
            psycopg.Error: a statement has failed, and nothing behind it was done.
        """
        if not self._ending:
            self._ending = True
            self._libpq.pipeline_sync()
        await self._read(None)

    async def give_up(self) -> None:
        """The same, after a failure that is known.

        Raises:
            psycopg.OperationalError: the connection is broken.
        """
        while True:
            try:
                await self.end()
            except psycopg.Error:
                if self._connection.closed:
                    raise
            else:
                return

    async def _read(self, wanted: Answer | None) -> None:
        """Reads answers up to the wanted one; None: up to the end."""
        libpq = self._libpq
        while True:
            while not libpq.is_busy():
                result = libpq.get_result()
                if result is None:  # stands between two answers
                    continue
                if result.status == ExecStatus.PIPELINE_SYNC:
                    return
                if not self._asked:  # the connection had ended before anything could be sent
                    raise psycopg.errors.error_from_result(result)
                answer = self._asked.popleft()
                self._take(answer, result)
                if answer is wanted:
                    return
            await self._readable()
            libpq.consume_input()

    def _take(self, answer: Answer, result: PGresult) -> None:
        if result.status in _FAILED:
            for failed in (answer, *self._asked):
                self._prepared.pop(failed.prepares, None)
            raise psycopg.errors.error_from_result(result)
        self._texts.set_pgresult(result)
        answer.rows = self._texts.load_rows(0, result.ntuples, tuple)

    async def _readable(self) -> None:
        """Waits until there is more to read, or until what could not be written yet can be."""
        descriptor = self._libpq.socket
        ready = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_reader(descriptor, wake)
        if unsent := self._libpq.flush():
            self._loop.add_writer(descriptor, wake)
        try:
            await ready
        finally:
            self._loop.remove_reader(descriptor)
            if unsent:
                self._loop.remove_writer(descriptor)


@asynccontextmanager
async def pipeline(connection: Connection, *, transaction: bool = False) -> AsyncIterator[Pipeline]:
    """Statements on a connection that nobody else uses meanwhile; with `transaction` they are one.

    Without, they belong to the transaction that is open, or, in autocommit mode, are one together.

    Raises:
        psycopg.Error: a statement has failed; with `transaction` nothing has happened, unless the
            connection broke just when it was committed.
    """
    libpq = connection.pgconn
    libpq.enter_pipeline_mode()
    send = Pipeline(connection)
    try:
        if transaction:
            send.simple(b"BEGIN")
        yield send
        if transaction:
            send.simple(b"COMMIT")
        await send.end()
        libpq.exit_pipeline_mode()
    except BaseException:
        try:
            await send.give_up()
            libpq.exit_pipeline_mode()
            if transaction:
                await roll_back(connection)
        except psycopg.Error:
            pass  # the connection is broken
        except BaseException:  # cancelled once more: nobody will read what is still to come
            await connection.close()
            raise
        raise


async def roll_back(connection: Connection) -> None:
    """Ends a transaction that has failed, unless its connection is broken anyway."""
    if not connection.closed and connection.info.transaction_status is not TransactionStatus.IDLE:
        with suppress(psycopg.Error):
            await connection.execute(b"ROLLBACK")
