"""When a server doubts itself, and when streams were lost together, by a clock set by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from federation_server.domain.doubt import (
    MASS_LEAST,
    MOST_LAG_S,
    OWN_CAUSES,
    Cause,
    Doubt,
    Loss,
    MassDisconnects,
)
from federation_server.live.doubt import TICK_S, SelfDoubt
from federation_server.live.metrics import Metrics

PATIENCE = timedelta(seconds=30)
OFFLINE_AFTER = timedelta(minutes=3)
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


# --- a server's doubt


def test_a_cause_counts_until_the_patience_after_it_was_last_noticed_is_over() -> None:
    doubt = Doubt(PATIENCE)
    assert not doubt.frozen(99.0)
    doubt.notice(Cause.FLUSH_LAG, 100.0)
    doubt.notice(Cause.FLUSH_LAG, 120.0)
    assert doubt.causes(150.0) == {Cause.FLUSH_LAG: 100.0}
    assert doubt.frozen(150.0)
    assert doubt.causes(150.1) == {}
    assert not doubt.frozen(150.1)


def test_a_cause_that_comes_again_begins_anew() -> None:
    doubt = Doubt(PATIENCE)
    doubt.notice(Cause.LOOP_LAG, 100.0)
    doubt.notice(Cause.LOOP_LAG, 200.0)
    assert doubt.causes(201.0) == {Cause.LOOP_LAG: 200.0}


def test_each_cause_has_its_own_time() -> None:
    doubt = Doubt(PATIENCE)
    doubt.notice(Cause.DATABASE_LAG, 110.0)
    doubt.notice(Cause.JUST_STARTED, 100.0)
    assert list(doubt.causes(110.0)) == [Cause.JUST_STARTED, Cause.DATABASE_LAG]
    assert list(doubt.causes(135.0)) == [Cause.DATABASE_LAG]


def test_with_no_patience_only_the_moment_itself_is_in_doubt() -> None:
    doubt = Doubt(timedelta())
    doubt.notice(Cause.JUST_STARTED, 100.0)
    assert doubt.frozen(100.0)
    assert not doubt.frozen(100.001)


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_but_lost_streams_freezes_all(cause: Cause) -> None:
    doubt = Doubt(PATIENCE)
    doubt.notice(cause, 100.0)
    assert doubt.frozen(100.0) == (cause is not Cause.MASS_DISCONNECT) == (cause in OWN_CAUSES)


@pytest.mark.parametrize("cause", MOST_LAG_S)
def test_a_lag_is_a_cause_above_its_bound_alone(cause: Cause) -> None:
    doubt = Doubt(PATIENCE)
    doubt.measured(cause, MOST_LAG_S[cause], 100.0)
    assert doubt.causes(100.0) == {}
    doubt.measured(cause, MOST_LAG_S[cause] + 0.001, 100.0)
    assert doubt.causes(100.0) == {cause: 100.0}


def test_what_is_lifted_does_not_count_any_more() -> None:
    doubt = Doubt(PATIENCE)
    doubt.notice(Cause.MASS_DISCONNECT, 100.0)
    doubt.lift(Cause.MASS_DISCONNECT)
    doubt.lift(Cause.LOOP_LAG)
    assert doubt.causes(100.0) == {}


# --- streams lost together


def loss(lost: int, still_open: int, *, server_id: str = "s", at_s: float = 0.0) -> Loss:
    last = NOON + timedelta(seconds=at_s)
    return Loss(server_id, last - timedelta(seconds=10), last, lost, still_open)


@pytest.mark.parametrize(
    ("lost", "still_open", "mass"),
    [
        (MASS_LEAST, 0, True),
        (MASS_LEAST - 1, 0, False),
        (MASS_LEAST, 2 * MASS_LEAST, False),
        (MASS_LEAST, 2 * MASS_LEAST - 1, True),
        (1, 5000, False),
        (5000, 1, True),
    ],
)
def test_a_loss_is_a_mass_if_it_is_large_and_more_than_a_third(
    lost: int, still_open: int, mass: bool
) -> None:
    assert loss(lost, still_open).is_mass is mass


def test_a_mass_counts_until_the_patience_after_most_have_come_back() -> None:
    masses = MassDisconnects(PATIENCE, OFFLINE_AFTER)
    lost = loss(100, 0)
    assert masses.take([lost], NOON) == [lost]
    few = loss(10, 90)
    assert masses.take([few], NOON + PATIENCE) == [lost]
    assert masses.take([few], NOON + PATIENCE + timedelta(seconds=1)) == []


def test_a_mass_that_stays_away_counts_for_its_time_and_no_longer() -> None:
    masses = MassDisconnects(PATIENCE, OFFLINE_AFTER)
    lost = loss(100, 0)
    just_before = NOON + OFFLINE_AFTER - timedelta(seconds=1)
    for seconds in range(0, 179, 10):
        assert masses.take([lost], NOON + timedelta(seconds=seconds)) == [lost]
    assert masses.take([lost], just_before) == [lost]
    assert masses.take([lost], NOON + OFFLINE_AFTER) == []


def test_a_mass_that_goes_on_keeps_its_beginning() -> None:
    masses = MassDisconnects(PATIENCE, OFFLINE_AFTER)
    masses.take([loss(50, 0)], NOON)
    (both,) = masses.take([loss(60, 0, at_s=8.0)], NOON + timedelta(seconds=8))
    assert (both.first, both.last) == (loss(1, 1).first, loss(1, 1, at_s=8.0).last)


def test_each_server_s_loss_counts_for_itself() -> None:
    masses = MassDisconnects(PATIENCE, OFFLINE_AFTER)
    found = [loss(9, 0), loss(9, 0, server_id="t"), loss(9, 100, server_id="u")]
    assert [each.server_id for each in masses.take(found, NOON)] == ["s", "t"]


# --- a process that watches itself


class Hands:
    """A clock that is set by hand, and a writer's lag."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.flush_lag = 0.0
        self.metrics = Metrics()
        self.told: list[bool] = []
        self.doubt = SelfDoubt(
            self.metrics,
            patience=PATIENCE,
            flush_lag=lambda: self.flush_lag,
            on_change=self.tell,
            clock=lambda: self.now,
        )

    async def tell(self, *, frozen: bool) -> None:
        self.told.append(frozen)

    def shown(self) -> set[str]:
        """The causes whose metric is 1."""
        sample = self.metrics.registry.get_sample_value
        shown = {c: sample("federation_presence_frozen", {"cause": c.value}) for c in Cause}
        assert None not in shown.values()
        return {cause.value for cause, value in shown.items() if value}


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_a_process_that_stood_still_knows_it_before_its_own_timer_has_gone_off(
    hands: Hands,
) -> None:
    assert not hands.doubt.frozen()
    hands.now += TICK_S + MOST_LAG_S[Cause.LOOP_LAG] + 0.01
    assert hands.doubt.frozen()
    assert hands.shown() == {"LOOP_LAG"}


def test_what_the_writer_cannot_write_in_time_is_noticed_and_said_with_its_age(
    hands: Hands,
) -> None:
    hands.flush_lag = MOST_LAG_S[Cause.FLUSH_LAG] + 0.01
    assert hands.doubt.look() == {Cause.FLUSH_LAG: 0.0}
    hands.now += 1.0
    assert hands.doubt.look() == {Cause.FLUSH_LAG: 1.0}


def test_a_doubt_is_logged_when_it_begins_changes_and_ends(hands: Hands) -> None:
    with capture_logs() as logs:
        hands.doubt.start()
        hands.doubt.notice(Cause.DATABASE_LAG)
        hands.doubt.notice(Cause.DATABASE_LAG)
        hands.now += 1.0
        hands.doubt.notice(Cause.MASS_DISCONNECT)
        hands.doubt.lift(Cause.MASS_DISCONNECT)
    assert [(line["action"], line["causes"], line["log_level"]) for line in logs] == [
        ("presence_frozen", ["JUST_STARTED"], "info"),
        ("presence_frozen", ["JUST_STARTED", "DATABASE_LAG"], "warning"),
        ("presence_frozen", ["JUST_STARTED", "DATABASE_LAG", "MASS_DISCONNECT"], "warning"),
        ("presence_frozen", ["JUST_STARTED", "DATABASE_LAG"], "warning"),
    ]
    with capture_logs() as logs:
        hands.now += 29.5
        hands.doubt._ticked = hands.now
        hands.doubt.look()
    assert [line["action"] for line in logs] == ["presence_resumed"]
    assert hands.shown() == set()
