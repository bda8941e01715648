"""The series a service can keep: counters, gauges and histograms, and the book of them.

A series is made by `Metrics`, never directly. Its hot call (`add`, `set`, `observe`) is
thread-safe, takes well under a microsecond and never raises: a value that is not a finite
number is ignored, and the tally says how many were.
"""

from __future__ import annotations

import math
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import TypeVar

from neuron_sdk.points import Definition, HistogramValue, Point, as_number

MAX_SERIES = 2_000
"""Series of one neuron, the built-in ones included: as many as one report holds."""

# Gauges that every report carries of the host and the process; a second one would spoil it.
_RESERVED_PREFIXES = ("system.", "process.")

DEFAULT_BOUNDS = (
    1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
    1_000.0, 2_500.0, 5_000.0, 10_000.0, 30_000.0, 60_000.0,
)  # fmt: skip
"""The buckets of a histogram by default: fit for milliseconds."""


class Tally:
    """The lock of all series of one `Metrics`, and what they did not take."""

    __slots__ = ("dropped", "ignored", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ignored = 0
        """Values that no series can hold: not a number, infinite, or a counter's negative."""
        self.dropped = 0
        """Values for series beyond the limit of series."""


class Counter:
    """A sum that only grows."""

    __slots__ = ("_growth", "_kept", "_reported", "_tally", "definition")

    def __init__(self, definition: Definition, tally: Tally, *, kept: bool) -> None:
        self.definition = definition
        self._tally = tally
        self._kept = kept
        self._growth = 0.0
        self._reported = 0.0

    def add(self, amount: float = 1) -> None:
        """Grow by `amount`. A negative one, NaN or infinity is ignored and counted."""
        number = as_number(amount)
        tally = self._tally
        with tally.lock:
            if not 0.0 <= number < math.inf:
                tally.ignored += 1
            elif self._kept:
                self.grow(number)
            else:
                tally.dropped += 1

    def grow(self, amount: float) -> None:
        """Grow by a finite number, not below 0. Hold the tally's lock."""
        self._growth += amount

    def take(self) -> Point | None:
        """The growth since the last take, None if it did not grow. Hold the tally's lock."""
        growth, self._growth = self._growth, 0.0
        self._reported += growth
        return self.definition.point(finite(growth)) if growth else None

    def total(self) -> Point | None:
        """The growth since the start. Hold the tally's lock."""
        return self.definition.point(finite(self._reported + self._growth))


class Gauge:
    """A number that goes up and down; the newest value counts."""

    __slots__ = ("_kept", "_tally", "_value", "definition")

    def __init__(self, definition: Definition, tally: Tally, *, kept: bool) -> None:
        self.definition = definition
        self._tally = tally
        self._kept = kept
        self._value: float | None = None

    def set(self, value: float) -> None:
        """Stand at `value` from now on. NaN or infinity is ignored and counted."""
        number = as_number(value)
        tally = self._tally
        with tally.lock:
            if not math.isfinite(number):
                tally.ignored += 1
            elif self._kept:
                self._value = number
            else:
                tally.dropped += 1

    def take(self) -> Point | None:
        """The value, again and again; None before the first `set`. Hold the tally's lock."""
        return None if self._value is None else self.definition.point(self._value)

    total = take


class Histogram:
    """How a quantity is distributed."""

    __slots__ = ("_counts", "_kept", "_max", "_min", "_reported_counts", "_reported_sum", "_sum",
                 "_tally", "definition")  # fmt: skip

    def __init__(self, definition: Definition, tally: Tally, *, kept: bool) -> None:
        self.definition = definition
        self._tally = tally
        self._kept = kept
        self._reported_counts = [0] * (len(definition.bounds) + 1)
        self._reported_sum = 0.0
        self._min: float
        self._max: float
        self._begin_span()

    def observe(self, value: float) -> None:
        """Count one value. NaN or infinity is ignored and counted."""
        number = as_number(value)
        tally = self._tally
        with tally.lock:
            if not math.isfinite(number):
                tally.ignored += 1
            elif self._kept:
                self.add(number)
            else:
                tally.dropped += 1

    def add(self, number: float) -> None:
        """Count one finite number. Hold the tally's lock."""
        self._counts[bisect_left(self.definition.bounds, number)] += 1
        self._sum += number
        if number < self._min:  # noqa: PLR1730 - min() is a call more on the hot path
            self._min = number
        if number > self._max:  # noqa: PLR1730 - the same
            self._max = number

    def take(self) -> Point | None:
        """What was observed since the last take, None if nothing. Hold the tally's lock."""
        if not any(self._counts):
            return None
        value = self._value(self._counts, self._sum, self._min, self._max)
        self._reported_counts = self._all_counts()
        self._reported_sum += self._sum
        self._begin_span()
        return self.definition.point(value)

    def total(self) -> Point | None:
        """What was observed since the start. Hold the tally's lock."""
        value = self._value(self._all_counts(), self.total_sum(), None, None)
        return self.definition.point(value)

    def total_sum(self) -> float:
        """All values since the start, added up. Hold the tally's lock."""
        return finite(self._reported_sum + self._sum)

    def _begin_span(self) -> None:
        self._counts: list[int] = [0] * len(self._reported_counts)
        self._sum = 0.0
        self._min = math.inf
        self._max = -math.inf

    def _all_counts(self) -> list[int]:
        return [a + b for a, b in zip(self._reported_counts, self._counts, strict=True)]

    def _value(
        self, counts: list[int], total: float, smallest: float | None, largest: float | None
    ) -> HistogramValue:
        bounds = self.definition.bounds
        return HistogramValue(bounds, tuple(counts), finite(total), smallest, largest)


Series = Counter | Gauge | Histogram
AnySeries = TypeVar("AnySeries", Counter, Gauge, Histogram)


class SeriesBook:
    """All series of one `Metrics`, at most `MAX_SERIES`."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._series: dict[tuple[str, tuple[tuple[str, str], ...]], Series] = {}
        self._families: dict[str, Definition] = {}
        self._reserved: frozenset[str] = frozenset()

    def obtain(self, make: type[AnySeries], wanted: Definition) -> AnySeries:
        """The series of this definition, made if there is none.

        Beyond `MAX_SERIES` it is one that drops what it is given and counts that.

        Raises:
            ValueError: the name is reserved, or has another kind or other bounds.
        """
        key = (wanted.name, tuple(wanted.labels.items()))
        with self._tally.lock:
            self._refuse_conflict(wanted)
            known = self._series.get(key)
            if isinstance(known, make):
                return known
            kept = len(self._series) < MAX_SERIES
            series = make(wanted, self._tally, kept=kept)
            if kept:
                self._series[key] = series
                self._families.setdefault(wanted.name, wanted)
            return series

    def reserve(self) -> None:
        """Keep the names that are in the book now from being asked for again."""
        self._reserved = frozenset(self._families)

    def __iter__(self) -> Iterator[Series]:
        """Every series, oldest first. Hold the tally's lock."""
        return iter(self._series.values())

    def _refuse_conflict(self, wanted: Definition) -> None:
        name = wanted.name
        if name in self._reserved or name.startswith(_RESERVED_PREFIXES):
            raise ValueError(f"{name} is reported by the SDK itself: choose another name")
        family = self._families.get(name, wanted)
        if family.kind != wanted.kind:
            raise ValueError(f"{name} is a {family.kind} already: choose another name")
        if family.bounds != wanted.bounds:
            raise ValueError(
                f"{name} has the bounds {family.bounds} already: use the same, "
                "or choose another name"
            )


def finite(value: float) -> float:
    """`value`, or the nearest finite number: a sum of finite numbers may overflow."""
    if math.isnan(value):  # infinity less infinity
        return 0.0
    return min(max(value, -sys.float_info.max), sys.float_info.max)
