"""Histograms: percentiles by interpolation, and merging without and with equal bounds."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.analytics import (
    Histogram,
    MetricKind,
    aligned_buckets,
    default_bucket_width,
    histogram_bucket,
    numbers_bucket,
)

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    bounds = sorted(draw(st.lists(FINITE, min_size=1, max_size=12, unique=True)))
    counts = draw(
        st.lists(st.integers(0, 2**40), min_size=len(bounds) + 1, max_size=len(bounds) + 1)
    )
    least, greatest = (draw(st.none() | FINITE) for _ in range(2))
    return Histogram(bounds, counts, draw(FINITE), least, greatest)


def test_a_percentile_is_interpolated_within_its_bucket() -> None:
    histogram = Histogram([10, 20, 40], [10, 10, 20, 0], sum=800)
    assert histogram.quantile(0.25) == 10
    assert histogram.quantile(0.375) == 15
    assert histogram.quantile(0.75) == 30


def test_the_outer_buckets_end_at_the_least_and_the_greatest_observation() -> None:
    histogram = Histogram([10, 20], [4, 0, 4], sum=120, min=6, max=30)
    assert histogram.quantile(0.25) == 8
    assert histogram.quantile(0.75) == 25


def test_the_outer_buckets_begin_at_zero_and_end_at_the_last_bound_if_nothing_is_known() -> None:
    histogram = Histogram([10, 20], [4, 0, 4], sum=120)
    assert histogram.quantile(0.25) == 5
    assert histogram.quantile(0.99) == 20


def test_no_percentile_lies_beyond_the_least_and_the_greatest_observation() -> None:
    histogram = Histogram([10, 20], [0, 4, 0], sum=66, min=15, max=18)
    assert histogram.quantile(0.5) == 16.5


def test_no_observation_has_no_percentile() -> None:
    assert Histogram([10], [0, 0], sum=0).quantile(0.5) is None


def test_a_percentile_of_the_widest_bucket_there_can_be_is_a_finite_number() -> None:
    widest = Histogram([-1.7e308, 1.7e308], [0, 10, 0], sum=0)
    assert widest.quantile(0.5) == pytest.approx(0, abs=1e300)


def test_histograms_with_equal_bounds_merge_without_loss() -> None:
    one = Histogram([1, 2], [1, 2, 3], sum=10, min=0.5, max=9)
    other = Histogram([1, 2], [10, 20, 30], sum=100, min=0.25, max=5)
    assert one.merge(other) == Histogram([1, 2], [11, 22, 33], sum=110, min=0.25, max=9)


def test_a_histogram_with_other_bounds_is_spread_evenly_over_the_bounds_of_the_first() -> None:
    one = Histogram([10, 20], [0, 0, 0], sum=0)
    other = Histogram([20, 40], [10, 8, 0], sum=300)  # 10 over 0..20, 8 over 20..40
    assert one.merge(other).bucket_counts == [5, 5, 8]


def test_bounds_that_lie_within_a_bucket_of_the_other_share_its_observations() -> None:
    one = Histogram([5, 10, 15], [0, 0, 0, 0], sum=0)
    other = Histogram([20], [8, 0], sum=80, min=0)
    assert one.merge(other).bucket_counts == [2, 2, 2, 2]


def test_an_unknown_least_observation_makes_the_merged_one_unknown() -> None:
    known = Histogram([1], [1, 0], sum=1, min=0.5, max=0.5)
    unknown = Histogram([1], [1, 0], sum=1)
    assert known.merge(unknown).min is None
    assert unknown.merge(known).max is None


def test_a_histogram_without_observations_hides_no_least_observation() -> None:
    known = Histogram([1], [1, 0], sum=1, min=0.5, max=0.5)
    empty = Histogram([1], [0, 0], sum=0)
    assert known.merge(empty).min == 0.5
    assert empty.merge(known).max == 0.5


@given(histograms(), histograms())
def test_merging_keeps_every_observation_and_the_bounds_of_the_first(
    one: Histogram, other: Histogram
) -> None:
    merged = one.merge(other)
    assert merged.count == one.count + other.count
    assert merged.bounds == one.bounds
    pairs = zip(merged.bucket_counts, one.bucket_counts, strict=True)
    assert all(after >= before for after, before in pairs)


@given(histograms(), st.floats(0, 1))
def test_a_percentile_is_never_nan(histogram: Histogram, q: float) -> None:
    value = histogram.quantile(q)
    assert value is None or not math.isnan(value)


def test_a_counters_rate_is_its_sum_per_second_of_the_width() -> None:
    bucket = numbers_bucket(
        MetricKind.COUNTER, NOON, MINUTE, count=2, total=30, least=10, greatest=20
    )
    assert (bucket.count, bucket.sum, bucket.rate) == (2, 30, 0.5)
    assert (bucket.mean, bucket.min, bucket.max) == (None, None, None)


def test_a_gauge_has_a_mean_and_extremes_and_no_sum() -> None:
    bucket = numbers_bucket(
        MetricKind.GAUGE, NOON, MINUTE, count=2, total=30, least=10, greatest=20
    )
    assert (bucket.mean, bucket.min, bucket.max) == (15, 10, 20)
    assert (bucket.sum, bucket.rate) == (None, None)


def test_an_empty_histogram_has_no_mean() -> None:
    bucket = histogram_bucket(NOON, MINUTE, Histogram([1], [0, 0], sum=0))
    assert (bucket.count, bucket.mean, bucket.p50) == (0, None, None)


@pytest.mark.parametrize(
    ("start_s", "end_s", "buckets"),
    [(0, 60, 1), (0, 61, 2), (30, 90, 2), (59, 61, 2), (0, 600, 10)],
)
def test_buckets_are_counted_where_they_are_aligned(start_s: int, end_s: int, buckets: int) -> None:
    start, end = (NOON + timedelta(seconds=s) for s in (start_s, end_s))
    assert aligned_buckets(start, end, MINUTE) == buckets


def test_the_default_width_is_a_sixtieth_of_the_span_in_whole_seconds() -> None:
    assert default_bucket_width(timedelta(hours=1)) == MINUTE
    assert default_bucket_width(timedelta(seconds=61)) == timedelta(seconds=2)
    assert default_bucket_width(timedelta(milliseconds=5)) == timedelta(seconds=1)
