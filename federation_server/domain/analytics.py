"""What neurons measure and note: points, histograms and events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise

from federation_server.domain.neuron import JsonObject

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class MetricKind(StrEnum):
    """What a metric is, and so what its numbers mean."""

    COUNTER = "COUNTER"
    GAUGE = "GAUGE"
    HISTOGRAM = "HISTOGRAM"


class Severity(StrEnum):
    """How grave an event is; PostgreSQL's enum has the same order."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by bucket: `bucket_counts[i]` are at most `bounds[i]` and above the bound
    before; the last bucket is above all bounds.
    """

    bounds: Sequence[float]
    bucket_counts: Sequence[int]
    sum: float
    min: float | None = None
    max: float | None = None

    @property
    def count(self) -> int:
        """How many observations it holds."""
        return sum(self.bucket_counts)

    def quantile(self, q: float) -> float | None:
        """The value below which the share `q` of the observations lies, interpolated linearly
        within its bucket; None without observations.

        The first bucket begins at the least observation (at 0, or at its bound if that is
        negative, where the least is unknown), and the last one ends at the greatest (at the last
        bound, where the greatest is unknown).
        """
        total = self.count
        if not total:
            return None
        rank = q * total
        below = 0
        for index, count in enumerate(self.bucket_counts):
            if count and below + count >= rank:
                low, high = self._edges(index)
                share = max(0.0, (rank - below) / count)
                return min(high, low + (high / 2 - low / 2) * share * 2)  # halves do not overflow
            below += count
        return self._edges(len(self.bucket_counts) - 1)[1]

    def merge(self, other: Histogram) -> Histogram:
        """Both histograms' observations in one with this one's bounds.

        With equal bounds nothing is lost. Else the other's observations count as evenly spread
        over their buckets (whose edges are those of `quantile`), are moved into this one's by
        that, and are rounded so that their number stays. So the size of a merged histogram never
        grows; whoever merges many of unequal bounds begins with the one that holds the most.
        The least and the greatest observation are known if both sides with observations know them.
        """
        counts = other.bucket_counts
        if list(other.bounds) != list(self.bounds):
            counts = other._counts_within(self.bounds)
        filled = [histogram for histogram in (self, other) if histogram.count]
        least = [histogram.min for histogram in filled if histogram.min is not None]
        greatest = [histogram.max for histogram in filled if histogram.max is not None]
        return Histogram(
            bounds=self.bounds,
            bucket_counts=[a + b for a, b in zip(self.bucket_counts, counts, strict=True)],
            sum=self.sum + other.sum,
            min=min(least) if filled and len(least) == len(filled) else None,
            max=max(greatest) if filled and len(greatest) == len(filled) else None,
        )

    def _counts_within(self, bounds: Sequence[float]) -> list[int]:
        """How many observations fall between those bounds, one walk over both."""
        below = 0  # in the buckets that end at or before the bound
        index = 0
        cumulative = []
        for bound in bounds:
            while index < len(self.bucket_counts) and self._edges(index)[1] <= bound:
                below += self.bucket_counts[index]
                index += 1
            partly = 0.0
            if index < len(self.bucket_counts):
                low, high = self._edges(index)
                if bound > low:
                    share = (bound / 2 - low / 2) / (high / 2 - low / 2)  # halves do not overflow
                    partly = self.bucket_counts[index] * share
            cumulative.append(below + round(partly))
        cumulative.append(self.count)
        return [after - before for before, after in pairwise([0, *cumulative])]

    def _edges(self, index: int) -> tuple[float, float]:
        if index > 0:
            low = self.bounds[index - 1]
        else:
            low = self.min if self.min is not None else min(0.0, self.bounds[0])
        if index < len(self.bounds):
            high = self.bounds[index]
        else:
            high = self.max if self.max is not None else self.bounds[-1]
        if self.min is not None:
            low = max(low, self.min)
        if self.max is not None:
            high = min(high, self.max)
        return low, max(low, high)


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One metric over one span: a number, or a histogram where the kind is HISTOGRAM."""

    name: str
    kind: MetricKind
    unit: str
    labels: Mapping[str, str]
    value: float | Histogram


@dataclass(frozen=True, slots=True)
class ReportedEvent:
    """Something that happened in a neuron, `age` before its message was sent."""

    age: timedelta
    severity: Severity
    type: str
    message: str
    attributes: JsonObject


@dataclass(frozen=True, slots=True)
class AnalyticsReport:
    """What a neuron measured and noted over a span that ended `age` before it was sent."""

    age: timedelta
    points: Sequence[MetricPoint]
    events: Sequence[ReportedEvent]


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event in the history; `event_time` is placed by the federation's clock."""

    event_id: int
    neuron_id: str
    event_time: datetime
    receive_time: datetime
    severity: Severity
    type: str
    message: str
    attributes: JsonObject


@dataclass(frozen=True, slots=True)
class MetricName:
    """A metric that neurons reported; one name may stand for metrics of several kinds."""

    name: str
    kind: MetricKind
    unit: str
    last_report_time: datetime


@dataclass(frozen=True, slots=True)
class MetricBucket:
    """What was reported for one series within one span of time.

    `count` is that of points, or of a histogram's observations. What does not mean anything for
    the metric's kind, or is not known, is None; the contract says what means something.
    """

    start_time: datetime
    count: int
    sum: float | None = None
    rate: float | None = None
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """One metric of one kind and one group over time; empty spans have no bucket."""

    group: Sequence[str]
    kind: MetricKind
    unit: str
    buckets: Sequence[MetricBucket]


def numbers_bucket(
    kind: MetricKind,
    start_time: datetime,
    width: timedelta,
    *,
    count: int,
    total: float,
    least: float,
    greatest: float,
) -> MetricBucket:
    """The bucket of so many points of a counter or a gauge."""
    if kind is MetricKind.COUNTER:
        return MetricBucket(start_time, count, sum=total, rate=total / width.total_seconds())
    return MetricBucket(start_time, count, mean=total / count, min=least, max=greatest)


def histogram_bucket(start_time: datetime, width: timedelta, histogram: Histogram) -> MetricBucket:
    """The bucket of all observations within it."""
    count = histogram.count
    return MetricBucket(
        start_time,
        count,
        sum=histogram.sum,
        rate=count / width.total_seconds(),
        mean=histogram.sum / count if count else None,
        min=histogram.min,
        max=histogram.max,
        p50=histogram.quantile(0.5),
        p90=histogram.quantile(0.9),
        p99=histogram.quantile(0.99),
    )


def placed(now: datetime, age: timedelta, *, oldest: timedelta) -> datetime:
    """Where something of that age stands in time by the federation's clock: never in the future,
    and never further back than `oldest`.
    """
    return now - min(max(age, timedelta()), oldest)


_ROUND_WIDTHS_S = (
    *(1, 2, 5, 10, 15, 30),
    *(60 * minutes for minutes in (1, 2, 5, 10, 15, 30)),
    *(3600 * hours for hours in (1, 2, 3, 6)),
    *(86400 * days for days in (1, 2, 7, 14, 28)),
)


def default_bucket_width(span: timedelta) -> timedelta:
    """A sixtieth of the span, rounded up to a width that people count in and rollups have."""
    least = span.total_seconds() / 60
    whole_days = timedelta(days=math.ceil(least / 86400))
    return next((timedelta(seconds=s) for s in _ROUND_WIDTHS_S if s >= least), whole_days)


def aligned_buckets(start: datetime, end: datetime, width: timedelta) -> int:
    """How many buckets, aligned to whole multiples of their width since 1970, touch
    [start, end).
    """
    first = (start - _EPOCH) // width
    last = -((_EPOCH - end) // width)  # rounded up
    return last - first
