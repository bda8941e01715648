"""What a service counts of itself: its requests, and series of its own.

`Metrics` promises that its hot calls are thread-safe, take about a microsecond, never raise and
never grow without bound. The control channel reads it: `take_window` for each heartbeat,
`take_report` for each analytics report, `totals` for Prometheus; the three do not disturb each
other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from neuron_sdk.points import HistogramValue, Point, as_number, define
from neuron_sdk.series import (
    DEFAULT_BOUNDS,
    MAX_SERIES,
    Counter,
    Gauge,
    Histogram,
    SeriesBook,
    Tally,
    finite,
)
from neuron_sdk.sketch import QuantileSketch

__all__ = [
    "DEFAULT_BOUNDS",
    "MAX_SERIES",
    "ApplicationWindow",
    "Counter",
    "Gauge",
    "Histogram",
    "HistogramValue",
    "Measurement",
    "Metrics",
    "Point",
]

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ApplicationWindow:
    """The service's own load: the fields of ApplicationMetrics in the contract.

    Rates, means and percentiles are over the time since the window before; 0 without requests.
    """

    requests_per_second: float
    mean_response_ms: float
    p50_response_ms: float
    p95_response_ms: float
    p99_response_ms: float
    active_connections: int
    queue_size: int
    error_rate_percent: float
    requests: int
    """Since the process started."""
    failed_requests: int
    """Since the process started; not above `requests`."""
    response_ms_sum: float
    """Since the process started."""


class Metrics:
    """Counts requests and the service's own series; every method may be called by any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` answers seconds that never go back."""
        self._clock = clock
        self._tally = Tally()
        self._lock = self._tally.lock
        self._series = SeriesBook(self._tally)

        # The built-in series. The two counters are worked out from the totals when they are
        # read: the hot path then counts a request once.
        self._requests_series = self.counter("requests")
        self._failed_series = self.counter("failed_requests")
        self._response_ms = self.histogram("response_ms", unit="ms")
        self._series.reserve()

        self._requests = 0
        self._failed = 0
        self._active = 0
        self._queue_size = 0
        self._reported_requests = 0
        self._reported_failed = 0
        self._begin_window(clock())

    # ---- the hot calls

    def track_request(self, ms: float, *, ok: bool = True) -> None:
        """Count one request that took `ms` milliseconds, and whether it succeeded.

        A time that is negative, NaN or infinite is ignored and counted, with its request.
        """
        number = as_number(ms)
        with self._lock:
            if not 0.0 <= number < math.inf:
                self._tally.ignored += 1
                return
            self._requests += 1
            if not ok:
                self._failed += 1
            self._window_ms += number
            self._window_times.add(number)
            self._response_ms.add(number)

    def measure(self) -> Measurement:
        """A context manager that counts its body as one request, failed if the body raises.

        While the body runs it counts as an active connection.
        """
        return Measurement(self, self._clock)

    def request_started(self) -> None:
        """One more connection or request is open."""
        with self._lock:
            self._active += 1

    def request_finished(self) -> None:
        """One fewer is open."""
        with self._lock:
            self._active = max(0, self._active - 1)

    def set_queue_size(self, size: int) -> None:
        """How much work waits now."""
        number = as_number(size)
        with self._lock:
            if not 0.0 <= number < math.inf:
                self._tally.ignored += 1
            else:
                self._queue_size = min(int(number), _MAX_UINT64)

    # ---- series of the service's own

    def counter(
        self, name: str, *, unit: str = "", labels: Mapping[str, str] | None = None
    ) -> Counter:
        """The counter of this name and these labels; made when first asked for.

        Raises:
            ValueError: the name, unit or labels break a limit, or the name has another kind.
        """
        return self._series.obtain(Counter, define(name, "counter", unit, labels))

    def gauge(self, name: str, *, unit: str = "", labels: Mapping[str, str] | None = None) -> Gauge:
        """The gauge of this name and these labels; made when first asked for.

        Raises:
            ValueError: the name, unit or labels break a limit, or the name has another kind.
        """
        return self._series.obtain(Gauge, define(name, "gauge", unit, labels))

    def histogram(
        self,
        name: str,
        *,
        bounds: Sequence[float] = DEFAULT_BOUNDS,
        unit: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Histogram:
        """The histogram of this name and these labels; made when first asked for.

        Args:
            name: as in MetricPoint of the contract.
            bounds: upper bounds of the buckets, inclusive, strictly increasing, 1 to 100.
            unit: for people.
            labels: what tells series of one name apart.

        Raises:
            ValueError: an argument breaks a limit, or the name has another kind or bounds.
        """
        wanted = define(name, "histogram", unit, labels, bounds)
        return self._series.obtain(Histogram, wanted)

    # ---- reading

    def take_window(self, now: float) -> ApplicationWindow:
        """The load since the last window, which ends here; `now` is by this object's clock."""
        with self._lock:
            times, total_ms, began = self._window_times, self._window_ms, self._window_start
            failed = self._failed - self._window_failed_before
            active, queued = self._active, self._queue_size
            requests, all_failed = self._requests, self._failed
            all_ms = self._response_ms.total_sum()
            self._begin_window(now)
        seconds = now - began
        p50, p95, p99 = times.quantiles((0.50, 0.95, 0.99))
        return ApplicationWindow(
            requests_per_second=finite(times.count / seconds) if seconds > 0 else 0.0,
            mean_response_ms=finite(total_ms) / times.count if times.count else 0.0,
            p50_response_ms=p50,
            p95_response_ms=p95,
            p99_response_ms=p99,
            active_connections=min(active, _MAX_UINT32),
            queue_size=queued,
            error_rate_percent=100.0 * failed / times.count if times.count else 0.0,
            requests=requests,
            failed_requests=all_failed,
            response_ms_sum=all_ms,
        )

    def take_report(self) -> list[Point]:
        """What was measured since the last report, at most `MAX_SERIES` points.

        Counters and histograms tell what they grew by, and are left out if they did not; gauges
        tell their value each time.
        """
        with self._lock:
            self._count_requests()
            taken = [series.take() for series in self._series]
        return [point for point in taken if point is not None]

    def totals(self) -> list[Point]:
        """Every series as it stands since the process started. Takes nothing away."""
        with self._lock:
            self._count_requests()
            points = [series.total() for series in self._series]
        return [point for point in points if point is not None]

    @property
    def active_connections(self) -> int:
        """Connections or requests open now."""
        return self._active

    @property
    def queue_size(self) -> int:
        """Work that waits now."""
        return self._queue_size

    @property
    def ignored_values(self) -> int:
        """Values that could not be taken: NaN, infinite, or negative where that has no meaning."""
        return self._tally.ignored

    @property
    def dropped_values(self) -> int:
        """Values for series beyond `MAX_SERIES`."""
        return self._tally.dropped

    def _begin_window(self, now: float) -> None:
        self._window_start = now
        self._window_times = QuantileSketch()
        self._window_ms = 0.0
        self._window_failed_before = self._failed

    def _count_requests(self) -> None:
        self._requests_series.grow(self._requests - self._reported_requests)
        self._failed_series.grow(self._failed - self._reported_failed)
        self._reported_requests, self._reported_failed = self._requests, self._failed


class Measurement:
    """One request under way; made by `Metrics.measure()`, good for one `with`."""

    __slots__ = ("_clock", "_failed", "_metrics", "_start")

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._failed = False
        self._start = 0.0

    def fail(self) -> None:
        """Count the request as failed although its body does not raise."""
        self._failed = True

    def __enter__(self) -> Self:
        self._metrics.request_started()
        self._start = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        elapsed_ms = max(0.0, self._clock() - self._start) * 1_000
        self._metrics.request_finished()
        self._metrics.track_request(elapsed_ms, ok=kind is None and not self._failed)
