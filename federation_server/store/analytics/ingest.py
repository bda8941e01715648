"""Reports and events, written inside the transaction of `ingest.apply`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import orjson

from federation_server.domain.analytics import AnalyticsReport, Histogram, MetricPoint, placed
from federation_server.domain.rollup import Level
from federation_server.store.analytics import rollups
from federation_server.store.database import Connection
from federation_server.store.pipeline import pipeline

# Two batches may meet the same new series; the one that comes second waits, and updates.
_SERIES = b"""
INSERT INTO metric_series (neuron_id, name, kind, labels, unit, bounds, last_report_time)
SELECT neuron_id, name, kind::metric_kind, labels::jsonb, unit, bounds::float8[], now()
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
     AS b (neuron_id, name, kind, labels, unit, bounds)
ORDER BY neuron_id, name, kind, labels, bounds
ON CONFLICT (neuron_id, name, kind,
    jsonb_hash_extended(labels, 0), jsonb_hash_extended(labels, 1),
    hash_array_extended(bounds, 0), hash_array_extended(bounds, 1))
DO UPDATE SET last_report_time = excluded.last_report_time, unit = excluded.unit
RETURNING series_id, neuron_id, name, kind::text, labels, bounds
"""

_COPY_POINTS = (
    "COPY metric_points (series_id, point_time, value, count, sum, min, max, bucket_counts)"
    " FROM STDIN"
)

_COPY_EVENTS = (
    "COPY reported_events (event_time, neuron_id, receive_time, severity, type, message,"
    " attributes) FROM STDIN"
)


class ReceivedReport(NamedTuple):
    """A neuron's report, and when it came by PostgreSQL's clock."""

    neuron_id: str
    receive_time: datetime
    report: AnalyticsReport


_SeriesKey = tuple[str, str, str, frozenset[tuple[str, str]], tuple[float, ...]]


async def write(
    connection: Connection,
    reports: Sequence[ReceivedReport],
    *,
    oldest: timedelta,
) -> None:
    """Writes reports, each placed in time by its age when it came."""
    await _write_points(connection, reports, oldest)
    await _write_events(connection, reports, oldest)


async def _write_points(
    connection: Connection,
    reports: Sequence[ReceivedReport],
    oldest: timedelta,
) -> None:
    series = await _series(connection, reports)
    if not series:
        return
    marks = set()
    async with connection.cursor() as cursor, cursor.copy(_COPY_POINTS) as copy:
        for neuron_id, receive_time, report in reports:
            time = placed(receive_time, report.age, oldest=oldest)
            marks.add(rollups.Mark(time, neuron_id if report.age > rollups.LATE else ""))
            for point in report.points:
                series_id = series[_key(neuron_id, point)]
                await copy.write_row((series_id, time, *_values(point.value)))
    async with pipeline(connection) as send:
        rollups.mark(send, Level.MINUTE, marks)


def _values(value: float | Histogram) -> tuple[object, ...]:
    if isinstance(value, Histogram):
        return (None, value.count, value.sum, value.min, value.max, list(value.bucket_counts))
    return (value, None, None, None, None, None)


def _key(neuron_id: str, point: MetricPoint) -> _SeriesKey:
    bounds = tuple(point.value.bounds) if isinstance(point.value, Histogram) else ()
    return (neuron_id, point.name, point.kind.value, frozenset(point.labels.items()), bounds)


async def _series(
    connection: Connection, reports: Sequence[ReceivedReport]
) -> dict[_SeriesKey, int]:
    """The id of each series that the reports name; those that are new are made."""
    named = {
        _key(neuron_id, point): point for neuron_id, _, report in reports for point in report.points
    }
    if not named:
        return {}
    labels = [
        orjson.dumps(dict(point.labels), option=orjson.OPT_SORT_KEYS).decode()
        for point in named.values()
    ]
    async with pipeline(connection) as send:
        rows = await send(
            _SERIES,
            [neuron_id for neuron_id, *_ in named],
            [name for _, name, *_ in named],
            [kind for _, _, kind, *_ in named],
            labels,
            [point.unit for point in named.values()],
            ["{" + ",".join(map(repr, bounds)) + "}" for *_, bounds in named],
        )
    return {
        (neuron_id, name, kind, frozenset(labels.items()), tuple(bounds)): series_id
        for series_id, neuron_id, name, kind, labels, bounds in rows
    }


async def _write_events(
    connection: Connection,
    reports: Sequence[ReceivedReport],
    oldest: timedelta,
) -> None:
    if not any(report.events for _, _, report in reports):
        return
    async with connection.cursor() as cursor, cursor.copy(_COPY_EVENTS) as copy:
        for neuron_id, receive_time, report in reports:
            for event in report.events:
                time = placed(receive_time, event.age, oldest=oldest)
                attributes = orjson.dumps(event.attributes).decode()
                await copy.write_row(
                    (
                        time,
                        neuron_id,
                        receive_time,
                        event.severity.value,
                        event.type,
                        event.message,
                        attributes,
                    )
                )
