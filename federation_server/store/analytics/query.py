"""Reading metrics: one metric over time buckets, in a series for each group.

PostgreSQL adds points up by group and bucket, and histograms by their bounds too, so that what
comes from it is small; histograms of unequal bounds are merged here as they arrive. Rows come in
the order of the answer, a few at a time, and reading ends where the answer is full.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from psycopg.errors import QueryCanceled
from sqlalchemy import (
    Select,
    func,
    select,
    true,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.analytics import (
    Histogram,
    MetricBucket,
    MetricKind,
    MetricSeries,
    histogram_bucket,
    numbers_bucket,
)
from federation_server.store.analytics.statements import (
    MetricsQuery,
    select_histograms,
    select_kinds,
    select_numbers,
)

MAX_SERIES = 1000
MAX_BUCKETS = 100_000
"""How many buckets an answer holds over all its series: this bounds its memory."""

TIMEOUT_S = 20
"""How long PostgreSQL may work on one of the two statements of a query."""

_ROWS_AT_A_TIME = 1000


class QueryTooSlow(Exception):
    """A query took longer than TIMEOUT_S: it asks for too many points."""


class _SeriesKey(NamedTuple):
    group: tuple[str, ...]
    kind: MetricKind
    unit: str


_Buckets: TypeAlias = AsyncGenerator[tuple[_SeriesKey, MetricBucket], None]


async def query(
    connection: AsyncConnection, asked: MetricsQuery
) -> tuple[list[MetricSeries], bool]:
    """The series by their groups and kinds, and whether some are missing because there are more
    than MAX_SERIES, or more than MAX_BUCKETS buckets in all.

    Raises:
        QueryTooSlow: it asks for too much.
    """
    timeout = func.set_config("statement_timeout", f"{TIMEOUT_S}s", true())  # this transaction's
    await connection.execute(select(timeout))
    try:
        kinds = dict(tuple(row) for row in await connection.execute(select_kinds(asked)))
        most_bounds = kinds.pop(MetricKind.HISTOGRAM, 0)
        numbers, more_numbers = (
            await _collect(_numbers(connection, asked)) if kinds else ([], False)
        )
        histograms, more_histograms = (
            await _collect(_histograms(connection, asked, most_bounds))
            if most_bounds
            else ([], False)
        )
    except OperationalError as error:
        if isinstance(error.orig, QueryCanceled):
            raise QueryTooSlow from error
        raise
    found = sorted((*numbers, *histograms), key=lambda series: (series.group, series.kind))
    fitting = list(_fitting(found))
    return fitting, more_numbers or more_histograms or len(fitting) < len(found)


def _fitting(found: Sequence[MetricSeries]) -> Iterator[MetricSeries]:
    room = MAX_BUCKETS
    for series in found[:MAX_SERIES]:
        room -= len(series.buckets)
        if room < 0:
            return
        yield series


async def _collect(buckets: _Buckets) -> tuple[list[MetricSeries], bool]:
    """Puts buckets, which come series by series, into whole series; says whether one is missing."""
    found: dict[_SeriesKey, list[MetricBucket]] = {}
    room = MAX_BUCKETS
    async with aclosing(buckets):
        async for key, bucket in buckets:
            if not room:
                found.pop(key, None)  # it would end in its midst
                break
            found.setdefault(key, []).append(bucket)
            room -= 1
        else:
            return _series(found), False
    return _series(found), True


def _series(found: Mapping[_SeriesKey, list[MetricBucket]]) -> list[MetricSeries]:
    return [MetricSeries(*key, buckets) for key, buckets in found.items()]


async def _numbers(connection: AsyncConnection, asked: MetricsQuery) -> _Buckets:
    """The buckets of counters and gauges."""
    async for row in _rows(connection, select_numbers(asked)):
        *key, start, count, total, least, greatest = row
        series = _series_key(key)
        yield (
            series,
            numbers_bucket(
                series.kind,
                start,
                asked.bucket_width,
                count=count,
                total=total,
                least=least,
                greatest=greatest,
            ),
        )


async def _histograms(
    connection: AsyncConnection, asked: MetricsQuery, most_bounds: int
) -> _Buckets:
    """The buckets of histograms of at most so many bounds. One bucket's rows follow each other, the
    fullest first: it says the bounds.
    """
    current: tuple[list[Any], datetime, Histogram] | None = None
    async with aclosing(_rows(connection, select_histograms(asked, most_bounds))) as rows:
        async for *key, start, _, total, least, greatest, found, bounds in rows:
            counts = [int(count) for count in found.split(",")]
            histogram = Histogram(bounds, counts, total, least, greatest)
            if current is not None and current[:2] == (key, start):
                current = (key, start, current[2].merge(histogram))
                continue
            if current is not None:
                yield _histogram_bucket(asked, *current)
            current = (key, start, histogram)
    if current is not None:
        yield _histogram_bucket(asked, *current)


def _histogram_bucket(
    asked: MetricsQuery, key: list[Any], start: datetime, histogram: Histogram
) -> tuple[_SeriesKey, MetricBucket]:
    return _series_key(key), histogram_bucket(start, asked.bucket_width, histogram)


def _series_key(key: list[Any]) -> _SeriesKey:
    *group, kind, unit = key
    return _SeriesKey(tuple(group), kind, unit)


async def _rows(
    connection: AsyncConnection, statement: Select[Any]
) -> AsyncGenerator[tuple[Any, ...], None]:
    streamed = statement.execution_options(yield_per=_ROWS_AT_A_TIME)
    result = await connection.stream(streamed)
    try:
        async for rows in result.partitions():
            for row in rows:
                yield tuple(row)
    finally:
        await result.close()  # `async with` would not, where the reader has stopped early
