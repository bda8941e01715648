"""The ledger's table of transitions, and how updates walk it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.command import (
    FINAL_STATES,
    FINISHED_BY_NEURON,
    TRANSITIONS,
    Accepted,
    CommandError,
    CommandState,
    CommandUpdate,
    Entry,
    Execution,
    Finished,
    Lateness,
    Progressed,
    apply,
    cancel,
    lose,
    predecessors,
    time_out,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def command(state: CommandState, attempt: int = 1, **more: Any) -> Entry:
    values: dict[str, Any] = {
        "execution": Execution.AT_LEAST_ONCE,
        "max_attempts": 1,
        "retry_backoff": timedelta(seconds=1),
        "expire_time": NOW + timedelta(hours=1),
    }
    return Entry("c", "n", state, attempt, **values | more)


def finished(state: CommandState = CommandState.SUCCEEDED) -> Finished:
    return Finished(state, {}, None, timedelta(seconds=1), "")


def test_every_state_is_in_the_table_and_final_states_lead_nowhere() -> None:
    assert TRANSITIONS.keys() == set(CommandState)
    names = [
        "SUCCEEDED",
        "FAILED",
        "REJECTED",
        "CANCELLED",
        "TIMED_OUT",
        "EXPIRED",
        "OUTCOME_UNKNOWN",
    ]
    assert sorted(state.value for state in FINAL_STATES) == sorted(names)


def test_predecessors_are_the_table_read_backwards() -> None:
    for state in CommandState:
        for before in CommandState:
            assert (before in predecessors(state)) == (state in TRANSITIONS[before])


def test_a_neuron_can_report_no_state_that_is_not_final() -> None:
    assert FINISHED_BY_NEURON <= FINAL_STATES


@pytest.mark.parametrize("attempt", [0, 2])
def test_an_update_of_another_attempt_changes_nothing(attempt: int) -> None:
    update = CommandUpdate("c", attempt, finished())
    assert apply(command(CommandState.RUNNING), update, NOW) is None


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_nothing_changes_a_final_command(state: CommandState) -> None:
    for change in (Accepted(), Progressed(0.5, ""), finished()):
        assert apply(command(state), CommandUpdate("c", 1, change), NOW) is None


def test_progress_moves_an_accepted_command_to_running_and_a_running_one_nowhere() -> None:
    update = CommandUpdate("c", 1, Progressed(0.5, "half"))
    for state in (CommandState.ACCEPTED, CommandState.RUNNING):
        after = apply(command(state), update, NOW)
        assert after is not None
        assert (after.state, after.fraction) == (CommandState.RUNNING, 0.5)


def test_progress_does_not_take_back_a_cancel() -> None:
    update = CommandUpdate("c", 1, Progressed(0.5, ""))
    after = apply(command(CommandState.CANCELLING), update, NOW)
    assert after is not None
    assert after.state is CommandState.CANCELLING


def test_accepted_does_not_move_a_running_command_back() -> None:
    assert apply(command(CommandState.RUNNING), CommandUpdate("c", 1, Accepted()), NOW) is None


@given(
    st.lists(
        st.one_of(
            st.just(Accepted()),
            st.just(Progressed(0.5, "")),
            st.sampled_from(sorted(FINISHED_BY_NEURON)).map(finished),
        )
    )
)
def test_whatever_a_neuron_says_every_step_is_in_the_table(
    changes: list[Accepted | Progressed | Finished],
) -> None:
    now = command(CommandState.SENT)
    for change in changes:
        after = apply(now, CommandUpdate("c", 1, change), NOW)
        if after is not None:
            assert after.state is now.state or after.state in TRANSITIONS[now.state]
            now = after


# ---- attempts


def failure(state: CommandState = CommandState.FAILED) -> Finished:
    return Finished(state, None, CommandError("BROKEN", "no such row"), None, "")


def after_failure(entry: Entry, state: CommandState = CommandState.FAILED) -> Entry:
    after = apply(entry, CommandUpdate("c", entry.attempt, failure(state)), NOW)
    assert after is not None
    return after


@pytest.mark.parametrize("state", [CommandState.FAILED, CommandState.TIMED_OUT])
def test_an_attempt_that_fails_is_followed_by_another_after_the_backoff(
    state: CommandState,
) -> None:
    running = command(CommandState.RUNNING, 2, max_attempts=3)
    after = after_failure(running, state)
    assert (after.state, after.next_attempt_time) == (
        CommandState.QUEUED,
        NOW + timedelta(seconds=2),
    )
    assert after.state_reason == f"attempt 2 of 3 ended as {state}: BROKEN: no such row"


def test_the_last_attempt_s_failure_is_the_command_s() -> None:
    after = after_failure(command(CommandState.RUNNING, 3, max_attempts=3))
    assert (after.state, after.state_reason) == (CommandState.FAILED, "BROKEN: no such row")


def test_the_backoff_doubles_up_to_an_hour() -> None:
    waits = []
    for attempt in (1, 2, 3, 12, 99):
        entry = command(
            CommandState.RUNNING,
            attempt,
            max_attempts=100,
            retry_backoff=timedelta(seconds=3),
            expire_time=NOW + timedelta(days=1),
        )
        time = after_failure(entry).next_attempt_time
        assert time is not None
        waits.append((time - NOW).total_seconds())
    assert waits == [3, 6, 12, 3600, 3600]


def test_there_is_no_attempt_that_would_begin_after_the_command_s_time() -> None:
    entry = command(CommandState.RUNNING, max_attempts=3, expire_time=NOW + timedelta(seconds=1))
    assert after_failure(entry).state is CommandState.FAILED


@pytest.mark.parametrize("state", [CommandState.REJECTED, CommandState.CANCELLED])
def test_what_the_neuron_would_not_run_is_not_tried_again(state: CommandState) -> None:
    assert after_failure(command(CommandState.SENT, max_attempts=3), state).state is state


def test_what_is_being_cancelled_is_not_tried_again() -> None:
    entry = command(CommandState.CANCELLING, max_attempts=3)
    assert after_failure(entry).state is CommandState.FAILED


@pytest.mark.parametrize("state", sorted(FINISHED_BY_NEURON))
def test_a_late_word_on_an_attempt_that_is_over_changes_nothing(state: CommandState) -> None:
    waiting = after_failure(command(CommandState.RUNNING, max_attempts=3))
    assert apply(waiting, CommandUpdate("c", 1, failure(state)), NOW) is None


@pytest.mark.parametrize("state", [CommandState.SENT, CommandState.ACCEPTED])
def test_what_the_neuron_rejects_because_its_time_is_over_has_expired(
    state: CommandState,
) -> None:
    late = Finished(CommandState.REJECTED, None, CommandError("EXPIRED", "too late"), None, "")
    after = apply(command(state), CommandUpdate("c", 1, late), NOW)
    assert after is not None
    assert after.state is CommandState.EXPIRED


def test_a_checkpoint_stays_until_there_is_a_newer_one() -> None:
    entry = command(CommandState.RUNNING)
    for checkpoint, kept in (({"row": 1}, {"row": 1}), (None, {"row": 1}), ({}, {})):
        update = CommandUpdate("c", 1, Progressed(0.5, "", checkpoint))
        after = apply(entry, update, NOW)
        assert after is not None
        assert after.checkpoint == kept
        entry = after


# ---- timers and cancelling


@pytest.mark.parametrize("late", list(Lateness))
def test_an_attempt_that_takes_too_long_is_given_up_and_may_be_followed(late: Lateness) -> None:
    for attempt, state in ((1, CommandState.QUEUED), (2, CommandState.TIMED_OUT)):
        entry = command(CommandState.RUNNING, attempt, max_attempts=2)
        after = time_out(entry, late, timedelta(seconds=30), NOW)
        assert (after.state, after.cancel_attempt) == (state, attempt)
        assert after.finished is not None
        assert after.finished.error is not None
        assert after.finished.error.code == late.value
        assert "30 s" in after.state_reason


def test_a_queued_command_is_cancelled_at_once_and_one_in_flight_asks_its_neuron() -> None:
    queued = cancel(command(CommandState.QUEUED, 0), "no need")
    assert queued is not None
    assert (queued.state, queued.state_reason) == (CommandState.CANCELLED, "no need")
    for state in (CommandState.SENT, CommandState.ACCEPTED, CommandState.RUNNING):
        after = cancel(command(state, 2), "no need")
        assert after is not None
        assert (after.state, after.cancel_attempt) == (CommandState.CANCELLING, 2)


@pytest.mark.parametrize("state", sorted({*FINAL_STATES, CommandState.CANCELLING}))
def test_cancelling_again_changes_nothing(state: CommandState) -> None:
    assert cancel(command(state), "") is None


@given(
    st.integers(1, 3),
    st.lists(
        st.one_of(
            st.just(Accepted()),
            st.just(Progressed(0.5, "")),
            st.sampled_from(sorted(FINISHED_BY_NEURON)).map(finished),
            st.sampled_from(list(Lateness)),
            st.sampled_from(["cancel", "lose"]),
        )
    ),
)
def test_whatever_happens_to_a_command_every_step_is_in_the_table(
    attempts: int, events: list[Accepted | Progressed | Finished | Lateness | str]
) -> None:
    now = command(CommandState.SENT, max_attempts=attempts)
    for event in events:
        if now.state is CommandState.QUEUED:  # it is sent again
            now = replace(now, state=CommandState.SENT, attempt=now.attempt + 1)
        after: Entry | None = None
        if event == "cancel":
            after = cancel(now, "")
        elif isinstance(event, Lateness | str):
            if now.in_flight:
                gone = event == "lose"
                after = lose(now, "") if gone else time_out(now, Lateness(event), timedelta(), NOW)
        else:
            after = apply(now, CommandUpdate("c", now.attempt, event), NOW)
        if after is not None:
            assert after.state is now.state or after.state in TRANSITIONS[now.state]
            now = after
        assert now.attempt <= attempts
