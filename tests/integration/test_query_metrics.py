"""AnalyticsService over real gRPC and PostgreSQL: metrics over time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import text

from federation.v1 import analytics_service_pb2 as pb
from federation_server.domain.analytics import Histogram, MetricKind
from federation_server.domain.neuron import Presence
from federation_server.domain.rollup import Level
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.store import partitions
from federation_server.store.analytics import query as metrics
from federation_server.store.analytics import rollups
from federation_server.store.database import Database, current_time, driver
from federation_server.store.pipeline import pipeline
from tests.support.fleet import put
from tests.support.metrics import Analytics, report, roll_up, serving_analytics
from tests.support.servers import refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MINUTE = timedelta(minutes=1)
COUNTER, GAUGE, HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


class Reading:
    """AnalyticsService, asked about points as they came, or once they have been rolled up."""

    def __init__(self, stub: Analytics, database: Database, *, rolled_up: bool) -> None:
        self._stub = stub
        self._database = database
        self._rolled_up = rolled_up

    async def QueryMetrics(  # noqa: N802 - as the stub calls it
        self, request: pb.QueryMetricsRequest
    ) -> pb.QueryMetricsResponse:
        if self._rolled_up:
            await roll_up(self._database)
        return await self._stub.QueryMetrics(request)


@pytest_asyncio.fixture(params=["points", "rollups"])
async def analytics(database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Reading]:
    async with serving_analytics(database) as stub:
        yield Reading(stub, database, rolled_up=request.param == "rollups")


@pytest_asyncio.fixture
async def noon(database: Database) -> datetime:
    """Noon of the day before, by PostgreSQL's clock; that day and the next have partitions."""
    async with await database.connect("test") as connection:
        await partitions.ensure_ahead(connection)
    async with database.begin() as connection:
        now = await current_time(connection)
    return datetime(now.year, now.month, now.day, 12, tzinfo=UTC) - timedelta(days=1)


def stamp(time: datetime) -> Timestamp:
    made = to_timestamp(time)
    assert made is not None
    return made


async def ask(
    analytics: Reading,
    name: str,
    start: datetime,
    *,
    span: timedelta = timedelta(hours=1),
    width: int = 60,
    **fields: Any,
) -> pb.QueryMetricsResponse:
    return await analytics.QueryMetrics(
        pb.QueryMetricsRequest(
            name=name,
            start_time=stamp(start),
            end_time=stamp(start + span),
            bucket_width=Duration(seconds=width),
            **fields,
        )
    )


def groups(response: pb.QueryMetricsResponse) -> list[dict[str, str]]:
    return [dict(series.group) for series in response.series]


def absent(bucket: pb.MetricBucket) -> set[str]:
    filled = {field.name for field, _ in bucket.ListFields()}
    return set(bucket.DESCRIPTOR.fields_by_name) - filled


# --- what a bucket says ---


async def test_a_counters_bucket_has_a_sum_and_a_rate(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    points = {noon: 10.0, noon + timedelta(seconds=59): 20.0, noon + MINUTE: 6.0}
    await report(database, "n1", "rows", COUNTER, points, unit="rows")
    (series,) = (await ask(analytics, "rows", noon)).series
    assert (series.kind, series.unit) == (pb.METRIC_KIND_COUNTER, "rows")
    first, second = series.buckets
    assert from_timestamp(first.start_time) == noon
    assert (first.count, first.sum, first.rate) == (2, 30.0, 0.5)
    assert (second.count, second.sum, second.rate) == (1, 6.0, 0.1)
    assert absent(first) == {"mean", "min", "max", "p50", "p90", "p99"}


async def test_a_gauges_bucket_has_a_mean_and_extremes(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    points = {noon: -1.0, noon + timedelta(seconds=1): 2.0, noon + timedelta(seconds=2): 5.0}
    await report(database, "n1", "depth", GAUGE, points)
    (series,) = (await ask(analytics, "depth", noon)).series
    (bucket,) = series.buckets
    assert (bucket.count, bucket.mean, bucket.min, bucket.max) == (3, 2.0, -1.0, 5.0)
    assert absent(bucket) == {"sum", "rate", "p50", "p90", "p99"}


async def test_histograms_of_many_neurons_add_up_bucket_by_bucket(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    for neuron_id, counts, least, greatest in (("a", [4, 0, 0], 1, 9), ("b", [0, 4, 2], 11, 60)):
        await put(database, neuron_id)
        histogram = Histogram([10, 20], counts, 60.0, least, greatest)
        await report(database, neuron_id, "ms", HISTOGRAM, {noon: histogram}, unit="ms")
    (series,) = (await ask(analytics, "ms", noon)).series
    (bucket,) = series.buckets
    whole = Histogram([10, 20], [4, 4, 2], 120.0, 1, 60)
    assert (bucket.count, bucket.sum, bucket.mean) == (10, 120.0, 12.0)
    assert bucket.rate == pytest.approx(10 / 60)
    assert (bucket.min, bucket.max) == (1, 60)
    assert (bucket.p50, bucket.p90) == (whole.quantile(0.5), whole.quantile(0.9))
    assert bucket.p99 == whole.quantile(0.99)


async def test_histograms_with_other_bounds_are_merged_into_those_of_the_fullest(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    few = Histogram([40], [2, 0], 40.0, 0, 40)
    many = Histogram([10, 20, 30], [30, 5, 3, 2], 800.0, 0, 40)
    for neuron_id, histogram in (("a", few), ("b", many), ("c", few)):
        await put(database, neuron_id)
        await report(database, neuron_id, "ms", HISTOGRAM, {noon: histogram})
    (series,) = (await ask(analytics, "ms", noon)).series
    merged = many.merge(Histogram([40], [4, 0], 80.0, 0, 40))
    assert (series.buckets[0].count, series.buckets[0].sum) == (44, 880.0)
    assert series.buckets[0].p50 == merged.quantile(0.5)


async def test_a_least_value_that_one_neuron_does_not_know_is_absent(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    nothing = [0, 0]
    for neuron_id, least, counts in (
        ("a", 1.0, [1, 0]),
        ("b", None, [1, 0]),
        ("c", None, nothing),
        ("d", 0.5, nothing),
    ):
        await put(database, neuron_id)
        histogram = Histogram([10], counts, 5.0, least, 9.0)
        await report(database, neuron_id, "ms", HISTOGRAM, {noon: histogram})
    (series,) = (await ask(analytics, "ms", noon)).series
    assert absent(series.buckets[0]) == {"min"}
    (series,) = (await ask(analytics, "ms", noon, filter="neuron_id != b")).series
    assert series.buckets[0].min == 1.0


async def test_a_histogram_without_observations_has_a_bucket_without_a_mean(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    await report(database, "n1", "ms", HISTOGRAM, {noon: Histogram([10], [0, 0], 0.0)})
    (series,) = (await ask(analytics, "ms", noon)).series
    bucket = series.buckets[0]
    assert (bucket.count, bucket.sum, bucket.rate) == (0, 0.0, 0.0)
    assert {"mean", "p50", "p90", "p99", "min", "max"} <= absent(bucket)


async def test_one_absurd_value_does_not_make_a_metric_unreadable(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    absurd = {noon + timedelta(seconds=s): 1.7e308 for s in range(5)}
    await report(database, "n1", "rows", COUNTER, absurd)
    await report(database, "n1", "rows", GAUGE, absurd)
    huge = Histogram([1.0], [2**61, 2**61], 1.7e308, 1.0, 1.7e308)
    await report(database, "n1", "rows", HISTOGRAM, dict.fromkeys(absurd, huge))
    response = await ask(analytics, "rows", noon)
    counters, gauges, histograms = (series.buckets[0].count for series in response.series)
    assert (counters, gauges) == (5, 5)
    assert histograms >= 2**64 - 2


# --- which points, in which bucket ---


async def test_a_gap_is_a_gap_and_buckets_are_aligned_since_1970(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    points = {noon + timedelta(seconds=s): 1.0 for s in (5, 100, 1000)}
    await report(database, "n1", "rows", COUNTER, points)
    response = await ask(analytics, "rows", noon, width=7)
    starts = [from_timestamp(bucket.start_time) for bucket in response.series[0].buckets]
    assert len(starts) == 3
    for start, point in zip(starts, points, strict=True):
        assert start <= point < start + timedelta(seconds=7)
        assert start.timestamp() % 7 == 0
    assert response.bucket_width == Duration(seconds=7)


async def test_a_span_holds_its_start_and_not_its_end(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    moment = timedelta(microseconds=1)
    times = (noon - moment, noon, noon + MINUTE - moment, noon + MINUTE)
    points = {time: 10.0**place for place, time in enumerate(times)}
    await report(database, "n1", "rows", COUNTER, points)
    (series,) = (await ask(analytics, "rows", noon, span=MINUTE, width=3600)).series
    assert series.buckets[0].sum == 110.0


async def test_the_default_is_the_last_hour_in_sixty_buckets(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    async with database.begin() as connection:
        now = await current_time(connection)
    points = {now - timedelta(minutes=2): 1.0, now - timedelta(minutes=61): 100.0}
    await report(database, "n1", "rows", COUNTER, points)
    response = await analytics.QueryMetrics(pb.QueryMetricsRequest(name="rows"))
    assert [bucket.sum for bucket in response.series[0].buckets] == [1.0]
    assert response.bucket_width == Duration(seconds=60)


async def test_only_the_neurons_that_the_filter_finds_count(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "a", type="x", presence=Presence.ONLINE, labels={"zone": "eu"})
    await put(database, "b", type="x", labels={"zone": "eu"})
    await put(database, "c", type="y", presence=Presence.ONLINE)
    for number, neuron_id in enumerate("abc"):
        await report(database, neuron_id, "rows", COUNTER, {noon: 10.0**number})

    async def total(text: str) -> float:
        return sum(
            bucket.sum
            for series in (await ask(analytics, "rows", noon, filter=text)).series
            for bucket in series.buckets
        )

    assert await total("") == 111.0
    assert await total("type = x") == 11.0
    assert await total("presence = ONLINE AND labels.zone = eu") == 1.0
    assert await total("neuron_id = nobody") == 0.0


async def test_only_points_with_all_of_the_labels_count(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    for number, labels in enumerate(
        ({}, {"path": "/a"}, {"path": "/a", "code": "200"}, {"path": "/b", "code": "200"})
    ):
        await report(database, "n1", "rows", COUNTER, {noon: 10.0**number}, labels=labels)
    for labels, expected in (
        ({}, 1111.0),
        ({"path": "/a"}, 110.0),
        ({"code": "200"}, 1100.0),
        ({"path": "/a", "code": "200"}, 100.0),
    ):
        (series,) = (await ask(analytics, "rows", noon, labels=labels)).series
        assert series.buckets[0].sum == expected


# --- groups ---


async def test_each_group_is_a_series_and_they_are_in_order(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    for neuron_id, neuron_type in (("b", "x"), ("a", "y"), ("C", "x")):
        await put(database, neuron_id, type=neuron_type)
        for path in ("/a", ""):
            labels = {"path": path} if path else {}
            await report(database, neuron_id, "rows", COUNTER, {noon: 1.0}, labels=labels)
    by_type = await ask(analytics, "rows", noon, group_by=["type"])
    assert groups(by_type) == [{"type": "x"}, {"type": "y"}]
    assert [series.buckets[0].sum for series in by_type.series] == [4.0, 2.0]
    by_neuron = await ask(analytics, "rows", noon, group_by=["neuron_id"])
    assert groups(by_neuron) == [{"neuron_id": n} for n in ("C", "a", "b")]
    by_both = await ask(analytics, "rows", noon, group_by=["labels.path", "type"])
    assert groups(by_both) == [
        {"labels.path": path, "type": kind} for path in ("", "/a") for kind in ("x", "y")
    ]
    assert groups(await ask(analytics, "rows", noon)) == [{}]


async def test_a_name_with_two_kinds_gives_a_series_for_each(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    await put(database, "n1")
    await report(database, "n1", "rows", HISTOGRAM, {noon: Histogram([1], [1, 0], 1.0)})
    await report(database, "n1", "rows", GAUGE, {noon: 1.0})
    await report(database, "n1", "rows", COUNTER, {noon: 1.0})
    response = await ask(analytics, "rows", noon)
    assert [series.kind for series in response.series] == [
        pb.METRIC_KIND_COUNTER,
        pb.METRIC_KIND_GAUGE,
        pb.METRIC_KIND_HISTOGRAM,
    ]


async def test_series_are_in_the_order_of_their_groups_whatever_their_kinds(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    for neuron_id in ("a", "b"):
        await put(database, neuron_id)
    await report(database, "a", "rows", HISTOGRAM, {noon: Histogram([1], [1, 0], 1.0)})
    await report(database, "b", "rows", GAUGE, {noon: 1.0})
    response = await ask(analytics, "rows", noon, group_by=["neuron_id"])
    assert groups(response) == [{"neuron_id": "a"}, {"neuron_id": "b"}]


async def test_a_series_has_the_unit_that_was_reported_last(
    analytics: Reading, database: Database, noon: datetime
) -> None:
    for neuron_id, unit, day in (("a", "new", 2), ("b", "old", 1)):
        await put(database, neuron_id)
        time = noon - timedelta(days=10 - day)
        await report(
            database, neuron_id, "rows", GAUGE, {noon: 1.0}, unit=unit, last_report_time=time
        )
    (series,) = (await ask(analytics, "rows", noon)).series
    assert (series.unit, series.buckets[0].count) == ("new", 2)


# --- limits ---


async def many_series(database: Database, noon: datetime, number: int) -> None:
    """A neuron with so many series of one metric, each with a point in each of three minutes."""
    await put(database, "n1")
    async with database.begin() as connection:
        await connection.execute(
            text(
                "WITH made AS (INSERT INTO metric_series"
                " (neuron_id, name, kind, labels, unit, last_report_time, bounds)"
                " SELECT 'n1', 'rows', 'GAUGE',"
                " jsonb_build_object('n', lpad(n::text, 5, '0')), '', now(), '{}'"
                " FROM generate_series(1, :number) n RETURNING series_id)"
                " INSERT INTO metric_points (series_id, point_time, value)"
                " SELECT series_id, cast(:noon AS timestamptz) + m * interval '1 min', 1"
                " FROM made, generate_series(0, 2) m"
            ),
            {"number": number, "noon": noon},
        )
        async with pipeline(await driver(connection)) as send:
            marks = [rollups.Mark(noon + minute * MINUTE) for minute in range(3)]
            rollups.mark(send, Level.MINUTE, marks)


@pytest.mark.parametrize(("number", "truncated"), [(1000, False), (1001, True)])
async def test_a_thousand_series_are_whole_and_one_more_is_left_out(
    analytics: Reading, database: Database, noon: datetime, number: int, truncated: bool
) -> None:
    await many_series(database, noon, number)
    response = await ask(analytics, "rows", noon, group_by=["labels.n"])
    assert (len(response.series), response.truncated) == (1000, truncated)
    assert groups(response)[-1] == {"labels.n": "01000"}
    assert all(len(series.buckets) == 3 for series in response.series)


@pytest.mark.parametrize(("most", "shown"), [(12, 4), (11, 3), (10, 3), (9, 3)])
async def test_an_answer_that_would_be_too_large_leaves_whole_series_out(
    analytics: Reading,
    database: Database,
    noon: datetime,
    monkeypatch: pytest.MonkeyPatch,
    *,
    most: int,
    shown: int,
) -> None:
    await many_series(database, noon, 4)
    monkeypatch.setattr(metrics, "MAX_BUCKETS", most)
    response = await ask(analytics, "rows", noon, group_by=["labels.n"])
    assert [len(series.buckets) for series in response.series] == [3] * shown
    assert response.truncated == (shown < 4)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("name", {"name": ""}),
        ("end_time", {"start_time": Timestamp(seconds=60), "end_time": Timestamp(seconds=60)}),
        ("start_time", {"start_time": Timestamp(seconds=4_000_000_000)}),
        ("bucket_width", {"bucket_width": Duration(nanos=999_999_999)}),
        ("bucket_width", {"bucket_width": Duration(seconds=367 * 86_400)}),
        (
            "bucket_width",
            {
                "start_time": Timestamp(seconds=0),
                "end_time": Timestamp(seconds=10_001),
                "bucket_width": Duration(seconds=1),
            },
        ),
        ("filter", {"filter": "colour = red"}),
        ("group_by[0]", {"group_by": ["colour"]}),
        ("group_by", {"group_by": ["type", "neuron_id", "labels.a", "labels.b", "labels.c"]}),
    ],
)
async def test_a_query_that_cannot_be_is_refused_by_field(
    analytics: Reading, field: str, fields: dict[str, Any]
) -> None:
    request = pb.QueryMetricsRequest(**{"name": "rows", **fields})
    code, _, violations = await refusal(analytics.QueryMetrics(request))
    assert code in {INVALID, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert set(violations) == {field}


async def test_ten_thousand_buckets_are_not_too_many(
    analytics: Reading, database: Database
) -> None:
    request = pb.QueryMetricsRequest(
        name="rows",
        start_time=Timestamp(seconds=0),
        end_time=Timestamp(seconds=10_000),
        bucket_width=Duration(seconds=1),
    )
    assert list((await analytics.QueryMetrics(request)).series) == []


async def test_a_query_that_takes_too_long_ends_with_a_word_on_what_to_do(
    analytics: Reading, database: Database, noon: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TIMEOUT_S", 0.1)
    async with database.begin() as connection:
        await connection.execute(text("LOCK TABLE metric_series, metric_minutes"))
        code, reason, violations = await refusal(ask(analytics, "rows", noon))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE")
    assert "begin later" in violations["start_time"]
    assert list((await ask(analytics, "rows", noon)).series) == []
