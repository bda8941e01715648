"""Why a command is where it is, in every place where it can be."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from federation_server.domain.command import FINAL_STATES, CommandState
from federation_server.domain.explain import Fact, FactCode, FailedAttempt, Situation, explain
from federation_server.domain.neuron import Activity, Lifecycle, Presence

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

QUEUED = Situation(
    now=NOW,
    state=CommandState.QUEUED,
    state_reason="",
    attempt=0,
    max_attempts=3,
    control=False,
    held=False,
    create_time=NOW - MINUTE,
    not_before_time=None,
    next_attempt_time=None,
    expire_time=NOW + 60 * MINUTE,
    send_time=None,
    accept_time=None,
    start_time=None,
    cancel_time=None,
    end_time=None,
    progress_fraction=None,
    progress_message=None,
    progress_time=None,
    accept_timeout=None,
    run_timeout=None,
    progress_timeout=None,
    lifecycle=Lifecycle.ACTIVE,
    presence=Presence.ONLINE,
    presence_time=NOW - MINUTE,
    presence_reason="session opened",
    connected=True,
    activity=Activity.ACTIVE,
    max_concurrent=4,
    taken=0,
    ahead=0,
)
RUNNING = replace(
    QUEUED,
    state=CommandState.RUNNING,
    attempt=1,
    send_time=NOW - MINUTE,
    accept_time=NOW - MINUTE,
    start_time=NOW - MINUTE,
    progress_time=NOW - MINUTE / 2,
    progress_fraction=0.4,
    progress_message="4 of 10 rows",
)
AWAY = {"connected": False, "presence": Presence.OFFLINE, "presence_reason": "stream lost"}


def codes(at: Situation) -> list[str]:
    return [fact.code.value for fact in explain(at)]


def first(at: Situation) -> Fact:
    return explain(at)[0]


def test_a_command_that_nothing_holds_up_is_about_to_be_sent() -> None:
    assert codes(QUEUED) == ["WAITS_TO_BE_SENT", "EXPIRES"]
    assert first(replace(QUEUED, ahead=3)).message.endswith("3 commands go first")


def test_a_command_for_later_says_when() -> None:
    fact = first(replace(QUEUED, not_before_time=NOW + MINUTE))
    assert (fact.code, fact.time) == (FactCode.WAITS_FOR_TIME, NOW + MINUTE)


def test_a_command_whose_neuron_is_away_says_since_when_and_why() -> None:
    fact = first(replace(QUEUED, **AWAY))  # type: ignore[arg-type]
    assert fact == Fact(
        FactCode.WAITS_FOR_NEURON, "its neuron is OFFLINE (stream lost)", NOW - MINUTE
    )


def test_a_command_whose_neuron_is_deactivated_says_what_to_do() -> None:
    fact = first(replace(QUEUED, lifecycle=Lifecycle.DEACTIVATED, **AWAY))  # type: ignore[arg-type]
    assert (fact.code, "activate" in fact.message) == (FactCode.NEURON_DEACTIVATED, True)


def test_a_command_that_waits_for_a_place_says_what_takes_it() -> None:
    full = replace(QUEUED, taken=4, ahead=1, activity=Activity.PAUSED)
    assert codes(full) == ["WAITS_FOR_PLACE", "NEURON_PAUSED", "EXPIRES"]
    assert first(full).message == ("its neuron takes 4 at a time, and has 4; 1 command goes first")
    assert codes(replace(full, control=True))[0] == "WAITS_TO_BE_SENT"


def test_a_command_that_its_batch_holds_back_says_so() -> None:
    assert codes(replace(QUEUED, held=True)) == ["WAITS_FOR_BATCH", "EXPIRES"]


def test_a_command_between_two_attempts_tells_of_the_ones_that_failed() -> None:
    between = replace(
        QUEUED,
        attempt=2,
        next_attempt_time=NOW + MINUTE,
        failed=[FailedAttempt(NOW, "second"), FailedAttempt(NOW - MINUTE, "first")],
    )
    facts = explain(between)
    assert [fact.code for fact in facts] == [
        FactCode.WAITS_FOR_RETRY,
        FactCode.EXPIRES,
        FactCode.ATTEMPT_FAILED,
        FactCode.ATTEMPT_FAILED,
    ]
    assert facts[0].message.startswith("attempt 3 of 3")
    assert [fact.message for fact in facts[2:]] == ["second", "first"]


def test_a_running_command_says_how_far_it_is_and_when_it_is_given_up() -> None:
    limited = replace(RUNNING, run_timeout=5 * MINUTE, progress_timeout=2 * MINUTE)
    facts = explain(limited)
    assert facts[0].message == "attempt 1 of 3 runs, 40 % done, 4 of 10 rows"
    assert [fact.time for fact in facts[1:]] == [NOW + 4 * MINUTE, NOW + 1.5 * MINUTE]


def test_a_running_command_whose_neuron_is_away_says_that_first() -> None:
    assert codes(replace(RUNNING, **AWAY)) == ["WAITS_FOR_NEURON", "RUNS"]  # type: ignore[arg-type]


def test_an_accepted_command_in_a_paused_neuron_says_so() -> None:
    held = replace(RUNNING, state=CommandState.ACCEPTED, activity=Activity.PAUSED)
    assert codes(held) == ["WAITS_IN_NEURON", "NEURON_PAUSED", "EXPIRES"]


def test_a_sent_command_says_by_when_it_must_be_accepted() -> None:
    sent = replace(RUNNING, state=CommandState.SENT, accept_timeout=2 * MINUTE)
    assert [fact.time for fact in explain(sent)] == [
        NOW - MINUTE,
        NOW + MINUTE,
        NOW + 60 * MINUTE,
    ]


def test_a_command_that_is_being_cancelled_says_why_and_since_when() -> None:
    fact = first(
        replace(RUNNING, state=CommandState.CANCELLING, state_reason="no need", cancel_time=NOW)
    )
    assert (fact.code, fact.time) == (FactCode.WAITS_FOR_CANCEL, NOW)
    assert "(no need)" in fact.message


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_a_command_that_has_ended_says_how_and_when(state: CommandState) -> None:
    ended = replace(RUNNING, state=state, state_reason="BROKEN: no row", end_time=NOW)
    assert explain(ended) == [
        Fact(FactCode.ENDED, f"it ended as {state.value}: BROKEN: no row", NOW)
    ]
