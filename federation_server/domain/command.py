"""The ledger's rules: a command's states, and every way from one to another.

The table `TRANSITIONS` is the only place that says which change is allowed. The store derives its
SQL from it (`predecessors`), the writer asks it for each update of a neuron (`apply`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

from federation_server.domain.neuron import JsonObject

DEFAULT_PRIORITY = 5
DEFAULT_EXPIRY = timedelta(hours=24)


class CommandState(StrEnum):
    """Where a command stands."""

    QUEUED = "QUEUED"
    """Waits for its time, its neuron, or a free place there."""
    SENT = "SENT"
    """Written to the neuron's stream."""
    ACCEPTED = "ACCEPTED"
    """In the neuron's journal."""
    RUNNING = "RUNNING"
    """Its handler runs."""
    CANCELLING = "CANCELLING"
    """Somebody asked to cancel it; the neuron has not answered yet."""
    SUCCEEDED = "SUCCEEDED"
    """Final: the handler returned."""
    FAILED = "FAILED"
    """Final: the handler raised, or its process ended under it."""
    REJECTED = "REJECTED"
    """Final: the neuron would not run it."""
    CANCELLED = "CANCELLED"
    """Final: it was cancelled."""
    TIMED_OUT = "TIMED_OUT"
    """Final: it ran for longer than it may."""
    EXPIRED = "EXPIRED"
    """Final: it had not started when its time was over."""
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    """Final: it must not run twice, and whether it ran cannot be known."""


class Execution(StrEnum):
    """What is done with a command whose fate is unknown."""

    AT_LEAST_ONCE = "AT_LEAST_ONCE"
    """It is sent again; the neuron's journal keeps an attempt from running twice."""
    AT_MOST_ONCE = "AT_MOST_ONCE"
    """It is never sent twice; it ends as OUTCOME_UNKNOWN."""


_S = CommandState

TRANSITIONS: Mapping[CommandState, frozenset[CommandState]] = {
    _S.QUEUED: frozenset({_S.SENT, _S.CANCELLED, _S.EXPIRED}),
    # Back to QUEUED: a retry's new attempt, and a send that never left the server.
    _S.SENT: frozenset(
        {
            _S.QUEUED,
            _S.ACCEPTED,
            _S.RUNNING,
            _S.CANCELLING,
            _S.SUCCEEDED,
            _S.FAILED,
            _S.REJECTED,
            _S.CANCELLED,
            _S.TIMED_OUT,
            _S.EXPIRED,
            _S.OUTCOME_UNKNOWN,
        }
    ),
    _S.ACCEPTED: frozenset(
        {
            _S.QUEUED,
            _S.RUNNING,
            _S.CANCELLING,
            _S.SUCCEEDED,
            _S.FAILED,
            _S.REJECTED,
            _S.CANCELLED,
            _S.TIMED_OUT,
            _S.OUTCOME_UNKNOWN,
        }
    ),
    _S.RUNNING: frozenset(
        {
            _S.QUEUED,
            _S.CANCELLING,
            _S.SUCCEEDED,
            _S.FAILED,
            _S.REJECTED,
            _S.CANCELLED,
            _S.TIMED_OUT,
            _S.OUTCOME_UNKNOWN,
        }
    ),
    _S.CANCELLING: frozenset(
        {
            _S.SUCCEEDED,
            _S.FAILED,
            _S.REJECTED,
            _S.CANCELLED,
            _S.TIMED_OUT,
            _S.OUTCOME_UNKNOWN,
        }
    ),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.REJECTED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.TIMED_OUT: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.OUTCOME_UNKNOWN: frozenset(),
}

FINAL_STATES = frozenset(state for state, following in TRANSITIONS.items() if not following)
"""States that nothing leaves."""

IN_FLIGHT_STATES = frozenset({_S.SENT, _S.ACCEPTED, _S.RUNNING, _S.CANCELLING})
"""States in which a command takes one of its neuron's places."""

FINISHED_BY_NEURON = frozenset({_S.SUCCEEDED, _S.FAILED, _S.REJECTED, _S.CANCELLED, _S.TIMED_OUT})
"""Final states that a neuron may report."""


def predecessors(state: CommandState) -> frozenset[CommandState]:
    """The states from which a command may come to `state`."""
    return frozenset(before for before, following in TRANSITIONS.items() if state in following)


@dataclass(frozen=True, slots=True)
class CommandError:
    """Why a command failed: a word for programs, a sentence for people, and details."""

    code: str
    message: str
    details: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The neuron has the command in its journal."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """The handler runs; `fraction` of it (0 to 1) is done."""

    fraction: float
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The command has ended in a state of FINISHED_BY_NEURON."""

    state: CommandState
    response: JsonObject | None
    error: CommandError | None
    run_duration: timedelta | None
    log_tail: str


@dataclass(frozen=True, slots=True)
class CommandUpdate:
    """What a neuron says of one attempt of a command."""

    command_id: str
    attempt: int
    change: Accepted | Progressed | Finished


@dataclass(frozen=True, slots=True)
class CommandProgress:
    """What an update can change of a command: the part of its row that the writer holds."""

    command_id: str
    neuron_id: str
    state: CommandState
    attempt: int
    fraction: float | None = None
    message: str | None = None
    finished: Finished | None = None

    @property
    def final(self) -> bool:
        """True once nothing can change it any more."""
        return self.state in FINAL_STATES


def apply(command: CommandProgress, update: CommandUpdate) -> CommandProgress | None:
    """The command after `update`, or None where the update changes nothing.

    An update of another attempt, one that would move the command backwards, and one of a final
    command change nothing; the caller acknowledges them all the same.
    """
    if update.attempt != command.attempt or command.final:
        return None
    match update.change:
        case Accepted():
            if CommandState.ACCEPTED not in TRANSITIONS[command.state]:
                return None
            return replace(command, state=CommandState.ACCEPTED)
        case Progressed(fraction, message):
            advanced = replace(command, fraction=fraction, message=message)
            if CommandState.RUNNING in TRANSITIONS[command.state]:
                return replace(advanced, state=CommandState.RUNNING)
            return advanced
        case Finished(state) as finished:
            if state not in TRANSITIONS[command.state]:
                return None
            return replace(command, state=state, finished=finished)
