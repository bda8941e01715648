"""From which rollup a question is answered."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.rollup import WIDTHS, Kept, Level, Segment, ceil, floor, plan

NOW = datetime(2026, 11, 21, 15, 42, 17, tzinfo=UTC)
MINUTE, HOUR, DAY = (WIDTHS[level] for level in (Level.MINUTE, Level.HOUR, Level.DAY))


def kept(*, points: int = 8, minutes: int = 30, hours: int = 400) -> list[Kept]:
    """So many days of each; rolled up until the last whole minute, hour and day."""
    return [
        Kept(Level.POINT, NOW - points * DAY, NOW),
        Kept(Level.MINUTE, NOW - minutes * DAY, floor(NOW, MINUTE)),
        Kept(Level.HOUR, NOW - hours * DAY, floor(NOW, HOUR)),
        Kept(Level.DAY, NOW - 2000 * DAY, floor(NOW, DAY)),
    ]


def levels(segments: list[Segment]) -> list[Level]:
    return [segment.level for segment in segments]


def test_a_bucket_begins_at_whole_multiples_of_its_width_since_1970() -> None:
    assert floor(NOW, HOUR) == NOW.replace(minute=0, second=0)
    assert ceil(NOW, DAY) == datetime(2026, 11, 22, tzinfo=UTC)
    assert ceil(floor(NOW, MINUTE), MINUTE) == floor(NOW, MINUTE)


def test_whole_days_are_read_from_days_and_today_from_what_there_is_of_it() -> None:
    start = floor(NOW, DAY) - 20 * DAY
    assert levels(plan(start, NOW, DAY, kept())) == [
        Level.DAY,
        Level.HOUR,
        Level.MINUTE,
        Level.POINT,
    ]


def test_edges_within_a_bucket_are_read_from_finer_levels() -> None:
    start = floor(NOW, DAY) - 2 * DAY - timedelta(hours=1, minutes=3, seconds=30)
    segments = plan(start, floor(NOW, DAY), DAY, kept())
    assert levels(segments) == [Level.POINT, Level.MINUTE, Level.HOUR, Level.DAY]


def test_a_width_that_is_no_multiple_of_a_rollup_is_read_from_what_fits() -> None:
    start, end = floor(NOW, HOUR) - 3 * HOUR, floor(NOW, HOUR)
    assert levels(plan(start, end, timedelta(seconds=90), kept())) == [Level.POINT]
    assert levels(plan(start, end, timedelta(minutes=90), kept())) == [Level.MINUTE]
    assert levels(plan(start, end, 2 * HOUR, kept())) == [Level.HOUR]


def test_what_only_a_coarser_level_still_knows_is_read_from_there_whatever_the_width() -> None:
    start = NOW - 20 * DAY
    segments = plan(start, NOW - 2 * DAY, timedelta(seconds=90), kept())
    assert levels(segments) == [Level.MINUTE, Level.POINT]
    assert segments[0].start == floor(start, MINUTE)


def test_nothing_is_planned_for_an_empty_span() -> None:
    assert plan(NOW, NOW, MINUTE, kept()) == []


@given(
    offset=st.integers(0, 3_000_000),
    span=st.integers(1, 3_000_000),
    width=st.sampled_from([1, 7, 60, 90, 300, 3600, 5400, 43_200, 86_400, 7 * 86_400]),
    points=st.integers(1, 10),
)
def test_segments_follow_each_other_cover_the_span_and_are_aligned_to_their_level(
    offset: int, span: int, width: int, points: int
) -> None:
    end = NOW - timedelta(seconds=offset)
    start = end - timedelta(seconds=span)
    known = kept(points=points)
    segments = plan(start, end, timedelta(seconds=width), known)
    assert segments[0].start <= start
    assert segments[-1].end == end
    for before, after in itertools.pairwise(segments):
        assert before.end == after.start
    until = {each.level: each.until for each in known}
    for segment in segments:
        assert segment.start < segment.end
        if segment.level is not Level.POINT:
            assert floor(segment.start, WIDTHS[segment.level]) == segment.start
            assert floor(segment.end, WIDTHS[segment.level]) == segment.end
            assert segment.end <= until[segment.level]


@pytest.mark.parametrize("width", [60, 3600, 86_400])
def test_only_the_oldest_edge_may_be_taken_whole(width: int) -> None:
    start = NOW - 5 * DAY
    segments = plan(start, NOW, timedelta(seconds=width), kept())
    assert segments[0].start == start
