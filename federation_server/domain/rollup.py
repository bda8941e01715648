"""Rollups: what was measured, added up by minute, hour and day, and when to read which.

Points are kept for some days, minutes for weeks, hours and days for years. A question is answered
from the coarsest that answers it exactly, and at the edges, and where the coarser is not made yet,
from finer ones; what only a coarser one still knows comes from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Level(StrEnum):
    """How much is added up; from fine to coarse."""

    POINT = "POINT"
    """Nothing: as it was reported."""
    MINUTE = "MINUTE"
    HOUR = "HOUR"
    DAY = "DAY"


WIDTHS = {
    Level.MINUTE: timedelta(minutes=1),
    Level.HOUR: timedelta(hours=1),
    Level.DAY: timedelta(days=1),
}
"""The spans of the rollups; each is a multiple of the one before."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What there is of a level."""

    level: Level
    since: datetime
    """Older than this is dropped, or may be."""
    until: datetime
    """From here on it is not made yet; of no meaning for points."""


class Segment(NamedTuple):
    """A part of a question, and from which level it is answered."""

    level: Level
    start: datetime
    end: datetime


def floor(time: datetime, width: timedelta) -> datetime:
    """The beginning of the bucket that a time is in; buckets are aligned to 1970."""
    return time - (time - _EPOCH) % width


def ceil(time: datetime, width: timedelta) -> datetime:
    """The beginning of the next bucket, or the time itself where one begins."""
    return time + (_EPOCH - time) % width


def plan(start: datetime, end: datetime, width: timedelta, kept: Sequence[Kept]) -> list[Segment]:
    """From where [start, end) in buckets of that width is read; in order, and nothing twice.

    `kept` is from fine to coarse, and begins with the points.
    """
    return _plan(start, end, width, kept) if start < end else []


def _plan(start: datetime, end: datetime, width: timedelta, kept: Sequence[Kept]) -> list[Segment]:
    *finer, here = kept
    if not finer:
        return [Segment(here.level, start, end)]
    span = WIDTHS[here.level]
    known = min(each.since for each in finer)  # before this the finer ones know nothing
    first = ceil(start, span)
    last = min(floor(end, span), here.until)
    if start < known:
        first = floor(start, span)
        if width % span:
            last = min(last, ceil(known, span))
    elif width % span:
        return _plan(start, end, width, finer)
    if first >= last:
        return _plan(start, end, width, finer)
    segments = [Segment(here.level, first, last)]
    if start < first:
        segments = [*_plan(start, first, width, finer), *segments]
    if last < end:
        segments += _plan(last, end, width, finer)
    return segments
