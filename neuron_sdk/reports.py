"""Analytics on their way into the spool: what was measured since the last report, and events.

`Reports` buffers events from any thread, bounded, and cuts what was measured into reports that fit
the contract's limits. Events of severity ERROR and above come in reports of their own, which are
kept when others are dropped. It knows no wire format: `Report` is a plain value.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from neuron_sdk.logs import get_logger
from neuron_sdk.metrics import Metrics
from neuron_sdk.payload import (
    MAX_DETAILS_BYTES,
    MAX_DETAILS_DEPTH,
    JsonObject,
    NotJson,
    TooLarge,
    clean_text,
    encoded_size,
    plain_object,
)
from neuron_sdk.points import HistogramValue, Point

Severity = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
GRAVE = frozenset({"ERROR", "CRITICAL"})

MAX_BUFFERED_EVENTS = 10_000
MAX_BUFFERED_BYTES = 16 * 2**20
_MAX_POINTS = 2_000
_MAX_EVENTS = 1_000
_MAX_MESSAGE = 8_192
# Below the contract's 1 MiB, because sizes are estimated from above but not for every tag.
_MAX_REPORT_BYTES = 900_000

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in the service."""

    time: float
    """When, in seconds since 1970."""
    severity: str
    type: str
    message: str
    attributes: JsonObject = field(default_factory=dict)
    size: int = 0
    """About how many bytes it is, encoded; not below the truth."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured and noted over one span."""

    start_time: float
    end_time: float
    points: tuple[Point, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def grave(self) -> bool:
        """Whether it holds events of severity ERROR and above, and so nothing else."""
        return bool(self.events) and self.events[0].severity in GRAVE


def make_event(
    type: str,  # noqa: A002 - the contract's word
    message: str,
    severity: str,
    attributes: dict[str, Any],
    now: float,
) -> Event:
    """A checked event.

    Raises:
        ValueError: the type or the severity cannot be used; the text says what would be right.
    """
    head, rest = type[:1], type[1:]
    letters = rest.replace("_", "a").replace(".", "a").replace("-", "a")
    known = (
        head.isascii()
        and head.isalpha()
        and (not rest or (letters.isascii() and letters.isalnum()))
    )
    if not known or len(type) > 128:
        raise ValueError(
            f"event type {type!r} cannot be used: begin with a letter, go on with letters, "
            "digits, '_', '.' and '-', at most 128 of them"
        )
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} is unknown: use one of {', '.join(SEVERITIES)}")
    try:
        kept = plain_object(attributes, max_bytes=MAX_DETAILS_BYTES, max_depth=MAX_DETAILS_DEPTH)
    except (NotJson, TooLarge) as error:
        # An event is often made where something has failed already: it must not fail as well.
        kept = {"left_out": clean_text(f"the attributes cannot be sent: {error}", 1024)}
    text = clean_text(message, _MAX_MESSAGE)
    size = len(text.encode()) + len(type) + 64
    return Event(now, severity, type, text, kept, size + encoded_size(kept))


class Reports:
    """The analytics of one neuron. Every method may be called by any thread."""

    def __init__(
        self,
        metrics: Metrics,
        gauges: Callable[[], list[Point]],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`gauges` answers the built-in ones; `now` seconds since 1970."""
        self._metrics = metrics
        self._gauges = gauges
        self._now = now
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._grave: deque[Event] = deque()
        self._bytes = 0
        self._lost = 0
        self._since = now()
        self._on_urgent: Callable[[], None] = lambda: None

    def listen(self, on_urgent: Callable[[], None]) -> None:
        """Whom to tell, on the thread of whoever noted it, of an event that should not wait."""
        self._on_urgent = on_urgent

    def note(self, event: Event) -> None:
        """Keep an event for the next report; beyond the bounds the oldest ones go, the grave ones
        after all others.
        """
        grave = event.severity in GRAVE
        with self._lock:
            (self._grave if grave else self._events).append(event)
            self._bytes += event.size
            while (
                len(self._events) + len(self._grave) > MAX_BUFFERED_EVENTS
                or self._bytes > MAX_BUFFERED_BYTES
            ):
                self._bytes -= (self._events or self._grave).popleft().size
                self._lost += 1
        if grave:
            self._on_urgent()

    def take_events(self) -> list[Report]:
        """Reports of the buffered events alone."""
        grave, events = self._drain()
        now = self._now()
        start = min([now, *(event.time for event in (*grave, *events))])
        return [*_cut(start, now, [], grave), *_cut(start, now, [], events)]

    def take(self) -> list[Report]:
        """Reports of all that was measured and noted since the last take."""
        points = [*self._metrics.take_report(), *self._gauges()]
        grave, events = self._drain()
        # A clock that was set back must not make a span that ends before it begins.
        end = self._now()
        start, self._since = min(self._since, end), end
        return [*_cut(start, end, [], grave), *_cut(start, end, points, events)]

    def _drain(self) -> tuple[list[Event], list[Event]]:
        """The grave events, and the others."""
        with self._lock:
            events, self._events = list(self._events), deque()
            grave, self._grave = list(self._grave), deque()
            self._bytes = 0
            lost, self._lost = self._lost, 0
        if lost:
            _log.warning("events were dropped", action="report.events_dropped", count=lost)
        return grave, events


def _cut(start: float, end: float, points: list[Point], events: list[Event]) -> Iterator[Report]:
    """As many reports as it takes for each to be within the limits; none for nothing."""
    some_points: list[Point] = []
    some_events: list[Event] = []
    size = 0

    def full(more: int) -> bool:
        crowded = len(some_points) >= _MAX_POINTS or len(some_events) >= _MAX_EVENTS
        return crowded or size + more > _MAX_REPORT_BYTES

    for point in points:
        if some_points and full(_point_size(point)):
            yield Report(start, end, tuple(some_points))
            some_points, size = [], 0
        some_points.append(point)
        size += _point_size(point)
    for event in events:
        if (some_points or some_events) and full(event.size):
            yield Report(start, end, tuple(some_points), tuple(some_events))
            some_points, some_events, size = [], [], 0
        some_events.append(event)
        size += event.size
    if some_points or some_events:
        yield Report(start, end, tuple(some_points), tuple(some_events))


def _point_size(point: Point) -> int:
    text = sum(4 * (len(key) + len(value)) + 8 for key, value in point.labels.items())
    buckets = 20 * len(point.value.bounds) + 64 if isinstance(point.value, HistogramValue) else 16
    return 4 * (len(point.name) + len(point.unit)) + text + buckets
