"""What a series is called, and what is read from it: the values that a report carries.

The limits are those of MetricPoint and HistogramValue in the contract's report.proto. They are
checked once, when a series is made, so that no report is ever refused for a bad name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.]{0,127}")
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_MAX_UNIT = 32
_MAX_LABELS = 16
_MAX_LABEL_VALUE = 256
_MAX_BOUNDS = 100


@dataclass(frozen=True, slots=True)
class HistogramValue:
    """How a quantity was distributed within a span."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, inclusive, strictly increasing."""
    bucket_counts: tuple[int, ...]
    """Observations in each bucket, not cumulative: one more than `bounds`."""
    sum: float
    """All observed values, added up."""
    min: float | None
    """The smallest observed value; None if unknown."""
    max: float | None
    """The largest observed value; None if unknown."""


@dataclass(frozen=True, slots=True)
class Point:
    """One series at one time: a MetricPoint of the contract."""

    name: str
    kind: Kind
    unit: str
    labels: Mapping[str, str]
    value: float | HistogramValue


@dataclass(frozen=True, slots=True)
class Definition:
    """What a series is: everything about it but its value."""

    name: str
    kind: Kind
    unit: str
    labels: Mapping[str, str]
    bounds: tuple[float, ...]
    """Of a histogram; empty otherwise."""

    def point(self, value: float | HistogramValue) -> Point:
        return Point(self.name, self.kind, self.unit, self.labels, value)


def as_number(value: float) -> float:
    """`value` as a float; NaN for what is none, so that a mistake never stops the service."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def define(
    name: str,
    kind: Kind,
    unit: str,
    labels: Mapping[str, str] | None,
    bounds: Sequence[float] = (),
) -> Definition:
    """A checked definition. Raises ValueError, which names the remedy."""
    if not _matches(_NAME, name):
        raise ValueError(
            f"metric name {name!r} cannot be used: begin with a letter, go on with letters, "
            "digits, '_' and '.', at most 128 of them"
        )
    if not _is_text(unit, _MAX_UNIT):
        raise ValueError(f"unit {unit!r} of {name}: use at most {_MAX_UNIT} characters")
    checked = MappingProxyType(_checked_labels(name, labels or {}))
    return Definition(name, kind, unit, checked, _checked_bounds(name, kind, bounds))


def _checked_labels(name: str, labels: Mapping[str, str]) -> dict[str, str]:
    if len(labels) > _MAX_LABELS:
        raise ValueError(f"{name} has {len(labels)} labels: use at most {_MAX_LABELS}")
    for key, value in labels.items():
        if not _matches(_LABEL_KEY, key):
            raise ValueError(
                f"label key {key!r} of {name} cannot be used: take lower-case letters and digits, "
                "inside also '.', '_', '/' and '-', at most 63 of them"
            )
        if not _is_text(value, _MAX_LABEL_VALUE):
            raise ValueError(
                f"label {key} of {name}: use a string of at most {_MAX_LABEL_VALUE} characters"
            )
    return dict(sorted(labels.items()))


def _checked_bounds(name: str, kind: Kind, bounds: Sequence[float]) -> tuple[float, ...]:
    if kind != "histogram":
        return ()
    numbers = tuple(as_number(bound) for bound in bounds)
    increasing = all(a < b for a, b in pairwise(numbers))
    allowed = 1 <= len(numbers) <= _MAX_BOUNDS
    if not allowed or not increasing or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"bounds of {name}: give 1 to {_MAX_BOUNDS} finite numbers, each above the one before"
        )
    return numbers


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_text(value: object, limit: int) -> bool:
    """A string that protobuf can carry: no NUL, no lone surrogate, not above the limit."""
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)
