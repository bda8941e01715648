"""Sessions are opened together, and none of them waits for, or spoils, another one's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import text

from federation_server.live.opener import Opener
from federation_server.store.database import Database
from federation_server.store.sessions import NewSession, OpenedSession
from tests.support.neurons import new_session, put_neuron
from tests.support.waiting import eventually

SERVER_ID = "server-1"


class Opening:
    """An opener that runs, and what it has opened in vain."""

    def __init__(self, database: Database) -> None:
        self.unwanted: list[tuple[str, int]] = []
        self.opener = Opener(database, SERVER_ID, unwanted=self._give_up)
        self.database = database

    def _give_up(self, new: NewSession, epoch: int) -> None:
        self.unwanted.append((new.neuron_id, epoch))

    def open(self, neuron_id: str) -> asyncio.Task[OpenedSession | None]:
        return asyncio.create_task(self.opener.open(new_session(neuron_id)))

    async def ask(self, query: str) -> Any:
        async with self.database.begin() as connection:
            return (await connection.execute(text(query))).scalar_one()

    async def blocked(self) -> bool:
        """Whether the opener waits for a lock."""
        return bool(
            await self.ask(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND application_name = 'federation-opener' AND datname = current_database()"
            )
        )


@asynccontextmanager
async def locked(database: Database, table: str, neuron_id: str) -> AsyncIterator[None]:
    """Somebody else changes the neuron's row for as long as the block lasts."""
    async with database.begin() as connection:
        lock = f"SELECT FROM {table} WHERE neuron_id = :neuron_id FOR UPDATE"
        await connection.execute(text(lock), {"neuron_id": neuron_id})
        yield


@pytest_asyncio.fixture
async def opening(database_url: str) -> AsyncIterator[Opening]:
    database = Database(database_url)
    async with database.begin() as connection:
        for neuron_id in ("a", "b", *(f"herd-{number}" for number in range(250))):
            await put_neuron(connection, neuron_id)
    opening = Opening(database)
    running = asyncio.create_task(opening.opener.run())
    yield opening
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await database.close()


async def test_a_herd_shares_transactions_and_each_gets_its_own_session(opening: Opening) -> None:
    opened = await asyncio.gather(*(opening.open(f"herd-{number}") for number in range(250)))
    assert [each and each.epoch for each in opened] == [1] * 250
    open_here = f"FROM neuron_states WHERE session_open AND server_id = '{SERVER_ID}'"
    assert await opening.ask(f"SELECT count(DISTINCT session_id) {open_here}") == 250
    assert await opening.ask(f"SELECT count(DISTINCT session_open_time) {open_here}") == 3


async def test_two_streams_of_one_neuron_get_sessions_of_which_the_later_is_the_newest(
    opening: Opening,
) -> None:
    first, second = await asyncio.gather(opening.open("a"), opening.open("a"))
    assert first is not None
    assert second is not None
    assert (first.epoch, second.epoch) == (1, 2)
    assert (first.previous_server_id, second.previous_server_id) == (None, SERVER_ID)


@pytest.mark.parametrize("table", ["neurons", "neuron_states"])
async def test_a_neuron_that_is_being_changed_keeps_no_other_waiting(
    opening: Opening, table: str
) -> None:
    async with locked(opening.database, table, "a"):
        busy = opening.open("a")
        other = await opening.open("b")
        assert other is not None
        assert not busy.done()
    opened = await busy
    assert opened is not None
    assert opened.epoch == 1


async def test_a_stream_that_ends_before_its_turn_opens_no_session(opening: Opening) -> None:
    async with locked(opening.database, "neuron_states", "a"):
        gone = opening.open("a")
        await opening.open("b")
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await opening.open("b")  # so that nothing asks for the other any more
    epoch = "SELECT session_epoch FROM neuron_states WHERE neuron_id = 'a'"
    assert await opening.ask(epoch) == 0
    assert opening.unwanted == []


async def test_a_session_whose_stream_has_ended_meanwhile_is_given_up(opening: Opening) -> None:
    async with opening.database.begin() as connection:
        await connection.execute(text("LOCK TABLE neuron_states"))
        gone = opening.open("a")
        await eventually(opening.blocked, describe="the session is being opened")
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert opening.unwanted == []
    await eventually(lambda: opening.unwanted == [("a", 1)], describe="it is given up")


async def test_without_postgresql_a_stream_is_told_so_at_once(opening: Opening) -> None:
    opening.database.lost()
    with pytest.raises(psycopg.OperationalError):
        await opening.open("a")
    opening.database.found()
    assert await opening.open("a") is not None
