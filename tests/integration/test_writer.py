"""The group commit: batches, poison, and a PostgreSQL that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest_asyncio
from sqlalchemy import text

from federation_server.domain.analytics import AnalyticsReport, MetricKind, MetricPoint
from federation_server.domain.neuron import Presence
from federation_server.live.metrics import Metrics
from federation_server.live.writer import FLUSH_BYTES, Writer
from federation_server.store import migrate, partitions
from federation_server.store.database import Database
from federation_server.store.embedded import EmbeddedPostgres
from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem
from tests.support.neurons import heartbeat, open_session, put_neuron
from tests.support.waiting import eventually


class Teller:
    """A sender that notes what it is told."""

    def __init__(self) -> None:
        self.marks: list[int] = []
        self.was_fenced = False
        self.refusals: list[tuple[int, str]] = []

    def stored(self, mark: int, time: datetime) -> None:
        self.marks.append(mark)

    def fenced(self) -> None:
        self.was_fenced = True

    def refused(self, sequence: int, message: str) -> None:
        self.refusals.append((sequence, message))


@asynccontextmanager
async def writing(
    database: Database, *, flush_interval: timedelta = timedelta(milliseconds=20)
) -> AsyncIterator[tuple[Writer, Metrics]]:
    metrics = Metrics()
    writer = Writer(
        database,
        metrics,
        flush_interval=flush_interval,
        oldest_point=timedelta(days=7),
        changed=lambda changes, news: None,
        followed=lambda command_ids: (),
    )
    task = asyncio.create_task(writer.run())
    try:
        yield writer, metrics
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


async def neuron(database: Database, neuron_id: str) -> int:
    async with database.begin() as connection:
        await put_neuron(connection, neuron_id)
    return (await open_session(database, neuron_id)).epoch


async def value(database: Database, query: str) -> Any:
    async with database.begin() as connection:
        return (await connection.execute(text(query))).scalar()


def report(number: float, *, name: str = "rows", age: timedelta = timedelta()) -> AnalyticsReport:
    return AnalyticsReport(age, [MetricPoint(name, MetricKind.COUNTER, "", {}, number)], [])


def durable(neuron_id: str, epoch: int, sequence: int, payload: AnalyticsReport) -> DurableItem:
    return DurableItem(neuron_id, epoch, "spool-1", sequence, payload)


async def test_the_first_write_makes_the_partitions_that_are_missing(database: Database) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database) as (writer, _):
        writer.heartbeat(teller, HeartbeatItem("n", epoch, "i", heartbeat()))
        late = report(1.0, age=timedelta(days=5))
        writer.durable(teller, durable("n", epoch, 1, late), 100)
        await eventually(lambda: 1 in teller.marks, describe="the report is stored")
    assert await value(database, "SELECT count(*) FROM heartbeats") == 1


async def test_of_two_heartbeats_that_wait_the_newer_is_written_and_both_senders_are_told(
    database: Database,
) -> None:
    epoch = await neuron(database, "n")
    older, newer = Teller(), Teller()
    async with writing(database, flush_interval=timedelta(milliseconds=200)) as (writer, _):
        writer.heartbeat(older, HeartbeatItem("n", epoch, "i", heartbeat(health_score=1.0)))
        writer.heartbeat(newer, HeartbeatItem("n", epoch, "i", heartbeat(health_score=2.0)))
        await eventually(lambda: bool(older.marks and newer.marks), describe="both are told")
    assert await value(database, "SELECT array_agg(health_score) FROM heartbeats") == [2.0]


async def test_a_report_waits_for_others_until_somebody_is_in_a_hurry(database: Database) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database, flush_interval=timedelta(hours=1)) as (writer, _):
        writer.durable(teller, durable("n", epoch, 1, report(1.0)), 100)
        await value(database, "SELECT pg_sleep(0.1)")  # in which it would have been written
        assert teller.marks == []
        writer.hurry()
        await eventually(lambda: teller.marks == [1], describe="the report is stored")


async def test_reports_that_fill_a_transaction_wait_no_longer(database: Database) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database, flush_interval=timedelta(hours=1)) as (writer, _):
        writer.durable(teller, durable("n", epoch, 1, report(1.0)), FLUSH_BYTES + 1)
        await eventually(lambda: teller.marks == [1], describe="the report is stored")


async def test_a_poison_message_is_refused_to_its_sender_and_the_rest_is_written(
    database: Database,
) -> None:
    tellers = {f"n{number}": Teller() for number in range(8)}
    epochs = {neuron_id: await neuron(database, neuron_id) for neuron_id in tellers}
    async with writing(database) as (writer, metrics):
        for neuron_id, teller in tellers.items():
            name = "bad\0name" if neuron_id == "n5" else "rows"
            item = durable(neuron_id, epochs[neuron_id], 1, report(1.0, name=name))
            writer.durable(teller, item, 100)
        await eventually(
            lambda: all(1 in teller.marks for teller in tellers.values()),
            describe="every sequence is acknowledged",
        )
        assert metrics.registry.get_sample_value("federation_refused_total") == 1
    assert tellers["n5"].refusals == [(1, "analytics_report")]
    assert await value(database, "SELECT sum(value) FROM metric_points") == 7.0
    assert [t for n, t in tellers.items() if t.refusals and n != "n5"] == []


async def test_a_poison_heartbeat_is_refused_and_the_others_are_written(
    database: Database,
) -> None:
    tellers = {f"n{number}": Teller() for number in range(5)}
    epochs = {neuron_id: await neuron(database, neuron_id) for neuron_id in tellers}
    async with writing(database) as (writer, _):
        for neuron_id, teller in tellers.items():
            beat = heartbeat()
            if neuron_id == "n2":
                beat = beat._replace(versions='{"service":"bad\\u0000"}')
            writer.heartbeat(teller, HeartbeatItem(neuron_id, epochs[neuron_id], "i", beat))
        await eventually(
            lambda: all(t.marks or t.refusals for t in tellers.values()), describe="all are told"
        )
    assert tellers["n2"].refusals == [(0, "heartbeat")]
    assert await value(database, "SELECT count(*) FROM heartbeats") == 4


async def test_a_poison_heartbeat_beside_a_session_that_is_opened_again_stops_nothing(
    database: Database,
) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database, flush_interval=timedelta(hours=1)) as (writer, _):
        beat = heartbeat()._replace(versions='{"service":"bad\\u0000"}')
        writer.heartbeat(teller, HeartbeatItem("n", epoch, "i", beat))
        writer.reopen("n", epoch)
        await eventually(lambda: bool(teller.refusals), describe="the heartbeat is refused")
        writer.durable(teller, durable("n", epoch, 1, report(1.0)), 100)
        writer.hurry()
        await eventually(lambda: teller.marks == [1], describe="the writer goes on")


async def test_a_report_is_placed_by_when_it_came_and_not_by_when_it_was_written(
    database: Database,
) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database) as (writer, _):
        item = durable("n", epoch, 1, report(1.0, age=timedelta(minutes=5)))
        an_hour_ago = time.monotonic() - 3600
        writer.durable(teller, item._replace(receive_clock=an_hour_ago), 100)
        await eventually(lambda: teller.marks == [1], describe="the report is stored")
    age = await value(database, "SELECT now() - point_time FROM metric_points")
    assert timedelta(minutes=65) <= age < timedelta(minutes=66)


async def test_a_superseded_sender_is_told_so(database: Database) -> None:
    old = await neuron(database, "n")
    await open_session(database, "n")
    teller = Teller()
    async with writing(database) as (writer, _):
        writer.heartbeat(teller, HeartbeatItem("n", old, "i", heartbeat()))
        await eventually(lambda: teller.was_fenced, describe="the sender is fenced")


async def test_what_was_sent_before_the_end_of_a_session_is_written_before_it_closes(
    database: Database,
) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database) as (writer, _):
        writer.durable(teller, durable("n", epoch, 1, report(1.0)), 100)
        writer.close(ClosedItem("n", epoch, Presence.OFFLINE, "bye"))
        assert await writer.stop(within=timedelta(seconds=10))
    assert teller.marks == [1]
    assert await value(database, "SELECT presence FROM neuron_states") == "OFFLINE"


async def test_a_stop_writes_the_heartbeats_that_still_wait(database: Database) -> None:
    epoch = await neuron(database, "n")
    async with writing(database, flush_interval=timedelta(hours=1)) as (writer, _):
        writer.heartbeat(Teller(), HeartbeatItem("n", epoch, "i", heartbeat()))
        assert await writer.stop(within=timedelta(seconds=10))
    assert await value(database, "SELECT count(*) FROM heartbeats") == 1


async def test_what_waits_for_postgresql_has_an_age_until_it_is_committed(
    database: Database,
) -> None:
    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database) as (writer, metrics), await database.connect("test") as locking:
        assert writer.lag() == 0.0
        await locking.execute(b"BEGIN")
        await locking.execute(b"LOCK TABLE neuron_states IN ACCESS EXCLUSIVE MODE")
        writer.heartbeat(teller, HeartbeatItem("n", epoch, "i", heartbeat()))
        await eventually(lambda: writer.lag() > 0.5, describe="it has waited for a while")
        await locking.execute(
            b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            b" WHERE application_name = 'federation-writer' AND datname = current_database()"
        )
        failures = "federation_flush_failures_total"
        await eventually(
            lambda: metrics.registry.get_sample_value(failures), describe="a flush failed"
        )
        aged = writer.lag()
        assert aged > 0.5  # a flush that fails makes nothing younger
        await eventually(lambda: writer.lag() > aged, describe="it waits on")
        await locking.execute(b"COMMIT")
        await eventually(lambda: writer.lag() == 0.0, describe="nothing waits any more")
        assert teller.marks == [0]


async def test_nothing_is_lost_or_doubled_while_postgresql_is_away(folder: Path) -> None:
    embedded = EmbeddedPostgres(folder / "data")
    url = await asyncio.to_thread(embedded.start)
    try:
        await asyncio.to_thread(migrate.upgrade, url)
        database = Database(url)
        async with await database.connect("test") as connection:
            await partitions.ensure_ahead(connection)
        epoch = await neuron(database, "n")
        teller = Teller()
        async with writing(database) as (writer, metrics):
            writer.durable(teller, durable("n", epoch, 1, report(1.0)), 100)
            await eventually(lambda: teller.marks == [1], describe="the first is stored")
            await asyncio.to_thread(embedded.stop)
            for sequence in (2, 3):
                writer.durable(teller, durable("n", epoch, sequence, report(1.0)), 100)
                writer.heartbeat(teller, HeartbeatItem("n", epoch, "i", heartbeat()))
            await eventually(
                lambda: bool(metrics.registry.get_sample_value("federation_flush_failures_total")),
                describe="a flush has failed",
            )
            assert teller.marks == [1]
            await asyncio.to_thread(embedded.start)
            await eventually(lambda: 3 in teller.marks, within=30, describe="all is stored")
        assert await value(database, "SELECT sum(value) FROM metric_points") == 3.0
        await database.close()
    finally:
        await asyncio.to_thread(embedded.stop)


async def test_readers_wait_while_too_much_is_unwritten(database: Database) -> None:
    from federation_server.live.writer import CAPACITY_BYTES

    epoch = await neuron(database, "n")
    teller = Teller()
    async with writing(database) as (writer, _):
        writer.durable(teller, durable("n", epoch, 1, report(1.0)), CAPACITY_BYTES + 1)
        room = asyncio.create_task(writer.room())
        await asyncio.sleep(0)
        assert (room.done(), writer.full) == (False, True)
        await asyncio.wait_for(room, 10)
        assert not writer.full
        assert teller.marks == [1]
