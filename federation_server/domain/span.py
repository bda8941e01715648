"""Lengths of time as people write them: 500ms, 30s, 5m, 2h, 1d, 1w, 1h30m."""

from __future__ import annotations

import re
from datetime import timedelta

_UNITS = {
    "w": timedelta(weeks=1),
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}
_SPAN = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,6})?(?:ms|[smhdw]))+")
_PART = re.compile(r"([0-9.]+)(ms|[smhdw])")


def read(text: str) -> timedelta | None:
    """The length of time that a text names; None if it names none, or one that is too long for any
    use.
    """
    if not _SPAN.fullmatch(text):
        return None
    try:
        return sum(
            (float(count) * _UNITS[unit] for count, unit in _PART.findall(text)), timedelta()
        )
    except OverflowError:
        return None


def write(length: timedelta) -> str:
    """A length of time in the greatest unit of which it is a multiple, as `read` reads it; weeks
    as days.
    """
    for unit in ("d", "h", "m", "s"):
        if length and not length % _UNITS[unit]:
            return f"{length // _UNITS[unit]}{unit}"
    return f"{length / _UNITS['ms']:g}ms" if length else "0s"
