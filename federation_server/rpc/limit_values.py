"""The words in which `limit_table.py` limits single values: texts, numbers, enums, times, spans.

A kind makes a closure once for the field that it limits, and the closure is what runs for every
message. Nothing in it looks at a descriptor, builds a path or makes an object for a field that is
in order: heartbeats pass through here by the thousand each second.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from federation_server.rpc.findings import Check, Fault, Findings, Judge, Path

MAX_INTEGER = 2**63 - 1
"""PostgreSQL's bigint; the contract's uint64 fields end here too."""

MAX_TIME_S = 253_402_300_799
"""9999-12-31T23:59:59Z, the last second of a Timestamp."""

MAX_DOUBLE = sys.float_info.max

REQUIRED = "is required"


class Walk(NamedTuple):
    """How a message type is checked: all of it, or one field."""

    whole: Check
    fields: Mapping[str, Check]


class Kind(ABC):
    """The limit of a field."""

    @abstractmethod
    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of the field `name`; `inner` gives that of the messages in it."""


class Value(Kind):
    """The limit of one value, which may also stand in a list or a map."""

    @property
    def needed(self) -> bool:
        """Whether an empty value (an empty string, 0) is refused."""
        return False

    @abstractmethod
    def judge(self) -> Judge:
        """What looks at a value."""

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of a field that holds one such value."""
        get, judge, needed = attrgetter(name), self.judge(), self.needed

        def check(message: Any, path: Path, found: Findings) -> None:
            value = get(message)
            if value or needed:
                fault = judge(value)
                if fault is not None:
                    found.add(path, name, fault[0], too_large=fault[1])

        return check


@dataclass(frozen=True)
class Text(Value):
    """A string: its length in characters or in bytes, its pattern; never a NUL."""

    longest: int = sys.maxsize
    required: bool = False
    pattern: str | None = None
    max_bytes: int = sys.maxsize

    @property
    def needed(self) -> bool:
        """REQUIRED in the contract."""
        return self.required

    def judge(self) -> Judge:
        """Length, NUL, pattern, bytes, in this order: the cheap ones bound the others."""
        longest, pattern, max_bytes = self.longest, self.pattern, self.max_bytes
        empty = Fault(REQUIRED) if self.required else None
        matches = re.compile(pattern).fullmatch if pattern else None

        def judge(value: str) -> Fault | None:
            if not value:
                return empty
            if len(value) > longest:
                return Fault(f"must be at most {longest} characters long; it has {len(value)}")
            if "\0" in value:
                return Fault("must not hold a NUL character")
            if matches is not None and matches(value) is None:
                return Fault(f"must match {pattern}")
            # UTF-8 takes at most four bytes a character, so most values need no encoding.
            if len(value) * 4 > max_bytes and (size := len(value.encode())) > max_bytes:
                return Fault(f"must be at most {max_bytes} bytes of UTF-8; it has {size}", True)
            return None

        return judge

    @property
    def plain(self) -> bool:
        """Its length is all that is asked of it, and that it holds no NUL."""
        return self.pattern is None and self.max_bytes == sys.maxsize


def plain_texts(kinds: Mapping[str, Text]) -> Check:
    """The check of several `plain` fields of a message: one fetch, and one look at all of them
    together, which is enough for texts that are far from their limits.
    """
    names = sorted(kinds, key=lambda name: not kinds[name].required)
    fetch, required = fetch_all(names), sum(kind.required for kind in kinds.values())
    judges = [kinds[name].judge() for name in names]
    least = min(kind.longest for kind in kinds.values())

    def check(message: Any, path: Path, found: Findings) -> None:
        values = fetch(message)
        text = "".join(values)
        if len(text) <= least and "\0" not in text and all(values[:required]):
            return
        for name, value, judge in zip(names, values, judges, strict=True):
            fault = judge(value)
            if fault is not None:
                found.add(path, name, fault[0])

    return check


def fetch_all(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What gets the values of several fields as a tuple."""
    if len(names) > 1:
        return attrgetter(*names)
    get = attrgetter(names[0])
    return lambda message: (get(message),)


@dataclass(frozen=True)
class HttpUrl(Value):
    """An http or https URL."""

    longest: int

    def judge(self) -> Judge:
        """Length, then form."""
        judge_text = Text(self.longest).judge()

        def judge(value: str) -> Fault | None:
            fault = judge_text(value)
            if fault is None and not _is_http_url(value):
                return Fault("must be an http or https URL, for example http://10.0.0.7:9000")
            return fault

        return judge


def _is_http_url(text: str) -> bool:
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        return False
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and port != 0


@dataclass(frozen=True)
class Numeric(Value):
    """A number between two bounds, both inclusive; comparison is what refuses NaN.

    All numbers of a message that have the same bounds are checked in one go (`same_bounds`).
    """

    low: float
    high: float

    @property
    def needed(self) -> bool:
        """0, which is also what an absent number reads as, is out of bounds."""
        return not self.low <= 0 <= self.high

    def words(self) -> str:
        """The bounds, for people."""
        return f"must be between {self.low:.15g} and {self.high:.15g}"

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """Compares at once."""
        get, check_value = attrgetter(name), super().check(name, inner)
        low, high = self.low, self.high

        def check(message: Any, path: Path, found: Findings) -> None:
            if not low <= get(message) <= high:
                check_value(message, path, found)

        return check

    def judge(self) -> Judge:
        """Compares."""
        low, high, words = self.low, self.high, self.words()

        def judge(value: float) -> Fault | None:
            return None if low <= value <= high else Fault(f"{words}; it is {value!r}")

        return judge


@dataclass(frozen=True)
class Number(Numeric):
    """A double: finite, and not below 0 unless it says so."""

    low: float = 0.0
    high: float = MAX_DOUBLE

    def words(self) -> str:
        """The bounds, for people."""
        if self.high < MAX_DOUBLE:
            return super().words()
        return "must be a finite number" + ("" if self.low else ", not below 0")


@dataclass(frozen=True)
class Integer(Numeric):
    """An integer that PostgreSQL can hold."""

    low: int = 0
    high: int = MAX_INTEGER

    def words(self) -> str:
        """The bounds, for people."""
        return f"must be between {self.low} and {self.high}"


def same_bounds(kind: Numeric, names: Sequence[str]) -> Check:
    """The check of several number fields with the bounds of `kind`: one fetch, one loop."""
    low, high, words = kind.low, kind.high, kind.words()
    fetch = fetch_all(names)

    def check(message: Any, path: Path, found: Findings) -> None:
        values = fetch(message)
        for value in values:
            if not low <= value <= high:
                break
        else:
            return
        for name, value in zip(names, values, strict=True):
            if not low <= value <= high:
                found.add(path, name, f"{words}; it is {value!r}")

    return check


@dataclass(frozen=True)
class Known(Value):
    """A value of an enum that this server knows. `only` narrows it; `required` refuses 0."""

    enum: Any
    required: bool = False
    only: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """REQUIRED in the contract."""
        return self.required

    def _known(self) -> dict[int, str]:
        return {
            number: name
            for name, number in self.enum.items()
            if (number or not self.required) and (not self.only or name in self.only)
        }

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """Looks the number up at once: every heartbeat has several of these."""
        get, known, check_value = attrgetter(name), self._known(), super().check(name, inner)

        def check(message: Any, path: Path, found: Findings) -> None:
            if get(message) not in known:
                check_value(message, path, found)

        return check

    def judge(self) -> Judge:
        """Looks the number up."""
        known = self._known()
        words = f"must be one of {', '.join(known.values())}"

        def judge(value: int) -> Fault | None:
            if value in known:
                return None
            return Fault(f"{words}; it is {value}" if value else REQUIRED)

        return judge


@dataclass(frozen=True)
class Time(Kind):
    """A Timestamp from 1970 to 9999."""

    required: bool = False

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of a field that may be set or not."""
        get, required = attrgetter(name), self.required
        words = "must be a time from 1970-01-01T00:00:00Z to 9999-12-31T23:59:59.999999999Z"

        def check(message: Any, path: Path, found: Findings) -> None:
            if message.HasField(name):
                time = get(message)
                if not (0 <= time.seconds <= MAX_TIME_S and 0 <= time.nanos <= 999_999_999):
                    found.add(path, name, words)
            elif required:
                found.add(path, name, REQUIRED)

        return check


@dataclass(frozen=True)
class Span(Kind):
    """A Duration between two bounds in seconds; `or_zero`: 0 is taken too, for the default."""

    low: float
    high: float
    or_zero: bool = False

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of a field that may be set or not. In nanoseconds, so that it is exact."""
        get, or_zero = attrgetter(name), self.or_zero
        low, high = round(self.low * 1e9), round(self.high * 1e9)
        words = f"must be between {_in_words(self.low)} and {_in_words(self.high)}"

        def check(message: Any, path: Path, found: Findings) -> None:
            if not message.HasField(name):
                return
            span = get(message)
            seconds, nanos = span.seconds, span.nanos
            total = seconds * 1_000_000_000 + nanos
            if not -1_000_000_000 < nanos < 1_000_000_000 or nanos * seconds < 0:
                found.add(path, name, f"{words}; nanos must be below 1e9, of the sign of seconds")
            elif not low <= total <= high and (total or not or_zero):
                found.add(path, name, f"{words}; it is {total / 1e9:.15g} s")

        return check


def _in_words(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3_600, "h"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds * 1000:g} ms"
