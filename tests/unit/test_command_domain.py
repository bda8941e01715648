"""The ledger's table of transitions, and how updates walk it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.command import (
    FINAL_STATES,
    FINISHED_BY_NEURON,
    TRANSITIONS,
    Accepted,
    CommandProgress,
    CommandState,
    CommandUpdate,
    Finished,
    Progressed,
    apply,
    predecessors,
)


def command(state: CommandState, attempt: int = 1) -> CommandProgress:
    return CommandProgress("c", "n", state, attempt)


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
    assert apply(command(CommandState.RUNNING), update) is None


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_nothing_changes_a_final_command(state: CommandState) -> None:
    for change in (Accepted(), Progressed(0.5, ""), finished()):
        assert apply(command(state), CommandUpdate("c", 1, change)) is None


def test_progress_moves_an_accepted_command_to_running_and_a_running_one_nowhere() -> None:
    update = CommandUpdate("c", 1, Progressed(0.5, "half"))
    for state in (CommandState.ACCEPTED, CommandState.RUNNING):
        after = apply(command(state), update)
        assert after is not None
        assert (after.state, after.fraction) == (CommandState.RUNNING, 0.5)


def test_progress_does_not_take_back_a_cancel() -> None:
    update = CommandUpdate("c", 1, Progressed(0.5, ""))
    after = apply(command(CommandState.CANCELLING), update)
    assert after is not None
    assert after.state is CommandState.CANCELLING


def test_accepted_does_not_move_a_running_command_back() -> None:
    assert apply(command(CommandState.RUNNING), CommandUpdate("c", 1, Accepted())) is None


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
        after = apply(now, CommandUpdate("c", 1, change))
        if after is not None:
            assert after.state is now.state or after.state in TRANSITIONS[now.state]
            now = after
