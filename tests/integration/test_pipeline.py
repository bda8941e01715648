"""PostgreSQL's pipeline mode, as the hot path uses it, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from federation_server.store.database import Connection, Database, bounded, driver
from federation_server.store.pipeline import Answer, pipeline
from tests.support.waiting import eventually

ECHO = b"SELECT $1::text, $2::int8"
INSERT = b"INSERT INTO made (name) VALUES ($1::text)"
COUNT = b"SELECT count(*) FROM made"
FAULTY = b"SELECT 1 / $1::int8"


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        await connection.execute(b"CREATE TEMPORARY TABLE made (name text PRIMARY KEY)")
        yield connection


async def carry_out(
    connection: Connection, *statements: tuple[Any, ...], transaction: bool = True
) -> list[Answer]:
    """Sends each (statement, parameter…), and waits for the end."""
    async with pipeline(connection, transaction=transaction) as send:
        return [send(*statement) for statement in statements]


async def count(connection: Connection) -> int:
    (row,) = await (await connection.execute(COUNT)).fetchall()
    return int(row[0])


async def test_each_answer_is_its_statements_and_may_be_awaited_in_any_order_and_again(
    connection: Connection,
) -> None:
    async with pipeline(connection) as send:
        answers = [send(ECHO, f"text {number}", number) for number in range(5)]
        assert await answers[3] == [("text 3", 3)]
        assert await answers[0] == [("text 0", 0)]
    assert await answers[4] == await answers[4] == [("text 4", 4)]


async def test_a_parameter_may_be_null_a_list_or_any_text(connection: Connection) -> None:
    async with pipeline(connection) as send:
        assert await send(ECHO, None, None) == [(None, None)]
        assert await send(b"SELECT $1::text[], $2::bool[]", ["a,b", '"{}\\', None], [True]) == [
            (["a,b", '"{}\\', None], [True])
        ]


async def test_a_transaction_is_committed_at_the_end_of_the_block(
    database: Database, connection: Connection
) -> None:
    table = f"seen_{uuid.uuid4().hex}"
    async with pipeline(connection, transaction=True) as send:
        send.simple(f"CREATE TABLE {table} (name text)".encode())
        async with await database.connect("other") as other:
            query = b"SELECT to_regclass($1::text) IS NULL"
            async with pipeline(other) as elsewhere:
                assert await elsewhere(query, table) == [(True,)]
    async with await database.connect("other") as other, pipeline(other) as elsewhere:
        assert await elsewhere(query, table) == [(False,)]


async def test_nothing_of_a_transaction_stays_if_one_statement_fails(
    connection: Connection,
) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await carry_out(connection, (INSERT, "before"), (FAULTY, 0), (INSERT, "behind"))
    assert await count(connection) == 0
    await carry_out(connection, (INSERT, "again"))  # the connection can be used
    assert await count(connection) == 1


async def test_statements_without_a_transaction_are_one_together(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await carry_out(connection, (INSERT, "before"), (FAULTY, 0), transaction=False)
    assert await count(connection) == 0


async def test_whoever_awaits_a_statement_behind_a_failed_one_gets_its_error(
    connection: Connection,
) -> None:
    async def ask() -> None:
        async with pipeline(connection) as send:
            send(FAULTY, 0)
            await send(ECHO, "never", 1)

    with pytest.raises(psycopg.errors.DivisionByZero):
        await ask()


async def test_a_statement_whose_preparation_was_skipped_is_prepared_when_it_is_sent_again(
    connection: Connection,
) -> None:
    behind = b"SELECT 'behind a failure', $1::int8"
    with pytest.raises(psycopg.errors.DivisionByZero):
        await carry_out(connection, (FAULTY, 0), (behind, 1))
    (answer,) = await carry_out(connection, (behind, 2))
    assert await answer == [("behind a failure", 2)]


async def test_a_statement_that_cannot_be_prepared_says_why_each_time(
    connection: Connection,
) -> None:
    for _ in range(2):
        with pytest.raises(psycopg.errors.UndefinedTable, match="nowhere"):
            await carry_out(connection, (b"SELECT * FROM nowhere",))


async def test_what_is_prepared_outlives_a_call_that_psycopg_rolls_back(
    database: Database,
) -> None:
    async def call(*, refused: bool) -> None:
        async with database.begin() as pooled:
            raw = await driver(pooled)
            async with pipeline(raw) as send:
                assert await send(ECHO, "one", 1) == [("one", 1)]
            for _ in range(10):  # so often that psycopg, left to itself, prepares it too
                await raw.execute(b"SELECT 2")
            if refused:
                raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            await call(refused=True)
        await call(refused=False)


async def test_an_error_of_the_block_rolls_back_and_is_raised(connection: Connection) -> None:
    async def fail() -> None:
        async with pipeline(connection, transaction=True) as send:
            send(INSERT, "before")
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await count(connection) == 0


async def test_a_parameter_that_postgresql_cannot_hold_fails_and_harms_nothing_else(
    connection: Connection,
) -> None:
    for bad in (object(), "\0", "\ud800"):
        with pytest.raises((psycopg.Error, UnicodeError)):
            await carry_out(connection, (INSERT, "before"), (INSERT, bad))
    assert await count(connection) == 0


async def test_more_than_the_sockets_hold_passes_both_ways_at_once(connection: Connection) -> None:
    large = "x" * 4_000_000
    async with pipeline(connection) as send:
        answers = [send(ECHO, large, number) for number in range(4)]
    for number, answer in enumerate(answers):
        ((text, seen),) = await answer
        assert (len(text), seen) == (len(large), number)


async def test_a_connection_that_breaks_is_an_error_and_no_hang(
    database: Database, connection: Connection
) -> None:
    async def break_it() -> None:
        async with pipeline(connection, transaction=True) as send:
            ((process,),) = await send(b"SELECT pg_backend_pid()")
            async with await database.connect("other") as other:
                await carry_out(other, (b"SELECT pg_terminate_backend($1::int4)", process))
            await send(b"SELECT pg_sleep(60)")

    with pytest.raises(psycopg.OperationalError):
        await break_it()
    assert connection.closed


async def test_a_connection_that_had_ended_before_is_an_error_of_the_connection(
    database: Database, connection: Connection
) -> None:
    async with await database.connect("other") as other:
        process = connection.info.backend_pid
        await carry_out(other, (b"SELECT pg_terminate_backend($1::int4)", process))

    def ended() -> bool:
        with suppress(psycopg.OperationalError):  # it says so once, and then it is in that state
            connection.pgconn.consume_input()
        return connection.closed

    await eventually(ended, describe="libpq has noticed")
    with pytest.raises(psycopg.OperationalError):
        await carry_out(connection, (b"SELECT 1",))


async def test_a_bound_ends_the_wait_for_an_answer(connection: Connection) -> None:
    with pytest.raises(psycopg.OperationalError), bounded(connection, 0.1):
        await carry_out(connection, (b"SELECT pg_sleep(60)",))


async def test_a_wait_that_is_cancelled_leaves_a_connection_that_can_be_used(
    connection: Connection,
) -> None:
    sent = asyncio.Event()

    async def work() -> None:
        async with pipeline(connection, transaction=True) as send:
            send(INSERT, "before")
            waiting = send(b"SELECT pg_sleep(0.3)")
            sent.set()
            await waiting

    task = asyncio.create_task(work())
    await sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await count(connection) == 0


async def test_a_pipeline_joins_the_transaction_that_is_open(database: Database) -> None:
    async with database.begin() as pooled:
        raw = await driver(pooled)
        await raw.execute(b"CREATE TEMPORARY TABLE made (name text) ON COMMIT DROP")
        async with pipeline(raw) as send:
            send(INSERT, "one")
        assert await count(raw) == 1  # the table is still there: nothing was committed
