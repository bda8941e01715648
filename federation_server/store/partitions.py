"""Partitions of the histories: made before they are needed, dropped when they are too old.

A partition is named after its table and its first day in UTC: `heartbeats_20261121`. Most hold one
day, those of the coarse rollups a month. Days are days of PostgreSQL's clock; the callers say
which they need.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timedelta

from psycopg import sql
from psycopg.errors import LockNotAvailable, UndefinedTable

from federation_server.store.database import Connection

_DAILY = ("heartbeats", "metric_points", "reported_events", "metric_minutes")
_MONTHLY = ("metric_hours", "metric_days", "audit_entries")
PARTITIONED_TABLES = _DAILY + _MONTHLY

_GUARDS = {
    # TRUNCATE of a partition does not ask its table's triggers.
    "audit_entries": " CREATE TRIGGER audit_stays BEFORE TRUNCATE ON {partition}"
    " FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();"
}
"""What a partition needs that it does not have from its table."""

_DAY = timedelta(days=1)

DAYS_AHEAD = 2
"""How many days beyond today always have their partitions."""

_LOCK = 0x6665_6470_6172  # "fedpar": one server makes partitions at a time


async def today(connection: Connection) -> date:
    """The current day in UTC by PostgreSQL's clock."""
    cursor = await connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date")
    row = await cursor.fetchone()
    assert row is not None
    day: date = row[0]
    return day


async def ensure_ahead(connection: Connection) -> None:
    """Makes the partitions of yesterday (for what is under way), today and the next days."""
    now = await today(connection)
    await ensure(
        connection,
        PARTITIONED_TABLES,
        (now + timedelta(days=offset) for offset in range(-1, DAYS_AHEAD + 1)),
    )


async def ensure(connection: Connection, tables: Iterable[str], days: Iterable[date]) -> None:
    """Makes the partitions of those tables for those days, where they do not exist."""
    days = set(days)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        for table in tables:
            existing = {day for day, _ in await _existing(connection, table)}
            for day in sorted({first_day(table, day) for day in days} - existing):
                await connection.execute(_create(table, day))


def first_day(table: str, day: date) -> date:
    """The first day of the partition that a day is in."""
    return day.replace(day=1) if table in _MONTHLY else day


def next_first_day(table: str, first: date) -> date:
    """The first day of the partition behind."""
    return first_day(table, first + timedelta(days=31)) if table in _MONTHLY else first + _DAY


def _create(table: str, day: date) -> sql.Composed:
    # Attached and not made as a partition: that would wait for everybody who reads or writes the
    # table, and all who come after would wait behind it.
    return sql.SQL(
        "CREATE TABLE {partition} (LIKE {table});"
        + _GUARDS.get(table, "")
        + " ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ({start}) TO ({end})"
    ).format(
        partition=sql.Identifier(f"{table}_{day:%Y%m%d}"),
        table=sql.Identifier(table),
        start=sql.Literal(f"{day.isoformat()}T00:00:00Z"),
        end=sql.Literal(f"{next_first_day(table, day).isoformat()}T00:00:00Z"),
    )


async def drop_before(
    connection: Connection, table: str, oldest: date
) -> tuple[list[str], list[str]]:
    """Drops the partitions that hold nothing but days before `oldest`; returns their names, and
    those of the partitions that somebody reads, and that were left.

    Each is dropped in a transaction of its own that waits for its lock for a second at the most,
    because the writer waits behind it.
    """
    dropped, left = [], []
    for day, partition in await _existing(connection, table):
        if next_first_day(table, day) <= oldest:
            try:
                async with connection.transaction():
                    await connection.execute("SET LOCAL lock_timeout = '1s'")
                    await connection.execute(
                        sql.SQL("DROP TABLE {}").format(sql.Identifier(partition))
                    )
            except LockNotAvailable:
                left.append(partition)
            except UndefinedTable:
                continue  # a server whose sweep this one has taken over came first
            else:
                dropped.append(partition)
    return dropped, left


async def _existing(connection: Connection, table: str) -> list[tuple[date, str]]:
    cursor = await connection.execute(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = %s::regclass ORDER BY c.relname",
        (table,),
    )
    return [
        (datetime.strptime(name.rpartition("_")[2], "%Y%m%d").date(), name)  # noqa: DTZ007
        for (name,) in await cursor.fetchall()
    ]
