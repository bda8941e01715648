"""What neurons measure and note: points, histograms and events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from federation_server.domain.neuron import JsonObject


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
                return low + (high - low) * max(0.0, (rank - below) / count)
            below += count
        return self._edges(len(self.bucket_counts) - 1)[1]

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


def placed(now: datetime, age: timedelta, *, oldest: timedelta) -> datetime:
    """Where something of that age stands in time by the federation's clock: never in the future,
    and never further back than `oldest`.
    """
    return now - min(max(age, timedelta()), oldest)


def default_bucket_width(span: timedelta) -> timedelta:
    """A sixtieth of the span, rounded up to a whole second."""
    return timedelta(seconds=max(1, math.ceil(span.total_seconds() / 60)))
