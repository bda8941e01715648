"""Why a command is where it is: a chain of facts, the nearest cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from federation_server.domain.command import FINAL_STATES, IN_FLIGHT_STATES, CommandState
from federation_server.domain.neuron import Activity, Lifecycle, Presence


class FactCode(StrEnum):
    """A fact as a word for programs; the contract lists them."""

    ENDED = "ENDED"
    WAITS_FOR_TIME = "WAITS_FOR_TIME"
    WAITS_FOR_RETRY = "WAITS_FOR_RETRY"
    WAITS_FOR_BATCH = "WAITS_FOR_BATCH"
    WAITS_FOR_NEURON = "WAITS_FOR_NEURON"
    WAITS_FOR_PLACE = "WAITS_FOR_PLACE"
    WAITS_TO_BE_SENT = "WAITS_TO_BE_SENT"
    WAITS_FOR_ACCEPT = "WAITS_FOR_ACCEPT"
    WAITS_IN_NEURON = "WAITS_IN_NEURON"
    RUNS = "RUNS"
    WAITS_FOR_CANCEL = "WAITS_FOR_CANCEL"
    ATTEMPT_FAILED = "ATTEMPT_FAILED"
    EXPIRES = "EXPIRES"
    TIMES_OUT = "TIMES_OUT"
    NEURON_PAUSED = "NEURON_PAUSED"
    NEURON_DEACTIVATED = "NEURON_DEACTIVATED"


@dataclass(frozen=True, slots=True)
class Fact:
    """One reason; `time` is since when, or when it will be."""

    code: FactCode
    message: str
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that another one followed."""

    time: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class Situation:
    """A command and all that its place depends on, at one moment."""

    now: datetime
    # the command
    state: CommandState
    state_reason: str
    attempt: int
    max_attempts: int
    control: bool
    held: bool
    """It waits until others of its batch have ended."""
    create_time: datetime
    not_before_time: datetime | None
    next_attempt_time: datetime | None
    expire_time: datetime
    send_time: datetime | None
    accept_time: datetime | None
    start_time: datetime | None
    cancel_time: datetime | None
    end_time: datetime | None
    progress_fraction: float | None
    progress_message: str | None
    progress_time: datetime | None
    accept_timeout: timedelta | None
    run_timeout: timedelta | None
    progress_timeout: timedelta | None
    # its neuron
    lifecycle: Lifecycle
    presence: Presence
    presence_time: datetime
    presence_reason: str
    connected: bool
    """A session is open, and has been told of the command if it is in flight."""
    activity: Activity
    # its lane
    max_concurrent: int
    taken: int
    """Places that other commands take."""
    ahead: int
    """Commands that wait and go first."""
    failed: Sequence[FailedAttempt] = ()
    """Newest first."""


def explain(at: Situation) -> list[Fact]:
    """Why the command is where it is; at least one fact."""
    facts = list(_place(at))
    facts += [Fact(FactCode.ATTEMPT_FAILED, failed.reason, failed.time) for failed in at.failed]
    return facts


def _place(at: Situation) -> Iterator[Fact]:
    if at.state in FINAL_STATES:
        why = f": {at.state_reason}" if at.state_reason else ""
        yield Fact(FactCode.ENDED, f"it ended as {at.state}{why}", at.end_time)
    elif at.state is CommandState.QUEUED:
        yield from _queued(at)
        yield Fact(
            FactCode.EXPIRES, "if it has not started by then it ends as EXPIRED", at.expire_time
        )
    elif at.state in IN_FLIGHT_STATES:
        if not at.connected:
            yield _away(at)
        yield from _in_flight(at)


def _queued(at: Situation) -> Iterator[Fact]:
    ready = True
    if at.not_before_time is not None and at.not_before_time > at.now:
        ready = False
        yield Fact(FactCode.WAITS_FOR_TIME, "it is to be sent later", at.not_before_time)
    if at.next_attempt_time is not None and at.next_attempt_time > at.now:
        ready = False
        words = f"attempt {at.attempt + 1} of {at.max_attempts} is to be sent later"
        yield Fact(FactCode.WAITS_FOR_RETRY, words, at.next_attempt_time)
    if at.held and at.connected:
        ready = False
        yield Fact(FactCode.WAITS_FOR_BATCH, "others of its batch go first")
    if at.lifecycle is Lifecycle.DEACTIVATED:
        yield Fact(FactCode.NEURON_DEACTIVATED, "its neuron is deactivated: activate it")
    elif not at.connected:
        yield _away(at)
    elif not at.control and at.taken >= at.max_concurrent:
        words = f"its neuron takes {at.max_concurrent} at a time, and has {at.taken}"
        yield Fact(FactCode.WAITS_FOR_PLACE, f"{words}; {_ahead(at)}")
        if at.activity is Activity.PAUSED:
            yield _paused()
    elif ready:
        yield Fact(FactCode.WAITS_TO_BE_SENT, f"it is about to be sent; {_ahead(at)}")


def _in_flight(at: Situation) -> Iterator[Fact]:
    of = f"attempt {at.attempt} of {at.max_attempts}" if at.max_attempts > 1 else "it"
    match at.state:
        case CommandState.SENT:
            words = f"{of} was sent, and its neuron has not accepted it yet"
            yield Fact(FactCode.WAITS_FOR_ACCEPT, words, at.send_time)
            yield from _times_out(at.send_time, at.accept_timeout, "accepted")
        case CommandState.ACCEPTED:
            words = f"{of} waits in its neuron for a free place"
            yield Fact(FactCode.WAITS_IN_NEURON, words, at.accept_time)
            if at.activity is Activity.PAUSED:
                yield _paused()
        case CommandState.CANCELLING:
            why = f" ({at.state_reason})" if at.state_reason else ""
            words = f"it was cancelled{why}, and its neuron has not answered yet"
            yield Fact(FactCode.WAITS_FOR_CANCEL, words, at.cancel_time)
        case _:
            yield Fact(FactCode.RUNS, f"{of} runs{_progress(at)}", at.start_time)
            yield from _times_out(at.start_time, at.run_timeout, "ended")
            yield from _times_out(at.progress_time, at.progress_timeout, "said more")
    if at.state in {CommandState.SENT, CommandState.ACCEPTED}:
        words = "if it has not started by then it is not started any more"
        yield Fact(FactCode.EXPIRES, words, at.expire_time)


def _away(at: Situation) -> Fact:
    if at.presence is Presence.ONLINE:  # its session is new, or it needs no stream
        words = "its neuron holds no stream, and gets it when it opens one or runs the next time"
        return Fact(FactCode.WAITS_FOR_NEURON, words)
    why = f" ({at.presence_reason})" if at.presence_reason else ""
    return Fact(FactCode.WAITS_FOR_NEURON, f"its neuron is {at.presence}{why}", at.presence_time)


def _ahead(at: Situation) -> str:
    match at.ahead:
        case 0:
            return "it is the next"
        case 1:
            return "1 command goes first"
        case number:
            return f"{number} commands go first"


def _paused() -> Fact:
    return Fact(FactCode.NEURON_PAUSED, "its neuron is paused: resume it")


def _progress(at: Situation) -> str:
    if at.progress_fraction is None:
        return ""
    said = f", {at.progress_message}" if at.progress_message else ""
    return f", {at.progress_fraction * 100:.0f} % done{said}"


def _times_out(since: datetime | None, span: timedelta | None, done: str) -> Iterator[Fact]:
    if since is not None and span is not None:
        words = f"if it has not {done} by then it ends as TIMED_OUT"
        yield Fact(FactCode.TIMES_OUT, words, since + span)
