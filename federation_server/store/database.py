"""The way to PostgreSQL: a pool for the admins' calls, a smaller one for those of neurons, and
single connections for what runs.

`Database.begin()` gives a pooled SQLAlchemy connection inside a transaction, and so does
`begin_for_neurons()`: however many neurons register, no admin waits behind them.
`Database.connect()`
gives a psycopg connection of its own to the writer, the listener and the sweeper. Every way there
is bounded in time, so that a database that is away shows as an error and never as a hang: who waits
for a connection of its own does so within `bounded`, and once the lease has found that PostgreSQL
is away (`lost`), calls fail at once until it answers again (`found`).
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from datetime import datetime
from typing import Any
from weakref import WeakSet

import orjson
import psycopg
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo
from psycopg.types.json import set_json_dumps, set_json_loads
from sqlalchemy import URL, event, func, make_url, select, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 5
"""How long a connection attempt, or the wait for a pooled connection, may take."""

STATEMENT_TIMEOUT_MS = 30_000
"""How long PostgreSQL may work on one statement of a call."""

NEURONS_POOL_SIZE = 5
"""Registrations, and calls without a stream, take some milliseconds each: five at a time are more
than one process has time for."""

GRACE_S = 0.3
"""How much longer than its bound an answer may take that has perhaps come already."""

RETRY_INTERVAL_S = 2.0
"""How long `wait_until_ready` waits between two attempts."""

_REFUSALS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "permission denied for database",
)
"""What PostgreSQL and libpq say to those whom they do not let in; in English, else it is waited."""

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
"""A psycopg connection of the runtime's own."""


SURE_FOR_S = 0.5
"""How long a connection that worked is taken to work."""

PING_TIMEOUT_S = 2.0

_PREPARE_THRESHOLD = None
"""psycopg itself prepares nothing: after a ROLLBACK it would deallocate all that the connection has
prepared, also by `store/pipeline.py`, which is the way of the hot statements."""

_DEAD_PEERS: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""Dead peers are found by TCP within half a minute, not in two hours: a firewall forgets
connections that say nothing, and who then uses one is told nothing."""

_EVERYWHERE = (
    "timezone=UTC",
    # Who hangs up (`hang_up`) has given up: what it asked for must not wait for a lock for hours,
    # and hold others meanwhile.
    "client_connection_check_interval=1s",
)

_OPTIONS = " ".join(
    f"-c {setting}"
    for setting in (
        *_EVERYWHERE,
        # Every statement of a connection of one's own finds few rows by their keys, again and
        # again: planned once, and not by the size that a table had then.
        "plan_cache_mode=force_generic_plan",
        "enable_seqscan=off",
        "enable_hashjoin=off",
        "enable_mergejoin=off",
    )
)


class DatabaseAway(psycopg.OperationalError):
    """PostgreSQL did not answer a moment ago, so it was not asked."""


class DatabaseUrlError(ValueError):
    """DATABASE_URL is not one of PostgreSQL; the message says what it should be."""


class DatabaseRefuses(Exception):
    """PostgreSQL is not to be had by a URL, and to wait does not help; the message says why."""


def parse_url(given: str, setting: str = "DATABASE_URL") -> URL:
    """The SQLAlchemy URL for one in any of the usual spellings; `setting` is where it is from.

    Raises:
        DatabaseUrlError: it is no URL of PostgreSQL.
    """
    remedy = "use postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):  # whose texts may quote a password
        raise DatabaseUrlError(f"{setting} is not a URL: {remedy}") from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise DatabaseUrlError(f"{setting} is of {url.drivername!r}: {remedy}")
    if not url.database:
        raise DatabaseUrlError(f"{setting} names no database: {remedy}")
    return url.set(drivername="postgresql+psycopg")


def role_of(given: str) -> str:
    """The role that a DATABASE_URL connects as. It may be named behind the ?, or by what libpq
    itself reads, such as PGUSER.

    Raises:
        DatabaseUrlError: it is no URL of PostgreSQL.
    """
    named = conninfo_to_dict(Database(given).conninfo).get("user")
    defaults = {each.keyword: each.val for each in Conninfo.get_defaults()}
    return str(named or (defaults[b"user"] or b"").decode())


class Database:
    """One PostgreSQL database, as a server process uses it."""

    def __init__(self, url: str, *, pool_size: int = 10, setting: str = "DATABASE_URL") -> None:
        """Connects to nothing yet; `setting` is where the URL is from.

        Raises:
            DatabaseUrlError: `url` is no URL of PostgreSQL.
        """
        self.url = parse_url(url, setting)
        self._setting = setting
        try:
            self.conninfo  # noqa: B018 - libpq looks at the options
        except psycopg.ProgrammingError:  # whose text may quote a part of a password
            raise DatabaseUrlError(
                f"{setting} has an option behind its ? that PostgreSQL does not know"
            ) from None
        self._away = False
        self._pooled: WeakSet[psycopg.AsyncConnection[Any]] = WeakSet()
        self._own: WeakSet[Connection] = WeakSet()
        self.engine = self._pool(pool_size)
        self._neurons = self._pool(NEURONS_POOL_SIZE)

    def _pool(self, size: int) -> AsyncEngine:
        engine = create_async_engine(
            self.url,
            pool_size=size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
            pool_pre_ping=True,
            hide_parameters=True,  # an error's text goes to the log
            json_serializer=lambda value: orjson.dumps(value).decode(),
            json_deserializer=orjson.loads,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "prepare_threshold": _PREPARE_THRESHOLD,
                "application_name": "federation",
                "options": " ".join(
                    f"-c {setting}"
                    for setting in (*_EVERYWHERE, f"statement_timeout={STATEMENT_TIMEOUT_MS}")
                ),
                **_DEAD_PEERS,
            },
        )
        event.listen(engine.sync_engine, "connect", self._pool_connected)
        return engine

    def _pool_connected(self, connection: Any, _: object) -> None:
        self._pooled.add(connection.driver_connection)

    def lost(self) -> None:
        """PostgreSQL does not answer: whoever waits for it in `begin` fails now, and whoever comes
        fails at once, until it is `found`.
        """
        self._away = True
        for connection in self._pooled:
            hang_up(connection)

    def found(self) -> None:
        """PostgreSQL answers."""
        self._away = False

    def abandon(self) -> None:
        """Ends every connection, so that nobody waits any longer for a PostgreSQL that hangs."""
        self.lost()
        for connection in self._own:
            hang_up(connection)

    @property
    def conninfo(self) -> str:
        """The same place, as libpq writes it. Holds the password: never log it."""
        # Not as a URL: there SQLAlchemy writes a blank in the socket's path as +, libpq wants %20.
        parts = self.url.translate_connect_args(username="user", database="dbname")
        options = {name: ",".join(values) for name, values in self.url.normalized_query.items()}
        return make_conninfo(**parts | options)

    @property
    def place(self) -> str:
        """The same place without the password, for people."""
        return self.url.set(drivername="postgresql").render_as_string(hide_password=True)

    def begin(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A pooled connection in a transaction, committed at the end unless an error leaves it.

        Raises:
            DatabaseAway: PostgreSQL is `lost`.
        """
        return self._begin(self.engine)

    def begin_for_neurons(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """The same for a neuron's call, from a pool that only such calls use."""
        return self._begin(self._neurons)

    @asynccontextmanager
    async def _begin(self, pool: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        if self._away:
            raise DatabaseAway("PostgreSQL did not answer a moment ago")
        async with pool.begin() as connection:
            yield connection

    async def connect(self, name: str, *, shared: bool = False) -> Connection:
        """A connection of one's own, in autocommit mode; `name` shows in pg_stat_activity. With
        `shared` callers wait for it, as for a pooled one: while PostgreSQL is `lost` it fails.

        Raises:
            DatabaseAway: PostgreSQL is `lost`, and the connection is to be shared.
        """
        if shared and self._away:
            raise DatabaseAway("PostgreSQL did not answer a moment ago")
        connection = await psycopg.AsyncConnection.connect(
            self.conninfo,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            prepare_threshold=_PREPARE_THRESHOLD,
            application_name=f"federation-{name}",
            options=_OPTIONS,
            **_DEAD_PEERS,
        )
        set_json_dumps(orjson.dumps, connection)
        set_json_loads(orjson.loads, connection)
        (self._pooled if shared else self._own).add(connection)
        return connection

    async def is_superuser(self) -> bool:
        """The role may do everything in that PostgreSQL, of which it needs next to nothing."""
        async with self.begin() as connection:
            return bool((await connection.execute(text("SHOW is_superuser"))).scalar() == "on")

    async def wait_until_ready(self, within_s: float = math.inf) -> None:
        """Returns once PostgreSQL answers; says so every few seconds until it does.

        Raises:
            DatabaseRefuses: it answers, and lets nobody in by that URL; or the time is over.
        """
        end = time.monotonic() + within_s
        while True:
            try:
                connection = await self.connect("probe")
            except psycopg.OperationalError as error:
                reason = first_line(error)
                if any(words in reason for words in _REFUSALS):
                    raise DatabaseRefuses(f"{self._setting} lets nobody in: {reason}") from None
                if time.monotonic() + RETRY_INTERVAL_S > end:
                    raise DatabaseRefuses(f"{self._setting}: no answer: {reason}") from None
                log.warning(
                    "waiting for PostgreSQL",
                    action="database_wait",
                    setting=self._setting,
                    place=self.place,
                    reason=reason,
                    retry_s=RETRY_INTERVAL_S,
                )
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            await connection.close()
            return

    async def close(self) -> None:
        """Closes the pools."""
        await self.engine.dispose()
        await self._neurons.dispose()


class OwnConnection:
    """A connection of one part of the server: made when it is needed, and again after it broke."""

    def __init__(self, database: Database, name: str, *, shared: bool = False) -> None:
        """Connects to nothing yet; the arguments are those of `Database.connect`."""
        self._database = database
        self._name = name
        self._shared = shared
        self._connection: Connection | None = None
        self._used = 0.0

    @property
    def is_made(self) -> bool:
        """There is a connection, which may have ended since."""
        return self._connection is not None

    async def get(self) -> Connection:
        """The connection. One that callers wait for is asked first whether it still works, unless
        it did a moment ago: an outage that is over is none of theirs.

        Raises:
            psycopg.Error: PostgreSQL does not answer.
        """
        now = time.monotonic()
        if self._connection is not None and self._shared and now - self._used > SURE_FOR_S:
            try:
                with bounded(self._connection, PING_TIMEOUT_S):
                    await self._connection.execute(b"SELECT")
            except psycopg.Error:
                await self.close()
        if self._connection is None:
            self._connection = await self._database.connect(self._name, shared=self._shared)
        self._used = now
        return self._connection

    async def close(self) -> None:
        """Gives the connection up; the next `get` makes another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


@contextmanager
def bounded(connection: Connection, within_s: float) -> Iterator[None]:
    """Breaks the connection if the block takes longer; what waits for it fails with an
    OperationalError.

    A timeout that cancels would not do: psycopg then asks PostgreSQL to stop the statement, and
    waits for seconds more for one that hangs.
    """
    loop = asyncio.get_running_loop()

    def over() -> None:
        # Once more around the loop: if this process itself was late, the answer may be here.
        timers.append(loop.call_later(GRACE_S, hang_up, connection))

    timers = [loop.call_later(within_s, over)]
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    """Ends a connection under whoever waits for it, without asking PostgreSQL; this notices it
    within a second, and gives up what it was asked for.
    """
    # Shut down and not closed: the driver still waits for its descriptor.
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def first_line(error: BaseException) -> str:
    """An error of the driver in one line, for the log."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


async def driver(connection: AsyncConnection) -> Connection:
    """The driver's connection under a pooled one, in the same transaction."""
    raw = (await connection.get_raw_connection()).driver_connection
    assert isinstance(raw, psycopg.AsyncConnection)
    return raw


async def current_time(connection: AsyncConnection) -> datetime:
    """The transaction's time by PostgreSQL's clock."""
    now: datetime = (await connection.execute(select(func.now()))).scalar_one()
    return now
