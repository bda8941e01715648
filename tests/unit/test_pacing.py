"""How far apart heartbeats must be: the rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.pacing import LEAST_S, ROOM, grant

STREAMS = st.integers(0, 100_000)
RATES = st.floats(0.5, 10_000)
GRANTED = st.one_of(st.just(0.0), st.floats(LEAST_S, 1e5))


@given(granted=GRANTED, streams=STREAMS, rate=RATES)
def test_streams_that_keep_what_is_granted_stay_within_the_rate(
    granted: float, streams: int, rate: float
) -> None:
    interval = grant(granted, streams, rate)
    if interval:
        assert streams / interval <= rate * (1 + 1e-9)
    else:
        assert streams / LEAST_S <= rate


@given(granted=GRANTED, streams=STREAMS, rate=RATES)
def test_what_is_granted_stays_while_the_streams_do(
    granted: float, streams: int, rate: float
) -> None:
    interval = grant(granted, streams, rate)
    assert grant(interval, streams, rate) == interval


@given(streams=st.integers(1000, 100_000), change=st.floats(-0.2, 0.25))
def test_a_fleet_hears_nothing_before_it_grows_by_a_quarter_or_loses_a_fifth(
    streams: int, change: float
) -> None:
    rate = streams / 100
    interval = grant(0.0, streams, rate)
    assert abs(interval - 100 * ROOM) < 1e-6
    later = int(streams * (1 + change * 0.99))
    assert grant(interval, later, rate) == interval


def test_an_interval_grows_with_the_streams_and_shrinks_with_them_to_none() -> None:
    intervals = [0.0]
    for streams in (10, 100, 1000, 5000, 10_000, 5000, 1000, 100, 0):
        intervals.append(grant(intervals[-1], streams, 100))
    assert intervals == [0.0, 0.0, 1.25, 12.5, 62.5, 125.0, 62.5, 12.5, 1.25, 0.0]


@given(granted=GRANTED, streams=STREAMS, rate=RATES)
def test_nothing_shorter_than_the_least_interval_is_granted(
    granted: float, streams: int, rate: float
) -> None:
    interval = grant(granted, streams, rate)
    assert interval == 0.0 or interval >= LEAST_S or interval == granted
