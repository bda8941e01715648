"""AnalyticsService over real gRPC and PostgreSQL: the names of the metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest_asyncio

from federation.v1 import analytics_service_pb2 as pb
from federation_server.domain.analytics import MetricKind
from federation_server.rpc.convert import from_timestamp
from federation_server.store.database import Database
from tests.support.fleet import put
from tests.support.metrics import Analytics, report, serving_analytics

COUNTER, GAUGE = MetricKind.COUNTER, MetricKind.GAUGE
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def analytics(database: Database) -> AsyncIterator[Analytics]:
    async with serving_analytics(database) as analytics:
        yield analytics


async def names(analytics: Analytics, prefix: str = "") -> list[tuple[str, str, str]]:
    """Name, kind and unit of the metrics in a list that is read in pages of two."""
    found: list[tuple[str, str, str]] = []
    token = ""
    while True:
        page = await analytics.ListMetricNames(
            pb.ListMetricNamesRequest(prefix=prefix, page_size=2, page_token=token)
        )
        found += [
            (metric.name, pb.MetricKind.Name(metric.kind).removeprefix("METRIC_KIND_"), metric.unit)
            for metric in page.metrics
        ]
        token = page.next_page_token
        if not token:
            return found


async def test_metric_names_are_listed_once_for_each_kind_in_order(
    analytics: Analytics, database: Database
) -> None:
    for neuron_id in ("a", "b"):
        await put(database, neuron_id)
        for name in ("rows", "depth", "errors"):
            await report(database, neuron_id, name, GAUGE, {}, unit=neuron_id)
        await report(database, neuron_id, "rows", COUNTER, {}, unit="rows")
    assert await names(analytics) == [
        ("depth", "GAUGE", "b"),
        ("errors", "GAUGE", "b"),
        ("rows", "COUNTER", "rows"),
        ("rows", "GAUGE", "b"),
    ]


async def test_a_prefix_is_taken_as_it_is_written(analytics: Analytics, database: Database) -> None:
    await put(database, "n1")
    for name in ("rows_in", "rowsXin", "rows_out", "other"):
        await report(database, "n1", name, COUNTER, {})
    assert [name for name, _, _ in await names(analytics, "rows_")] == ["rows_in", "rows_out"]
    assert await names(analytics, "%") == []


async def test_a_metric_says_when_it_was_last_reported(
    analytics: Analytics, database: Database
) -> None:
    for neuron_id, hours in (("a", 1), ("b", 3), ("c", 2)):
        await put(database, neuron_id)
        time = NOON + timedelta(hours=hours)
        await report(database, neuron_id, "rows", COUNTER, {}, last_report_time=time)
    page = await analytics.ListMetricNames(pb.ListMetricNamesRequest())
    assert from_timestamp(page.metrics[0].last_report_time) == NOON + timedelta(hours=3)
