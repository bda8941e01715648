"""How often one caller may call: the rules, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.address import source_of
from federation_server.domain.admission import Bucket
from federation_server.live import rates as live
from federation_server.live.metrics import Metrics
from federation_server.live.rates import Limit, Rates
from federation_server.settings import Settings

RATE = Limit.REGISTER_RATE


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rates(per_second: float = 1.0) -> tuple[Rates, Metrics, Clock]:
    metrics, clock = Metrics(), Clock()
    return Rates(metrics, dict.fromkeys(Limit, per_second), clock=clock), metrics, clock


def let_through(one: Rates, caller: str, times: int) -> int:
    return [one.take(RATE, caller) for _ in range(times)].count(0.0)


@pytest.mark.parametrize(
    ("peer", "source"),
    [
        ("ipv4:192.0.2.7:50123", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:50123", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::ffff]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B::1%5D:50123", "::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50123", "fe80::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:50123", "192.0.2.7"),
        ("unix:/run/federation.sock", "unix"),
        ("unix:", "unix"),
        ("unix-abstract:name", "unix-abstract"),
        ("", ""),
        ("ipv4:nonsense", "nonsense"),
    ],
)
def test_a_caller_is_its_ipv4_address_or_the_64_of_its_ipv6_address(peer: str, source: str) -> None:
    assert source_of(peer) == source


@given(peer=st.text())
def test_no_peer_is_too_strange_to_have_a_source(peer: str) -> None:
    assert isinstance(source_of(peer), str)


def test_ten_seconds_worth_may_come_at_once_and_then_the_rate() -> None:
    one, metrics, clock = rates(2.0)
    assert let_through(one, "a", 100) == 20
    clock.now = 3.0
    assert let_through(one, "a", 100) == 6
    name = "federation_limited_total"
    assert metrics.registry.get_sample_value(name, {"limit": RATE.value}) == 80 + 94


def test_a_rate_below_one_in_ten_seconds_still_lets_one_call_through() -> None:
    one, _, clock = rates(0.01)
    assert let_through(one, "a", 3) == 1
    clock.now = 100.0
    assert let_through(one, "a", 3) == 1


def test_who_is_refused_and_comes_when_told_gets_in() -> None:
    one, _, clock = rates()
    assert let_through(one, "a", 10) == 10
    clock.now += one.take(RATE, "a")
    assert one.take(RATE, "a") == 0.0


def test_one_caller_does_not_take_what_is_anothers_nor_what_another_limit_has() -> None:
    one, _, _ = rates()
    let_through(one, "a", 100)
    assert one.take(RATE, "b") == 0.0
    assert one.take(Limit.NEURON_CALL_RATE, "a") == 0.0


def test_a_call_that_counts_for_many_leaves_room_for_fewer_and_is_paid_for_in_time() -> None:
    one, _, clock = rates()
    assert one.take(RATE, "a") == 0.0
    one.charge(RATE, "a", 49)
    clock.now = 39.0
    assert one.take(RATE, "a") > 0.0
    clock.now = 42.0
    assert one.take(RATE, "a") == 0.0


def test_callers_that_made_up_their_names_are_forgotten_and_those_that_call_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "MOST_CALLERS", 100)
    one, _, _ = rates()
    let_through(one, "busy", 10)
    for number in range(1000):
        one.take(RATE, f"made-up-{number}")
        assert one.take(RATE, "busy") > 0.0
    assert len(one._buckets[RATE]) == 100


def test_a_key_may_have_so_many_streams_and_another_one_when_one_has_ended() -> None:
    one, _, _ = rates(2.0)
    assert [one.open_stream("key") for _ in range(2)] == [0.0, 0.0]
    assert one.open_stream("key") > 0.0
    assert one.open_stream("other") == 0.0
    one.close_stream("key")
    assert one.open_stream("key") == 0.0
    for key in ("key", "key", "other"):
        one.close_stream(key)
    assert not one._streams


def test_every_limit_is_a_setting_of_that_name() -> None:
    for limit in Limit:
        assert limit.value.lower() in Settings.model_fields


@given(rate=st.floats(0.5, 1000), bites=st.lists(st.floats(1, 100), min_size=1, max_size=50))
def test_what_was_spent_beyond_the_burst_is_waited_for_at_the_rate(
    rate: float, bites: list[float]
) -> None:
    bucket = Bucket(rate=rate, burst=100.0, longest_s=30.0, uniform=lambda low, _: low)
    now = 0.0
    for bite in bites:
        now += bucket.spend(now, bite)
    assert sum(bites) <= 100.0 + rate * now + 1e-6
    assert now <= max(0.0, sum(bites) - 100.0) / rate + 1e-6
