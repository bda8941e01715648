"""How values read: times, spans, sizes, enum values, and text that comes from others.

Everything that a neuron or another admin wrote goes through `clean` before it reaches a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from federation_server.domain.text import HIDDEN

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

NOTHING = "-"
"""Stands where there is no value."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, erase
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c|$)"  # OSC, DCS and the like: titles, clipboard, links
    r"|\x1b[ -/]*[0-~]?",  # all other escapes
    re.DOTALL,
)
_INVISIBLE = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but not tab and line feed
    rf"{HIDDEN}\ud800-\udfff"  # those that hide or turn text, lone surrogates
)
_CONTROLS = re.compile(f"[{_INVISIBLE}]")
_SPACES = re.compile(r"[\t\n]+")


def clean_lines(text: str) -> str:
    """The text without control characters and terminal escapes; tabs and line ends stay."""
    text = text.replace("\r\n", "\n")
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).expandtabs(4)


def clean(text: str) -> str:
    """The same on one line."""
    return _SPACES.sub(" ", clean_lines(text))


def moment(stamp: Timestamp) -> datetime | None:
    """The time in the local zone, or None if it is not set."""
    if not (stamp.seconds or stamp.nanos):
        return None
    at = stamp.ToDatetime(tzinfo=UTC)
    try:
        return at.astimezone()
    except OverflowError:  # the last day that there is, east of Greenwich
        return at


def absolute(stamp: Timestamp) -> str:
    """A time to the second with its offset: 2026-11-21 08:52:03 +01:00."""
    at = moment(stamp)
    if at is None:
        return NOTHING
    return at.isoformat(" ", "seconds").replace("+", " +", 1)


def clock(stamp: Timestamp) -> str:
    """A time of the day to the millisecond: 08:52:03.412."""
    at = moment(stamp)
    return NOTHING if at is None else at.isoformat("T", "milliseconds")[11:23]


def relative(stamp: Timestamp, now: datetime | None = None) -> str:
    """How long ago, or how far ahead: "12 s ago", "in 3 h"; a second or less is "now"."""
    at = moment(stamp)
    if at is None:
        return NOTHING
    distance = (now or datetime.now(UTC)) - at
    if abs(distance) <= timedelta(seconds=1):
        return "now"
    return f"{coarse(distance)} ago" if distance > timedelta() else f"in {coarse(-distance)}"


def both(stamp: Timestamp, now: datetime | None = None) -> str:
    """A time as a date and as a distance."""
    if moment(stamp) is None:
        return NOTHING
    return f"{absolute(stamp)} ({relative(stamp, now)})"


def coarse(length: timedelta) -> str:
    """A length of time in its greatest unit: "12 s", "3 min", "5 h", "2 d"."""
    seconds = round(length.total_seconds())
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < until:
            return f"{seconds // size} {unit}"
    return f"{seconds // 86400} d"


def span(length: Duration) -> str:
    """A length of time, exact to three digits below a minute: "1.24 s", "2 h 05 min"."""
    seconds = length.seconds + length.nanos / 1e9
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 172800:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: int) -> str:
    """A number of bytes: "512 B", "1.5 GiB"."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{value / 1024:.3g} PiB"


def number(value: float) -> str:
    """A number with as many digits as are worth reading; whole ones in full."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


def percent(value: float) -> str:
    """A percentage: "41 %", "0.5 %"."""
    return f"{value:.0f} %" if value >= 10 or value == int(value) else f"{value:.1f} %"


class EnumType(Protocol):
    """An enum of the contract."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor:  # noqa: N802 - protobuf's name
        """Names it."""

    def Name(self, number: Any) -> str:  # noqa: N802 - protobuf's name
        """A value's name; raises ValueError for one that is unknown here."""


def enum(kind: EnumType, value: int) -> str:
    """An enum value's name without its prefix; its number, if a newer server knows it alone."""
    if value == 0:
        return NOTHING
    try:
        name = kind.Name(value)
    except ValueError:
        return str(value)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.DESCRIPTOR.name).upper()
    return name.removeprefix(prefix + "_")


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Labels: "zone=eu, tier=gold"."""
    return ", ".join(f"{key}={value}" for key, value in sorted(items))


def milliseconds(value: float) -> str:
    """A response time: "12.5 ms", "1.2 s"."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def joined(*parts: str) -> str:
    """The parts that there are: "python · 2.4.1"."""
    return " · ".join(part for part in parts if part)


def listed(*parts: str) -> str:
    """All parts: "mean 12 ms, p50 9 ms"."""
    return ", ".join(parts)
