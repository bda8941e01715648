"""The SQL behind `metrics.query`.

Each statement gives one row for each bucket of each series (for histograms: for each set of
bounds in it), in the order of the answer: the groups, the kind, the unit, the bucket's beginning,
and then what has been added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    FromClause,
    Interval,
    Select,
    Subquery,
    case,
    cast,
    collate,
    func,
    literal,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import array

from federation_server.domain.analytics import MetricKind
from federation_server.domain.rollup import Level, Segment
from federation_server.store.analytics.rollups import LARGEST
from federation_server.store.schema import (
    metric_days,
    metric_hours,
    metric_minutes,
    metric_points,
    metric_series,
    neuron_states,
    neurons,
)

_ROWS: Mapping[Level, FromClause] = {
    Level.POINT: select(
        metric_points.c.series_id,
        metric_points.c.point_time.label("bucket_time"),
        func.coalesce(metric_points.c.count, 1).label("count"),
        func.coalesce(metric_points.c.value, metric_points.c.sum).label("sum"),
        func.coalesce(metric_points.c.value, metric_points.c.min).label("min"),
        func.coalesce(metric_points.c.value, metric_points.c.max).label("max"),
        metric_points.c.bounds,
        metric_points.c.bucket_counts,
    ).subquery("rows"),
    Level.MINUTE: metric_minutes,
    Level.HOUR: metric_hours,
    Level.DAY: metric_days,
}
"""Each level in the shape of rollups."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class MetricsQuery:
    """What is asked: the metric, which points of it, and how they are put together."""

    name: str
    neurons: ColumnElement[bool]
    """A condition on neurons and their states."""
    labels: Mapping[str, str]
    start_time: datetime
    end_time: datetime
    bucket_width: timedelta
    group_by: Sequence[str]
    """Each "neuron_id", "type" or "labels.<key>"."""
    segments: Sequence[Segment]
    """From which rollups [start_time, end_time) is read."""


def _chosen(asked: MetricsQuery) -> Subquery:
    """The metric's series that are asked for: their groups, and each group's newest unit."""
    stored = metric_series.c
    groups = [_group(name).label(f"group{number}") for number, name in enumerate(asked.group_by)]
    newest = (stored.last_report_time.desc(), stored.series_id)
    unit = func.first_value(stored.unit).over(partition_by=[*groups, stored.kind], order_by=newest)
    columns = (stored.series_id, *groups, stored.kind, unit.label("unit"))
    return _of_series(select(*columns), asked).subquery("chosen")


def _of_series(columns: Select[Any], asked: MetricsQuery) -> Select[Any]:
    """Of the metric's series that are asked for."""
    stored = metric_series.c
    found = (
        columns.join(neurons, neurons.c.neuron_id == stored.neuron_id)
        .join(neuron_states, neuron_states.c.neuron_id == stored.neuron_id)
        .where(stored.name == asked.name, asked.neurons)
    )
    if asked.labels:
        found = found.where(stored.labels.contains(dict(asked.labels)))
    return found


def _group(name: str) -> ColumnElement[str]:
    if name == "neuron_id":
        return metric_series.c.neuron_id
    if name == "type":
        return neurons.c.type
    return func.coalesce(metric_series.c.labels[name.removeprefix("labels.")].astext, "")


def _points(asked: MetricsQuery, *, histograms: bool) -> Subquery:
    """What is read of each segment, with its group and the beginning of its bucket."""
    chosen = _chosen(asked)
    width = literal(asked.bucket_width, Interval)
    origin = literal(_EPOCH, DateTime(timezone=True))
    is_histogram = chosen.c.kind == MetricKind.HISTOGRAM
    parts = [
        select(
            *(column for column in chosen.c if column.name != "series_id"),
            func.date_bin(width, rows.c.bucket_time, origin).label("bucket"),
            *(column for column in rows.c if column.name not in {"series_id", "bucket_time"}),
        )
        .join(rows, rows.c.series_id == chosen.c.series_id)
        .where(
            is_histogram if histograms else ~is_histogram,
            rows.c.bucket_time >= segment.start,
            rows.c.bucket_time < segment.end,
        )
        for segment in asked.segments
        for rows in (_ROWS[segment.level],)
    ]
    return union_all(*parts).subquery("points")


def _keys(rows: Subquery) -> list[ColumnElement[Any]]:
    """What makes a bucket of a series: the groups, the kind, the unit, the beginning."""
    names = ("kind", "unit", "bucket")
    groups = [column for column in rows.c if column.name.startswith("group")]
    return [*groups, *(rows.c[name] for name in names)]


def _in_order(keys: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    """The order of the answer, which is Python's order of texts."""
    *groups, kind, _, bucket = keys
    return [*(collate(group, "C") for group in groups), kind, bucket]


def _summed(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.sum(func.least(func.greatest(column, -LARGEST), LARGEST))


def select_numbers(asked: MetricsQuery) -> Select[Any]:
    """Of counters and gauges: how many points, their sum, the least and the greatest value."""
    points = _points(asked, histograms=False)
    keys, of = _keys(points), points.c
    return (
        select(
            *keys,
            cast(func.sum(of.count), BigInteger),
            _summed(of.sum),
            func.min(of.min),
            func.max(of.max),
        )
        .group_by(*keys)
        .order_by(*_in_order(keys))
    )


def select_kinds(asked: MetricsQuery) -> Select[Any]:
    """The kinds that there are of the metric, each with how many places its widest histogram has
    had (0 for other kinds).
    """
    stored = metric_series.c
    kinds = select(stored.kind, func.max(stored.places)).select_from(metric_series)
    return _of_series(kinds, asked).group_by(stored.kind)


def select_histograms(asked: MetricsQuery, places: int) -> Select[Any]:
    """Of histograms of at most so many places: how many observations, the bounds, the counts of the
    places between them, the sum, the least and the greatest observation; of each bucket the fullest
    first. The counts are a text with commas, because an array of numerics is slow to read.
    """
    points = _points(asked, histograms=True)
    keys, of = _keys(points), points.c
    observed = of.count > 0
    total_count = func.sum(of.count)
    counts = [func.sum(of.bucket_counts[place]) for place in range(1, places + 1)]
    return (
        select(
            *keys,
            total_count,
            of.bounds,
            func.array_to_string(array(counts), ","),
            _summed(of.sum),
            _known(of.min, observed, func.min),
            _known(of.max, observed, func.max),
        )
        .group_by(*keys, of.bounds)
        .order_by(*_in_order(keys), total_count.desc(), of.bounds)
    )


def _known(
    column: ColumnElement[Any], observed: ColumnElement[bool], extreme: Any
) -> ColumnElement[Any]:
    """The extreme of the histograms that hold anything; NULL if one of them does not know its."""
    all_known = func.bool_and(column.is_not(None)).filter(observed)
    return case((all_known, extreme(column).filter(observed)))
