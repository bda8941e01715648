"""A quantile sketch: percentiles of a stream of numbers in bounded memory.

Values fall into buckets whose bounds grow geometrically, so every bucket's middle is within
1 % of each value in it (the idea of DDSketch: Masson, Rim and Lee, VLDB 2019). It is not
thread-safe: `Metrics` calls it under its own lock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RELATIVE_ERROR = 0.01
"""How far a percentile may be from the true one, as a share of it."""

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_BUCKETS_PER_E = 1 / math.log(_GAMMA)
_MIDDLE = 2 / (1 + _GAMMA)

# Values outside fall into the outermost buckets. With them the sketch holds at most 1,900 buckets.
_SMALLEST = 1e-4
_LARGEST = 1e12
_FIRST_BUCKET = math.ceil(math.log(_SMALLEST) * _BUCKETS_PER_E)
_LAST_BUCKET = math.ceil(math.log(_LARGEST) * _BUCKETS_PER_E)


class QuantileSketch:
    """Counts numbers that are not below 0, and answers percentiles within `RELATIVE_ERROR`."""

    __slots__ = ("_buckets", "_largest", "_smallest", "count")

    def __init__(self) -> None:
        self.count = 0
        self._buckets: dict[int, int] = {}
        self._smallest = math.inf
        self._largest = 0.0

    def add(self, value: float) -> None:
        """Count one finite value, not below 0."""
        if value <= _SMALLEST:
            bucket = _FIRST_BUCKET
        elif value >= _LARGEST:
            bucket = _LAST_BUCKET
        else:
            bucket = math.ceil(math.log(value) * _BUCKETS_PER_E)
        buckets = self._buckets
        buckets[bucket] = buckets.get(bucket, 0) + 1
        self.count += 1
        if value < self._smallest:  # noqa: PLR1730 - min() is a call more on the hot path
            self._smallest = value
        if value > self._largest:  # noqa: PLR1730 - the same
            self._largest = value

    def bucket_count(self) -> int:
        """How many buckets are in use: the sketch's size."""
        return len(self._buckets)

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """The values below which these shares (0 to 1, ascending) of all values lie; 0 if empty."""
        if not self.count:
            return [0.0] * len(shares)
        answers: list[float] = []
        ordered = iter(sorted(self._buckets.items()))
        bucket, seen = next(ordered)
        for share in shares:
            rank = max(1, math.ceil(share * self.count))
            while seen < rank:
                bucket, count = next(ordered)
                seen += count
            answers.append(self._value_of(bucket))
        return answers

    def _value_of(self, bucket: int) -> float:
        middle = _GAMMA**bucket * _MIDDLE
        return min(max(middle, self._smallest), self._largest)
