"""Refused attempts on their way into the audit log: grouped, bounded, and none forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import select

from federation_server.domain.audit import Entry
from federation_server.live import refusals
from federation_server.live.refusals import PAUSE_S, Refusals
from federation_server.store.database import Database
from federation_server.store.schema import audit_entries
from tests.support.gate import Clock
from tests.support.waiting import eventually


class Log:
    """Refusals that run, on a clock that is turned by hand, and what they have written."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = Clock()
        self.refusals = Refusals(database, clock=self.clock)

    def note(self, times: int = 1, **fields: Any) -> None:
        said = {"outcome": "UNAUTHENTICATED", "reason": "CREDENTIAL_INVALID", "peer": "10.0.0.7"}
        for _ in range(times):
            self.refusals.note(Entry(**(said | fields)))

    async def column(self, name: str) -> list[Any]:
        query = select(audit_entries.c[name]).order_by(audit_entries.c.entry_id)
        async with self.database.begin() as connection:
            return list((await connection.execute(query)).scalars())

    async def counts(self, *wanted: int) -> None:
        """Waits until the entries stand for so many attempts each."""

        async def look() -> bool:
            return sorted(await self.column("count")) == sorted(wanted)

        await eventually(look, describe=f"entries of {wanted} attempts")


@pytest_asyncio.fixture
async def log(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Log]:
    monkeypatch.setattr(refusals, "INTERVAL_S", 0.01)
    log = Log(Database(database_url))
    task = asyncio.create_task(log.refusals.run())
    yield log
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await log.database.close()


async def test_those_that_are_alike_make_one_entry_at_once_and_one_a_minute(log: Log) -> None:
    log.note()
    await log.counts(1)
    log.note(1000)
    log.note(peer="10.0.0.8")  # written beside them, so they had their chance
    await log.counts(1, 1)
    log.clock.now += PAUSE_S - 1
    log.note(peer="10.0.0.9")
    await log.counts(1, 1, 1)
    log.clock.now += 1
    await log.counts(1, 1, 1, 1000)


async def test_what_comes_while_others_are_written_is_not_forgotten(log: Log) -> None:
    async def waits() -> bool:
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with log.database.begin() as connection:
            return bool((await connection.exec_driver_sql(query)).scalar_one())

    async with await log.database.connect("blocker") as blocker, blocker.transaction():
        await blocker.execute(b"LOCK TABLE audit_entries IN SHARE MODE")
        log.note()
        await eventually(waits, describe="the entry is being written")
        log.note(5)
    await log.counts(1)
    await log.refusals.finish()
    await log.counts(1, 5)


async def test_strangers_are_told_apart_by_address_and_reason_alone(log: Log) -> None:
    log.note(method="/a", neuron_id="n1")
    log.note(method="/b", neuron_id="n1")
    log.note(reason="CREDENTIAL_MISSING")
    await log.counts(2, 1)
    assert await log.column("method") == ["", ""]
    assert await log.column("neuron_id") == ["n1", ""]


async def test_who_is_known_is_told_apart_by_what_it_asked_for(log: Log) -> None:
    known: dict[str, Any] = {
        "outcome": "NOT_FOUND",
        "reason": "NEURON_NOT_FOUND",
        "actor": "admin:a",
    }
    log.note(**known, object_id="1")
    log.note(**known, object_id="2")
    log.note(**known, object_id="2")
    await log.counts(1, 2)


async def test_beyond_the_bound_attempts_are_told_apart_by_their_reason(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST_GROUPS", 3)
    for number in range(50):
        log.note(peer=f"10.0.0.{number}")
    log.note(reason="CREDENTIAL_MISSING")
    await log.counts(1, 1, 1, 1, 47)
    assert (await log.column("peer"))[3:] == ["", "10.0.0.7"]


async def test_a_group_that_nobody_comes_to_any_more_makes_room(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MOST_GROUPS", 1)
    log.note(peer="10.0.0.1")
    await log.counts(1)
    log.clock.now += PAUSE_S

    def empty() -> bool:
        return not log.refusals._groups

    await eventually(empty, describe="no group is left")
    log.note(peer="10.0.0.2")
    log.note(peer="10.0.0.2")
    await log.counts(1, 2)
    assert await log.column("peer") == ["10.0.0.1", "10.0.0.2"]


async def test_at_the_end_nothing_waits_for_its_minute(log: Log) -> None:
    log.note()
    await log.counts(1)
    log.note(3)
    await log.refusals.finish()
    assert await log.column("count") == [1, 3]
