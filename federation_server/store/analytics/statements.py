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
    CTE,
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


def _chosen(asked: MetricsQuery, *, histograms: bool) -> CTE:
    """The metric's series that are asked for, with their groups, each group's newest unit, and the
    first series of all that are added up with it.
    """
    stored = metric_series.c
    groups = [_group(name).label(f"group{number}") for number, name in enumerate(asked.group_by)]
    one = [*groups, stored.kind]
    newest = (stored.last_report_time.desc(), stored.series_id)
    unit = func.first_value(stored.unit).over(partition_by=one, order_by=newest)
    first = func.min(stored.series_id).over(partition_by=[*one, stored.bounds])
    is_histogram = stored.kind == MetricKind.HISTOGRAM
    columns = (
        *(stored.series_id, first.label("first_id")),
        *(*one, unit.label("unit"), stored.bounds),
    )
    found = _of_series(select(*columns), asked).where(is_histogram if histograms else ~is_histogram)
    return found.cte("chosen").prefix_with("MATERIALIZED")


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


def _points(asked: MetricsQuery, chosen: CTE, *, histograms: bool) -> Subquery:
    """What is read of each segment, with the series that it is added up to and the beginning of
    its bucket.
    """
    width = literal(asked.bucket_width, Interval)
    origin = literal(_EPOCH, DateTime(timezone=True))
    parts = [
        select(
            chosen.c.first_id,
            func.date_bin(width, rows.c.bucket_time, origin).label("bucket"),
            *(column for column in rows.c if column.name not in {"series_id", "bucket_time"}),
        )
        .join(rows, rows.c.series_id == chosen.c.series_id)
        .where(
            rows.c.bucket_time >= segment.start,
            rows.c.bucket_time < segment.end,
            # Which is cheaper to see than that the series is not among those that are chosen.
            rows.c.bucket_counts.is_not(None) if histograms else rows.c.bucket_counts.is_(None),
        )
        for segment in asked.segments
        for rows in (_ROWS[segment.level],)
    ]
    return union_all(*parts).subquery("points")


def _added_up(points: Subquery, *sums: ColumnElement[Any]) -> Subquery:
    """The sums of each bucket."""
    keys = (points.c.first_id, points.c.bucket)
    return select(*keys, *sums).group_by(*keys).subquery("buckets")


def _in_order(chosen: CTE, buckets: Subquery) -> Select[Any]:
    """The buckets with what their series are, in the order of the answer, which is Python's order
    of texts.
    """
    groups = [column for column in chosen.c if column.name.startswith("group")]
    sums = [column for column in buckets.c if column.name != "first_id"]
    return (
        select(*groups, chosen.c.kind, chosen.c.unit, *sums)
        .join_from(buckets, chosen, chosen.c.series_id == buckets.c.first_id)
        .order_by(
            *(collate(group, "C") for group in groups),
            chosen.c.kind,
            buckets.c.bucket,
        )
    )


def _summed(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.sum(func.least(func.greatest(column, -LARGEST), LARGEST))


def select_numbers(asked: MetricsQuery) -> Select[Any]:
    """Of counters and gauges: how many points, their sum, the least and the greatest value."""
    chosen = _chosen(asked, histograms=False)
    points = _points(asked, chosen, histograms=False)
    of = points.c
    sums = (
        cast(func.sum(of.count), BigInteger).label("count"),
        _summed(of.sum).label("sum"),
        func.min(of.min).label("min"),
        func.max(of.max).label("max"),
    )
    return _in_order(chosen, _added_up(points, *sums))


def select_kinds(asked: MetricsQuery) -> Select[Any]:
    """The kinds that there are of the metric, each with how many bounds its widest histogram has
    (0 for other kinds).
    """
    stored = metric_series.c
    kinds = select(stored.kind, func.max(func.cardinality(stored.bounds)))
    return _of_series(kinds.select_from(metric_series), asked).group_by(stored.kind)


def select_histograms(asked: MetricsQuery, most_bounds: int) -> Select[Any]:
    """Of histograms of at most so many bounds: how many observations, the sum, the least and the
    greatest observation, the counts of the places between the bounds, and the bounds; of each
    bucket the fullest first. The counts are a text with commas, because an array of numerics is
    slow to read.
    """
    chosen = _chosen(asked, histograms=True)
    points = _points(asked, chosen, histograms=True)
    of = points.c
    observed = of.count > 0
    counts = [func.sum(of.bucket_counts[place]) for place in range(1, most_bounds + 2)]
    sums = (
        func.sum(of.count).label("count"),
        _summed(of.sum).label("sum"),
        _known(of.min, observed, func.min).label("min"),
        _known(of.max, observed, func.max).label("max"),
        func.array_to_string(array(counts), ",").label("bucket_counts"),
    )
    buckets = _added_up(points, *sums)
    found = _in_order(chosen, buckets).add_columns(chosen.c.bounds)
    return found.order_by(buckets.c.count.desc(), chosen.c.bounds)


def _known(
    column: ColumnElement[Any], observed: ColumnElement[bool], extreme: Any
) -> ColumnElement[Any]:
    """The extreme of the histograms that hold anything; NULL if one of them does not know its."""
    all_known = func.bool_and(column.is_not(None)).filter(observed)
    return case((all_known, extreme(column).filter(observed)))
