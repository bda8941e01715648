"""Who may come in when all come at once: the rule, on a clock of the test's own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.admission import Bucket
from federation_server.live import admission as live
from federation_server.live.admission import Admission, Entry
from federation_server.live.metrics import Metrics

LONGEST_S = 30.0
RATES = st.floats(0.1, 1000)
BURSTS = st.integers(1, 50)
COMINGS = st.lists(st.floats(0, 60), min_size=1, max_size=150).map(sorted)


def draw(seed: int) -> Callable[[float, float], float]:
    return random.Random(seed).uniform  # noqa: S311 - not a secret


def bucket(rate: float, burst: float, seed: int = 0) -> Bucket:
    return Bucket(rate=rate, burst=burst, longest_s=LONGEST_S, uniform=draw(seed))


@given(rate=RATES, burst=BURSTS, comings=COMINGS)
def test_no_span_of_time_lets_in_more_than_the_burst_and_the_rate_for_that_span(
    rate: float, burst: int, comings: Sequence[float]
) -> None:
    one = bucket(rate, burst)
    admitted = [now for now in comings if one.admit(now) == 0.0]
    for first, begin in enumerate(admitted):
        for number, end in enumerate(admitted[first:], start=1):
            assert number <= burst + rate * (end - begin) + 1e-6


def come_back(one: Bucket, comings: Sequence[float], *, late: float) -> dict[int, float]:
    """When each caller gets in that obeys, coming up to that share of its wait later than told."""
    uniform = draw(1)
    due = [(now, caller) for caller, now in enumerate(comings)]
    heapq.heapify(due)
    inside: dict[int, float] = {}
    while due:
        now, caller = heapq.heappop(due)
        wait = one.admit(now)
        if wait:
            heapq.heappush(due, (now + wait + uniform(0.0, late * wait), caller))
        else:
            inside[caller] = now
    return inside


@given(rate=RATES, burst=BURSTS, comings=COMINGS, late=st.floats(0, 1), seed=st.integers(0, 99))
def test_everyone_who_comes_again_when_told_gets_in_and_nobody_starves(
    rate: float, burst: int, comings: Sequence[float], late: float, seed: int
) -> None:
    inside = come_back(bucket(rate, burst, seed), comings, late=late)
    assert len(inside) == len(comings)
    # Nobody waits for longer than it takes to let all of them in twice, and two whole lines.
    longest = 2 * len(comings) / rate + 2 * 2 * (LONGEST_S + 1 / rate)
    assert max(inside[caller] - came for caller, came in enumerate(comings)) <= longest


@given(rate=RATES, burst=BURSTS, number=st.integers(1, 150))
def test_who_comes_at_once_and_is_sent_away_is_told_times_that_are_apart(
    rate: float, burst: int, number: int
) -> None:
    one = Bucket(rate=rate, burst=burst, longest_s=1e9, uniform=lambda low, _: low)
    waits = [wait for _ in range(burst + number) if (wait := one.admit(7.0))]
    assert len(waits) == number
    for place, wait in enumerate(waits, start=1):
        assert abs(wait - place / rate) <= 1e-6 * place / rate


def test_who_does_not_obey_does_not_push_the_others_into_the_far_future() -> None:
    one = bucket(rate=10, burst=1)
    waits = [one.admit(0.0) for _ in range(100_000)]
    assert max(waits) <= LONGEST_S * 1.1
    assert one.admit(LONGEST_S) == 0.0


def test_a_herd_of_five_thousand_is_inside_within_fifteen_seconds_by_default() -> None:
    one = Bucket(rate=300, burst=1000, longest_s=LONGEST_S, uniform=draw(2))
    inside = come_back(one, [0.001 * place / 5 for place in range(5000)], late=0.05)
    assert max(inside.values()) <= 15.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(*, rate: float, burst: int) -> tuple[Admission, Metrics, Clock]:
    metrics, clock = Metrics(), Clock()
    return Admission(metrics, rate=rate, burst=burst, clock=clock), metrics, clock


def refused(metrics: Metrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("federation_admission_refused_total", {"kind": kind})


def test_a_storm_of_registrations_keeps_no_stream_out() -> None:
    one, metrics, _ = admission(rate=4, burst=4)
    answers = [one.admit(Entry.REGISTER) for _ in range(50)]
    assert answers.count(0.0) == 2
    assert refused(metrics, "register") == 48
    assert one.admit(Entry.CONNECT) == 0.0
    assert refused(metrics, "connect") == 0


def test_registrations_that_are_being_served_keep_no_stream_out() -> None:
    one, _, _ = admission(rate=10_000, burst=10_000)
    with ExitStack() as stack:
        while one.admit(Entry.REGISTER) == 0.0:
            stack.enter_context(one.under_way(Entry.REGISTER))
        assert one.admit(Entry.CONNECT) == 0.0
    assert one.admit(Entry.REGISTER) == 0.0


def test_while_too_many_are_being_served_nobody_is_let_in_whatever_the_rate_says() -> None:
    one, metrics, clock = admission(rate=10_000, burst=10_000)
    blocks = [one.under_way(Entry.CONNECT) for _ in range(live.MOST_UNDER_WAY)]
    for block in blocks:
        block.__enter__()
    assert one.admit(Entry.CONNECT) > 0.0
    clock.now = 60.0
    assert one.admit(Entry.CONNECT) > 0.0
    assert refused(metrics, "connect") == 2
    blocks[0].__exit__(None, None, None)
    assert one.admit(Entry.CONNECT) == 0.0
