"""Partitions and leftovers: whoever reads holds nobody up, and what is too old goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import text

from federation_server.live import housekeeping
from federation_server.live.housekeeping import Housekeeping
from federation_server.store import leftovers, partitions
from federation_server.store.database import Connection, Database, bounded
from tests.support.neurons import put_neuron
from tests.support.waiting import eventually

DAY = timedelta(days=1)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        yield connection


@pytest_asyncio.fixture
async def reader(database: Database, connection: Connection) -> AsyncIterator[Connection]:
    """Somebody who reads the heartbeats and takes their time, as a dump does."""
    await partitions.ensure_ahead(connection)
    async with await database.connect("reader") as reader, reader.transaction():
        await reader.execute("SELECT count(*) FROM heartbeats")
        yield reader


async def column(database: Database, query: str) -> list[Any]:
    async with database.begin() as reading:
        return list((await reading.execute(text(query))).scalars())


def name(day: date) -> str:
    return f"heartbeats_{day:%Y%m%d}"


async def names(database: Database) -> list[Any]:
    query = "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid ORDER BY 1"
    return await column(database, query)


async def test_partitions_beyond_the_retention_are_dropped(connection: Connection) -> None:
    today = await partitions.today(connection)
    days = [today - offset * DAY for offset in (0, 6, 8, 40)]
    await partitions.ensure(connection, ("heartbeats",), days)
    dropped, left = await partitions.drop_before(connection, "heartbeats", today - 7 * DAY)
    assert (dropped, left) == ([name(day) for day in sorted(days)[:2]], [])


async def test_a_month_of_the_audit_log_beyond_the_retention_goes_as_a_whole(
    connection: Connection,
) -> None:
    await partitions.ensure(connection, ["audit_entries"], [date(2020, 1, 1)])
    nothing = await partitions.drop_before(connection, "audit_entries", date(2020, 1, 31))
    assert nothing == ([], [])
    dropped, _ = await partitions.drop_before(connection, "audit_entries", date(2020, 2, 1))
    assert dropped == ["audit_entries_20200101"]


async def test_a_partition_that_another_server_drops_meanwhile_is_no_fault(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [date(2020, 1, 1), date(2020, 1, 2)]
    await partitions.ensure(connection, ["heartbeats"], days)
    existing = partitions._existing

    async def overtaken(*asked: Any) -> Any:
        found = await existing(*asked)
        async with await database.connect("another") as another:
            await another.execute(f"DROP TABLE {name(days[0])}".encode())
        return found

    monkeypatch.setattr(partitions, "_existing", overtaken)
    dropped = await partitions.drop_before(connection, "heartbeats", date(2020, 2, 1))
    assert dropped == ([name(days[1])], [])


@pytest.mark.parametrize("table", partitions.PARTITIONED_TABLES)
async def test_a_partition_has_what_its_table_has(connection: Connection, table: str) -> None:
    await partitions.ensure(connection, (table,), [date(2026, 3, 1)])
    shapes = """
        SELECT c.relname, array_agg(a.attname || a.atttypid || a.attnotnull ORDER BY a.attnum),
            (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
        WHERE c.relname LIKE %s AND c.relkind IN ('r', 'p') AND NOT a.attisdropped
        GROUP BY c.oid, c.relname ORDER BY c.relname
    """
    found = await (await connection.execute(shapes, (f"{table}%",))).fetchall()
    (_, *whole), (_, *part) = found[:2]
    assert whole == part


async def test_partitions_are_made_while_somebody_reads_their_table(
    database: Database, connection: Connection, reader: Connection
) -> None:
    ahead = await partitions.today(connection) + 9 * DAY
    with bounded(connection, 5.0):
        await partitions.ensure(connection, ("heartbeats",), [ahead])
    assert name(ahead) in await names(database)


async def test_a_partition_that_somebody_reads_is_left_until_nobody_does(
    database: Database, connection: Connection, reader: Connection
) -> None:
    old = await partitions.today(connection) - 1 * DAY
    assert await partitions.drop_before(connection, "heartbeats", old + DAY) == ([], [name(old)])
    await reader.execute("COMMIT")
    assert await partitions.drop_before(connection, "heartbeats", old + DAY) == ([name(old)], [])
    await reader.execute("BEGIN")


async def test_who_hangs_up_holds_and_awaits_no_lock_any_more(
    database: Database, connection: Connection, reader: Connection
) -> None:
    async with await database.connect("waiter") as waiter:
        with pytest.raises(psycopg.OperationalError), bounded(waiter, 0.2):
            await waiter.execute("BEGIN; LOCK servers; LOCK heartbeats")

        async def gone() -> bool:
            left = "SELECT FROM pg_stat_activity WHERE application_name = 'federation-waiter'"
            return (await connection.execute(left)).rowcount == 0

        await eventually(gone, describe="PostgreSQL gave the statement up")
    async with connection.transaction():
        await connection.execute("LOCK TABLE servers NOWAIT")


async def test_housekeeping_makes_what_is_needed_and_drops_what_is_too_old(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "INTERVAL_S", 0.01)
    today = await partitions.today(connection)
    await partitions.ensure(connection, ("heartbeats",), [today - 40 * DAY])
    async with database.begin() as writing:
        await put_neuron(writing, "n")
        await writing.execute(
            text(
                "INSERT INTO spools (neuron_id, spool_id, last_sequence, update_time)"
                " VALUES ('n', 'old', 5, now() - interval '91 days'), ('n', 'new', 5, now())"
            )
        )
        await writing.execute(
            text(
                "INSERT INTO metric_series"
                " (neuron_id, name, kind, labels, unit, last_report_time, bounds)"
                " VALUES ('n', 'old', 'GAUGE', '{}', '', now() - interval '9 days', '{}'),"
                " ('n', 'new', 'GAUGE', '{}', '', now() - interval '7 days', '{}')"
            )
        )
    keeping = asyncio.create_task(
        Housekeeping(
            database, {"heartbeats": 7 * DAY, "metric_points": 8 * DAY}, pending=7 * DAY
        ).run()
    )

    async def kept() -> bool:
        there = await names(database)
        return name(today + 2 * DAY) in there and name(today - 40 * DAY) not in there

    await eventually(kept, describe="the house is kept")

    async def forgotten() -> bool:
        left = (
            await column(database, "SELECT spool_id FROM spools"),
            await column(database, "SELECT name FROM metric_series"),
        )
        return left == (["new"], ["new"])

    await eventually(forgotten, describe="what nobody asks for is forgotten")
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_no_more_is_forgotten_at_once_than_a_statement_may(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_MOST", 2)
    async with database.begin() as writing:
        await put_neuron(writing, "n")
        await writing.execute(
            text(
                "INSERT INTO spools (neuron_id, spool_id, last_sequence, update_time)"
                " SELECT 'n', n, 5, now() - interval '91 days' FROM generate_series(1, 5) n"
            )
        )
    await leftovers.forget(connection, longest=DAY)
    assert await column(database, "SELECT spool_id FROM spools") == []
