"""Metrics added up by minute, hour and day, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import text

from federation_server.domain.analytics import (
    AnalyticsReport,
    Histogram,
    MetricKind,
    MetricPoint,
)
from federation_server.domain.rollup import WIDTHS, Level, floor
from federation_server.live.metrics import Metrics
from federation_server.live.rollup import Rollup
from federation_server.store import ingest, partitions
from federation_server.store.analytics import rollups
from federation_server.store.database import Connection, Database, current_time
from federation_server.store.ingest import DurableItem
from federation_server.store.pipeline import pipeline
from tests.support.metrics import report, roll_up
from tests.support.neurons import open_session, put_neuron
from tests.support.waiting import eventually

NEURON = "worker-1"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    async with database.begin() as connection:
        await put_neuron(connection, NEURON)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        await partitions.ensure_ahead(connection)
        days = [await partitions.today(connection) - offset * DAY for offset in range(4)]
        await partitions.ensure(connection, ["metric_points"], days)
        yield connection


async def rows(database: Database, table: str) -> list[Any]:
    query = f"SELECT bucket_time, count, sum, min, max FROM {table} ORDER BY bucket_time"  # noqa: S608
    async with database.begin() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


async def versions(database: Database, table: str) -> dict[str, list[Any]]:
    """Of each neuron: its rows' series, sum and version, which changes when a row is made anew."""
    query = (
        f"SELECT neuron_id, series_id, sum, r.xmin::text, r.ctid::text FROM {table} r"  # noqa: S608
        " JOIN metric_series USING (series_id) ORDER BY series_id"
    )
    found: dict[str, list[Any]] = {}
    async with database.begin() as connection:
        for neuron_id, *row in await connection.execute(text(query)):
            found.setdefault(neuron_id, []).append(tuple(row))
    return found


async def ago(database: Database, **span: int) -> datetime:
    """A whole hour so long ago, by PostgreSQL's clock."""
    async with database.begin() as connection:
        return floor(await current_time(connection), HOUR) - timedelta(**span)


async def apply(connection: Connection, epoch: int, sequence: int, *, age: timedelta) -> None:
    """A neuron's report of one row, by the way that all take."""
    point = MetricPoint("rows", MetricKind.COUNTER, "rows", {}, 1.0)
    made = AnalyticsReport(age, [point], [])
    item = DurableItem(NEURON, epoch, "spool-1", sequence, made)
    await ingest.apply(connection, [], [item], [], oldest_point=7 * DAY)


async def test_minutes_add_up_to_hours_and_hours_to_days(
    database: Database, connection: Connection
) -> None:
    day = floor(await ago(database, days=2), DAY)
    points = {day + timedelta(minutes=30 * n, seconds=s): 1.0 for n in range(48) for s in (0, 59)}
    await report(database, NEURON, "rows", MetricKind.COUNTER, points)
    await roll_up(database)
    assert len(await rows(database, "metric_minutes")) == 48
    assert [row[1:3] for row in await rows(database, "metric_hours")] == [(4, 4.0)] * 24
    assert await rows(database, "metric_days") == [(day, 96, 96.0, 1.0, 1.0)]


async def test_a_gauges_rollup_keeps_the_number_of_points_and_the_extremes(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=1)
    points = {hour: 4.0, hour + timedelta(seconds=1): -2.0, hour + timedelta(minutes=9): 7.0}
    await report(database, NEURON, "depth", MetricKind.GAUGE, points)
    await roll_up(database)
    assert await rows(database, "metric_hours") == [(hour, 3, 9.0, -2.0, 7.0)]


async def test_histograms_are_added_up_by_their_bounds(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=1)
    one = Histogram([10.0], [1, 2], 30.0, 5.0, 20.0)
    other = Histogram([1.0, 2.0], [0, 0, 3], 9.0, 3.0, 3.0)
    points = {hour: one, hour + timedelta(seconds=1): one, hour + timedelta(seconds=2): other}
    await report(database, NEURON, "ms", MetricKind.HISTOGRAM, points)
    await roll_up(database)
    async with database.begin() as reading:
        query = (
            "SELECT bounds, bucket_counts, count FROM metric_hours JOIN metric_series"
            " USING (series_id) ORDER BY count"
        )
        found = [tuple(row) for row in await reading.execute(text(query))]
    assert found == [([1.0, 2.0], [0, 0, 3], 3), ([10.0], [2, 4], 6)]


async def test_a_minute_that_has_not_ended_is_not_rolled_up(
    database: Database, connection: Connection
) -> None:
    now = await ago(database, hours=1)  # where no hour ends soon
    await report(database, NEURON, "rows", MetricKind.COUNTER, {now: 1.0})
    assert await roll_up(database, now=now) == 0
    assert await rows(database, "metric_minutes") == []
    assert await roll_up(database, now=now + timedelta(minutes=2)) == 1
    until = await rollups.rolled_up_until(connection)
    assert until[Level.MINUTE] == floor(now + timedelta(seconds=110), WIDTHS[Level.MINUTE])


async def test_a_report_that_comes_days_late_ends_up_in_every_level(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    await apply(connection, epoch, 1, age=2 * DAY)
    await roll_up(database)
    before = await rows(database, "metric_days")
    await apply(connection, epoch, 2, age=2 * DAY + timedelta(seconds=1))
    await roll_up(database)
    after = await rows(database, "metric_days")
    assert sum(row[2] for row in before) == 1.0
    assert sum(row[2] for row in after) == 2.0


async def test_what_one_neuron_sends_late_makes_no_row_of_another_anew(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=2)
    one, other = {hour: 1.0}, {hour: 5.0}
    both = Histogram([1.0], [0, 1], 2.0, 2.0, 2.0)
    async with database.begin() as writing:
        await put_neuron(writing, "worker-2")
    await report(database, NEURON, "rows", MetricKind.COUNTER, one)
    await report(database, NEURON, "ms", MetricKind.HISTOGRAM, {hour: both})
    await report(database, "worker-2", "rows", MetricKind.COUNTER, other)
    await report(database, "worker-2", "ms", MetricKind.HISTOGRAM, {hour: both})
    await roll_up(database)
    before = {table: await versions(database, table) for table in rollups.TABLES.values()}
    epoch = (await open_session(database, NEURON)).epoch
    async with database.begin() as reading:
        age = await current_time(reading) - hour
    await apply(connection, epoch, 1, age=age - timedelta(seconds=20))
    assert await roll_up(database) == 3
    for table, rows_before in before.items():
        after = await versions(database, table)
        assert after["worker-2"] == rows_before["worker-2"], table
        assert [row[1] for row in rows_before[NEURON]] == [1.0, 2.0], table
        assert [row[1] for row in after[NEURON]] == [2.0, 2.0], table


@pytest.mark.parametrize("neurons", [rollups.MOST_NEURONS, rollups.MOST_NEURONS + 1])
async def test_what_many_neurons_send_late_is_rolled_up_as_well(
    database: Database, connection: Connection, neurons: int
) -> None:
    hour = await ago(database, days=2)
    names = [f"late-{number}" for number in range(neurons)]
    async with database.begin() as writing:
        for name in names:
            await put_neuron(writing, name)
    await report(database, NEURON, "rows", MetricKind.COUNTER, {hour: 1.0})
    await roll_up(database)
    for name in names:
        await report(database, name, "rows", MetricKind.COUNTER, {hour: 2.0})
    async with pipeline(connection) as send:
        send(b"DELETE FROM stale_rollups")
        rollups.mark(send, Level.MINUTE, [rollups.Mark(hour, name) for name in names])
    await roll_up(database)
    for table in rollups.TABLES.values():
        sums = [row[2] for row in await rows(database, table)]
        assert sorted(sums) == [1.0] + [2.0] * neurons


async def test_a_report_that_is_sent_twice_is_rolled_up_once(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for _ in range(2):
        await apply(connection, epoch, 1, age=2 * DAY)
        await roll_up(database)
    assert [row[1] for row in await rows(database, "metric_days")] == [1]


async def test_rolling_up_the_same_again_changes_nothing(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=1)
    await report(database, NEURON, "rows", MetricKind.COUNTER, {hour: 3.0})
    await roll_up(database)
    before = [await rows(database, table) for table in rollups.TABLES.values()]
    assert await roll_up(database) == 0
    async with database.begin() as writing:
        mark = "INSERT INTO stale_rollups SELECT 'MINUTE', cast(:hour AS timestamptz)"
        await writing.execute(text(mark), {"hour": hour})
    assert await roll_up(database) > 0
    assert [await rows(database, table) for table in rollups.TABLES.values()] == before


async def test_what_came_before_the_upgrade_is_rolled_up_as_well(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=1)
    points = {hour + timedelta(minutes=n): 1.0 for n in range(3 * rollups.AT_A_TIME[Level.MINUTE])}
    await report(database, NEURON, "rows", MetricKind.COUNTER, points)
    made = await roll_up(database)
    assert made >= len(points)
    assert sum(row[1] for row in await rows(database, "metric_hours")) == len(points)


async def test_one_server_rolls_up_and_another_takes_over_when_it_ends(
    database: Database, connection: Connection
) -> None:
    hour = await ago(database, days=1)
    await report(database, NEURON, "rows", MetricKind.COUNTER, {hour: 1.0})
    metrics = [Metrics(), Metrics()]

    def made(number: int) -> float:
        return metrics[number].registry.get_sample_value("federation_rollups_total") or 0.0

    first, second = (asyncio.create_task(Rollup(database, each).run()) for each in metrics)
    try:
        await eventually(lambda: made(0) + made(1) == 3)
        (working, idle) = (0, 1) if made(0) else (1, 0)
        (first, second)[working].cancel()
        await report(database, NEURON, "depth", MetricKind.GAUGE, {hour: 1.0})
        await eventually(lambda: made(idle) == 3, within=20.0)
    finally:
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


def test_months_hold_the_coarse_rollups_and_days_the_fine() -> None:
    day = datetime(2026, 12, 31, tzinfo=UTC).date()
    assert partitions.first_day("metric_hours", day) == day.replace(day=1)
    assert partitions.first_day("metric_minutes", day) == day
    assert partitions.next_first_day("metric_days", day.replace(day=1)).isoformat() == "2027-01-01"
