"""The ledger's rules: a command's states, and every way from one to another.

The table `TRANSITIONS` is the only place that says which change is allowed. Whoever changes a
command that its neuron may have asks one of the functions below for the command after the change:
a neuron's update (`apply`), a timer (`time_out`, `lose`), an operator (`cancel`). The store's SQL
takes its sets of states from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from federation_server.domain.neuron import JsonObject

DEFAULT_PRIORITY = 5
DEFAULT_EXPIRY = timedelta(hours=24)
DEFAULT_BACKOFF = timedelta(seconds=1)
MOST_BACKOFF = timedelta(hours=1)

MOST_REASON = 500
"""How much of an error's text a state's reason repeats, in characters."""

EXPIRED = "EXPIRED"
"""The error code with which a neuron rejects a command whose time is over."""


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
    """Final: its last attempt took too long."""
    EXPIRED = "EXPIRED"
    """Final: it had not started when its time was over."""
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    """Final: whether it ran, or how it ended, cannot be known."""


class Execution(StrEnum):
    """What is done with a command whose fate is unknown."""

    AT_LEAST_ONCE = "AT_LEAST_ONCE"
    """It is sent again; the neuron's journal keeps an attempt from running twice."""
    AT_MOST_ONCE = "AT_MOST_ONCE"
    """It is never sent twice; it ends as OUTCOME_UNKNOWN."""


_S = CommandState

TRANSITIONS: Mapping[CommandState, frozenset[CommandState]] = {
    _S.QUEUED: frozenset({_S.SENT, _S.CANCELLED, _S.EXPIRED}),
    # Back to QUEUED: an attempt has failed, and there is another one.
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
            _S.EXPIRED,
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
            _S.EXPIRED,
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

_RETRIED = frozenset({_S.FAILED, _S.TIMED_OUT})
"""Ends of an attempt that another one may follow."""

FINISHED_BY_NEURON = frozenset({_S.SUCCEEDED, _S.FAILED, _S.REJECTED, _S.CANCELLED, _S.TIMED_OUT})
"""Final states that a neuron may report of an attempt."""


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
    checkpoint: JsonObject | None = None
    """What the next attempt needs to go on from here; None: what was noted before stays."""


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


class Lateness(StrEnum):
    """What an attempt took too long for; the values are the contract's error codes."""

    ACCEPT = "ACCEPT_TIMEOUT"
    RUN = "RUN_TIMEOUT"
    PROGRESS = "PROGRESS_TIMEOUT"


_LATE = {
    Lateness.ACCEPT: "the neuron had not accepted it within",
    Lateness.RUN: "it ran for longer than",
    Lateness.PROGRESS: "it said nothing of its progress for longer than",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A command as the rules see it: the part of its row that changes, and what decides how."""

    command_id: str
    neuron_id: str
    state: CommandState
    attempt: int
    execution: Execution
    max_attempts: int
    retry_backoff: timedelta
    expire_time: datetime
    state_reason: str = ""
    fraction: float | None = None
    message: str | None = None
    checkpoint: JsonObject | None = None
    next_attempt_time: datetime | None = None
    cancel_attempt: int | None = None
    """The attempt that the neuron is to give up; None once it has said how that one ended."""
    finished: Finished | None = None

    @property
    def final(self) -> bool:
        """True once nothing can change it any more."""
        return self.state in FINAL_STATES

    @property
    def in_flight(self) -> bool:
        """True while the neuron has it, or may have it."""
        return self.state in IN_FLIGHT_STATES


def apply(entry: Entry, update: CommandUpdate, now: datetime) -> Entry | None:
    """The command after a neuron's `update`, or None where that changes nothing.

    An update of another attempt, one that would move the command backwards, and one of a command
    that its neuron does not have change nothing; the caller acknowledges them all the same.
    """
    if update.attempt != entry.attempt or not entry.in_flight:
        return None
    match update.change:
        case Accepted():
            if CommandState.ACCEPTED not in TRANSITIONS[entry.state]:
                return None
            return replace(entry, state=CommandState.ACCEPTED, state_reason="")
        case Progressed(fraction, message, checkpoint):
            advanced = replace(entry, fraction=fraction, message=message)
            if checkpoint is not None:
                advanced = replace(advanced, checkpoint=checkpoint)
            if CommandState.RUNNING in TRANSITIONS[entry.state]:
                return replace(advanced, state=CommandState.RUNNING, state_reason="")
            return advanced
        case Finished() as finished:
            return _finish(entry, finished, now)


def answers_cancel(entry: Entry, update: CommandUpdate) -> bool:
    """Whether a neuron's `update` says how the attempt ended that it was to give up. That attempt
    may be over already, and the command with it.
    """
    return update.attempt == entry.cancel_attempt and isinstance(update.change, Finished)


def time_out(entry: Entry, late: Lateness, limit: timedelta, now: datetime) -> Entry:
    """The command in flight after one of its timers has run out; the neuron is to give it up."""
    words = f"{_LATE[late]} {limit.total_seconds():g} s"
    finished = Finished(CommandState.TIMED_OUT, None, CommandError(late.value, words), None, "")
    ended = _finish(entry, finished, now)
    return replace(ended, cancel_attempt=entry.attempt)


def fail(entry: Entry, code: str, message: str, now: datetime) -> Entry:
    """The command in flight after its attempt has failed without its neuron's saying so."""
    finished = Finished(CommandState.FAILED, None, CommandError(code, message), None, "")
    return _finish(entry, finished, now)


def lose(entry: Entry, reason: str) -> Entry:
    """The command in flight after everybody has stopped to hope for an answer."""
    return replace(entry, state=CommandState.OUTCOME_UNKNOWN, state_reason=reason)


def cancel(entry: Entry, reason: str) -> Entry | None:
    """The command after somebody cancelled it, or None where that changes nothing: it has ended,
    or is being cancelled.
    """
    if CommandState.CANCELLING in TRANSITIONS[entry.state]:
        return replace(
            entry,
            state=CommandState.CANCELLING,
            state_reason=reason,
            cancel_attempt=entry.attempt,
        )
    if entry.state is CommandState.QUEUED:
        return replace(
            entry, state=CommandState.CANCELLED, state_reason=reason, next_attempt_time=None
        )
    return None


def _finish(entry: Entry, finished: Finished, now: datetime) -> Entry:
    """The command in flight after its attempt has ended."""
    error = finished.error
    said = f"{error.code}: {_first_line(error.message)}" if error else ""
    state = finished.state
    too_late = state is CommandState.REJECTED and error is not None and error.code == EXPIRED
    if too_late and CommandState.EXPIRED in TRANSITIONS[entry.state]:
        state = CommandState.EXPIRED
    next_time = None
    if state in _RETRIED and entry.state is not CommandState.CANCELLING:
        next_time = _next_attempt(entry, now)
    if next_time is not None:
        said = f"attempt {entry.attempt} of {entry.max_attempts} ended as {state}: {said}"
        state = CommandState.QUEUED
    return replace(
        entry, state=state, state_reason=said, next_attempt_time=next_time, finished=finished
    )


def _first_line(text: str) -> str:
    """What a reason says of an error; all of it is in the error."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= MOST_REASON else f"{line[: MOST_REASON - 1]}…"


def _next_attempt(entry: Entry, now: datetime) -> datetime | None:
    """When the next attempt may be sent; None if there is none, or not in time."""
    if entry.attempt >= entry.max_attempts:
        return None
    # The exponent is bounded, so that the product is a timedelta whatever the backoff.
    wait = min(entry.retry_backoff * 2 ** min(entry.attempt - 1, 32), MOST_BACKOFF)
    return now + wait if now + wait < entry.expire_time else None
