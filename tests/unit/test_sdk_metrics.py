"""What a service counts: windows for heartbeats, deltas for reports, limits for mistakes."""

from __future__ import annotations

import math
import random
import sys
import threading
import time

import pytest

from neuron_sdk.metrics import MAX_SERIES, HistogramValue, Metrics, Point
from neuron_sdk.sketch import QuantileSketch


class Clock:
    """Seconds moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock=clock)


def values(points: list[Point]) -> dict[str, float | HistogramValue]:
    return {point.name: point.value for point in points}


# ---- the heartbeat's window


def test_a_window_tells_rate_mean_and_error_rate_of_its_own_time(
    metrics: Metrics, clock: Clock
) -> None:
    for ms, ok in ((10, True), (20, True), (30, False), (40, True)):
        metrics.track_request(ms, ok=ok)
    clock.now += 2
    window = metrics.take_window(clock.now)
    assert window.requests_per_second == 2.0
    assert window.mean_response_ms == 25.0
    assert window.error_rate_percent == 25.0
    assert window.p50_response_ms == pytest.approx(20, rel=0.01)


def test_a_window_is_empty_after_it_was_taken_but_totals_go_on(
    metrics: Metrics, clock: Clock
) -> None:
    metrics.track_request(10, ok=False)
    metrics.take_window(clock.now + 1)
    window = metrics.take_window(clock.now + 2)
    assert window.requests_per_second == 0.0
    assert window.mean_response_ms == 0.0
    assert window.p99_response_ms == 0.0
    assert window.error_rate_percent == 0.0
    assert (window.requests, window.failed_requests, window.response_ms_sum) == (1, 1, 10.0)
    metrics.track_request(10, ok=True)
    assert metrics.take_window(clock.now + 3).error_rate_percent == 0.0


def test_a_window_without_length_has_no_rate_instead_of_a_division_by_zero(
    metrics: Metrics, clock: Clock
) -> None:
    metrics.track_request(10)
    assert metrics.take_window(clock.now).requests_per_second == 0.0


def test_totals_do_not_restart_when_a_report_is_taken(metrics: Metrics, clock: Clock) -> None:
    metrics.track_request(10)
    metrics.take_report()
    metrics.track_request(5)
    window = metrics.take_window(clock.now + 1)
    assert (window.requests, window.response_ms_sum) == (2, 15.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_percentiles_of_skewed_times_are_within_two_percent(metrics: Metrics, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - not a secret
    times = [dice.lognormvariate(3, 1.5) for _ in range(20_000)]
    for ms in times:
        metrics.track_request(ms)
    window = metrics.take_window(101)
    times.sort()
    for share, answer in (
        (0.50, window.p50_response_ms),
        (0.95, window.p95_response_ms),
        (0.99, window.p99_response_ms),
    ):
        assert answer == pytest.approx(times[math.ceil(share * len(times)) - 1], rel=0.02)


def test_one_request_alone_is_every_percentile_of_itself(metrics: Metrics) -> None:
    metrics.track_request(123.4)
    window = metrics.take_window(101)
    assert window.p50_response_ms == window.p95_response_ms == window.p99_response_ms == 123.4


def test_a_request_of_no_time_has_percentiles_of_zero(metrics: Metrics) -> None:
    metrics.track_request(0)
    assert metrics.take_window(101).p99_response_ms == 0.0


def test_the_sketch_stays_small_over_any_range_of_values() -> None:
    sketch = QuantileSketch()
    for exponent in range(-3_000, 3_000):
        sketch.add(10.0 ** (exponent / 10))
    assert sketch.bucket_count() < 2_000


def test_measure_counts_its_body_with_its_time(metrics: Metrics, clock: Clock) -> None:
    with metrics.measure():
        clock.now += 0.25
    window = metrics.take_window(clock.now)
    assert (window.requests, window.failed_requests, window.response_ms_sum) == (1, 0, 250.0)


def test_measure_counts_a_failure_when_its_body_raises_and_lets_the_error_through(
    metrics: Metrics,
) -> None:
    with pytest.raises(KeyError), metrics.measure():
        raise KeyError
    assert metrics.take_window(101).failed_requests == 1


def test_measure_counts_a_failure_that_its_body_declares(metrics: Metrics) -> None:
    with metrics.measure() as request:
        request.fail()
    assert metrics.take_window(101).failed_requests == 1


def test_a_measured_request_is_active_while_its_body_runs(metrics: Metrics) -> None:
    with metrics.measure():
        assert metrics.take_window(101).active_connections == 1
    assert metrics.take_window(102).active_connections == 0


def test_active_connections_never_fall_below_zero(metrics: Metrics) -> None:
    metrics.request_finished()
    metrics.request_started()
    assert metrics.take_window(101).active_connections == 1


@pytest.mark.parametrize(("given", "kept"), [(17, 17), (-1, 5), (math.nan, 5), (2**70, 2**64 - 1)])
def test_the_queue_size_keeps_within_the_contracts_range(
    metrics: Metrics, given: int, kept: int
) -> None:
    metrics.set_queue_size(5)
    metrics.set_queue_size(given)
    assert metrics.take_window(101).queue_size == kept


@pytest.mark.parametrize("ms", [math.nan, math.inf, -math.inf, -1.0, 10**400, "fast", None])
def test_an_impossible_response_time_is_ignored_and_counted(metrics: Metrics, ms: float) -> None:
    metrics.track_request(ms)
    assert metrics.take_window(101).requests == 0
    assert metrics.ignored_values == 1


class GivesWay(dict[int, int]):
    """Lets another thread run between reading a count and writing it."""

    def get(self, key: int, default: int = 0) -> int:  # type: ignore[override]
        count = super().get(key, default)
        time.sleep(0)
        return count


def test_no_request_is_lost_when_many_threads_count(metrics: Metrics) -> None:
    buckets = metrics._window_times._buckets = GivesWay()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(1_000):
            metrics.track_request(1.0)
            metrics.counter("rows").add(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(buckets.values()) == 4_000
    assert metrics.take_window(101).requests == 4_000
    assert values(metrics.take_report())["rows"] == 8_000


# ---- the report


def test_a_report_tells_the_built_in_series(metrics: Metrics) -> None:
    metrics.track_request(3)
    metrics.track_request(7, ok=False)
    points = values(metrics.take_report())
    assert points["requests"] == 2
    assert points["failed_requests"] == 1
    times = points["response_ms"]
    assert isinstance(times, HistogramValue)
    assert (sum(times.bucket_counts), times.sum, times.min, times.max) == (2, 10.0, 3.0, 7.0)


def test_a_counter_is_reported_by_its_growth_and_left_out_without_any(metrics: Metrics) -> None:
    rows = metrics.counter("rows", unit="rows", labels={"source": "s3"})
    rows.add(5)
    rows.add()
    assert metrics.take_report() == [Point("rows", "counter", "rows", {"source": "s3"}, 6.0)]
    assert metrics.take_report() == []
    rows.add(0)
    assert metrics.take_report() == []
    rows.add(1)
    assert values(metrics.take_report()) == {"rows": 1.0}


def test_a_gauge_is_reported_again_and_again_once_it_was_set(metrics: Metrics) -> None:
    gauge = metrics.gauge("temperature")
    assert metrics.take_report() == []
    gauge.set(-3.5)
    assert values(metrics.take_report()) == {"temperature": -3.5}
    assert values(metrics.take_report()) == {"temperature": -3.5}


def test_a_histogram_counts_a_value_on_a_bound_into_the_bucket_below(metrics: Metrics) -> None:
    sizes = metrics.histogram("sizes", bounds=(1, 10))
    for value in (1, 1.5, 10, 10.5, -5):
        sizes.observe(value)
    (point,) = metrics.take_report()
    assert point.value == HistogramValue((1.0, 10.0), (2, 2, 1), 18.0, -5.0, 10.5)
    assert metrics.take_report() == []


def test_a_histograms_smallest_and_largest_begin_anew_with_each_report(metrics: Metrics) -> None:
    sizes = metrics.histogram("sizes", bounds=(10,))
    sizes.observe(1)
    sizes.observe(100)
    metrics.take_report()
    sizes.observe(7)
    assert values(metrics.take_report()) == {
        "sizes": HistogramValue((10.0,), (1, 0), 7.0, 7.0, 7.0)
    }


def test_totals_stand_as_if_no_report_had_been_taken(metrics: Metrics) -> None:
    metrics.counter("rows").add(2)
    metrics.histogram("sizes", bounds=(10,)).observe(4)
    metrics.take_report()
    metrics.counter("rows").add(3)
    metrics.histogram("sizes", bounds=(10,)).observe(40)
    totals = values(metrics.totals())
    assert totals["rows"] == 5
    assert totals["sizes"] == HistogramValue((10.0,), (1, 1), 44.0, None, None)
    assert values(metrics.take_report())["rows"] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, "many", None, 10**400])
def test_a_value_that_is_no_finite_number_is_ignored_by_every_series_and_counted(
    metrics: Metrics, value: float
) -> None:
    metrics.counter("c").add(value)
    metrics.gauge("g").set(value)
    metrics.histogram("h").observe(value)
    assert metrics.take_report() == []
    assert metrics.ignored_values == 3


def test_a_counter_never_goes_back(metrics: Metrics) -> None:
    metrics.counter("c").add(-1)
    assert metrics.take_report() == []
    assert metrics.ignored_values == 1


def test_sums_that_overflow_stay_finite(metrics: Metrics) -> None:
    for _ in range(2):
        metrics.counter("c").add(1e308)
        metrics.histogram("h", bounds=(1,)).observe(1.5e308)
        metrics.track_request(1.5e308)
    points = values(metrics.take_report())
    assert points["c"] == sys.float_info.max
    assert isinstance(points["h"], HistogramValue)
    assert points["h"].sum == sys.float_info.max
    window = metrics.take_window(101)
    assert math.isfinite(window.mean_response_ms)
    assert math.isfinite(window.response_ms_sum)


# ---- names and limits


def test_the_same_name_and_labels_are_the_same_series_whatever_their_order(
    metrics: Metrics,
) -> None:
    one = metrics.counter("c", labels={"a": "1", "b": "2"})
    assert metrics.counter("c", labels={"b": "2", "a": "1"}) is one
    assert metrics.counter("c", labels={"a": "1"}) is not one


@pytest.mark.parametrize(
    "name", ["", "1st", "_x", "a-b", "ä", "a b", "x" * 129, "rows\n", None, "requests", "system.x"]
)
def test_a_name_outside_the_contract_is_refused_with_its_remedy(
    metrics: Metrics, name: str
) -> None:
    with pytest.raises(ValueError, match=r"begin with a letter|choose another name"):
        metrics.counter(name)


def test_the_longest_name_label_and_unit_of_the_contract_are_taken(metrics: Metrics) -> None:
    labels = {f"k{number}": "v" * 256 for number in range(16)}
    metrics.counter("x" * 128, unit="u" * 32, labels=labels).add()
    assert len(metrics.take_report()) == 1


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"A": "x"},
        {"a-": "x"},
        {"a" * 64: "x"},
        {"a": "v" * 257},
        {"a": "\0"},
        {"a": "\ud800"},
        {"a": 1},
        {f"k{number}": "" for number in range(17)},
    ],
)
def test_labels_outside_the_contract_are_refused(metrics: Metrics, labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"label"):
        metrics.gauge("g", labels=labels)


@pytest.mark.parametrize(
    "bounds", [(), (1, 1), (2, 1), (math.nan,), (1, math.inf), tuple(range(101)), ("x",)]
)
def test_bounds_outside_the_contract_are_refused(
    metrics: Metrics, bounds: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"strictly|finite numbers"):
        metrics.histogram("h", bounds=bounds)


def test_a_unit_too_long_is_refused(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="at most 32"):
        metrics.counter("c", unit="u" * 33)


def test_a_name_with_another_kind_is_refused(metrics: Metrics) -> None:
    metrics.counter("rows")
    with pytest.raises(ValueError, match=r"rows is a counter already: choose another name"):
        metrics.gauge("rows", labels={"a": "b"})


def test_a_name_with_other_bounds_is_refused(metrics: Metrics) -> None:
    metrics.histogram("sizes", bounds=(1, 2))
    with pytest.raises(ValueError, match=r"use the same, or choose another name"):
        metrics.histogram("sizes", bounds=(1, 3), labels={"a": "b"})


def test_series_beyond_the_limit_drop_their_values_and_count_them(metrics: Metrics) -> None:
    for number in range(MAX_SERIES * 2):
        metrics.counter("c", labels={"user": str(number)}).add()
    taken = len(metrics.take_report())
    assert taken == MAX_SERIES - 3  # the built-in series have their places, and nothing to tell
    assert metrics.dropped_values == MAX_SERIES * 2 - taken
    assert len(metrics.totals()) <= MAX_SERIES
