"""What became of one command: the SDK's own word for a CommandFinished of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from neuron_sdk.errors import CommandFailed
from neuron_sdk.payload import (
    MAX_DETAILS_BYTES,
    MAX_DETAILS_DEPTH,
    JsonObject,
    NotJson,
    TooLarge,
    as_response,
    clean_text,
    plain_object,
)
from neuron_sdk.redaction import redact_text

MAX_LOG_TAIL_BYTES = 16 * 2**10


class FinalState(StrEnum):
    """How a command may end in a neuron."""

    SUCCEEDED = "SUCCEEDED"
    """The handler returned."""
    FAILED = "FAILED"
    """It raised, it was interrupted, it could not be started, or its answer cannot be sent."""
    REJECTED = "REJECTED"
    """It was not run: an unknown type, bad data, or too late."""
    CANCELLED = "CANCELLED"
    """It was cancelled: it never ran, or its handler gave up."""
    TIMED_OUT = "TIMED_OUT"
    """It ran for longer than it may."""


@dataclass(frozen=True, slots=True)
class CommandFault:
    """Why a command did not succeed."""

    code: str
    """A word for programs: HANDLER_RAISED, INVALID_DATA, UNKNOWN_COMMAND, EXPIRED, TIMED_OUT,
    INTERRUPTED, CANCEL_IGNORED, INVALID_RESPONSE, RESPONSE_TOO_LARGE, RESPONSE_LOST,
    PROCESS_ENDED, PROCESS_FAILED, NOT_STARTED, or the handler's own."""
    message: str
    """A sentence for people."""
    details: JsonObject | None = None
    """Anything else."""


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """How a command ended."""

    state: FinalState
    response: JsonObject | None = None
    """What the handler returned; present if it SUCCEEDED."""
    error: CommandFault | None = None
    """What went wrong; absent if it SUCCEEDED or was CANCELLED."""
    run_duration: float | None = None
    """Seconds that the handler ran; None if it did not start."""
    log_tail: str = ""
    """The last lines that the handler logged by ctx.log, at most 16 KiB."""


def fault(code: str, message: str, details: Mapping[str, Any] | None = None) -> CommandFault:
    """A fault that fits the contract's limits; details that do not are left out, and it says so."""
    kept: JsonObject | None = None
    if details is not None:
        try:
            kept = plain_object(details, max_bytes=MAX_DETAILS_BYTES, max_depth=MAX_DETAILS_DEPTH)
        except (NotJson, TooLarge, TypeError, ValueError) as error:
            kept = {"left_out": clean_text(f"the details cannot be sent: {error}", 1024)}
    return CommandFault(clean_text(code, 128) or "FAILED", clean_text(message, 8192), kept)


def rejected(code: str, message: str, details: Mapping[str, Any] | None = None) -> CommandOutcome:
    """The outcome of a command that is not run."""
    return CommandOutcome(FinalState.REJECTED, error=fault(code, message, details))


def failed(code: str, message: str) -> CommandOutcome:
    """The outcome of a command that ended badly."""
    return CommandOutcome(FinalState.FAILED, error=fault(code, message))


def not_started(message: str) -> CommandOutcome:
    """The outcome of a command that was to run and did not."""
    return failed("NOT_STARTED", message)


def from_answer(value: Any) -> CommandOutcome:
    """The outcome of a handler that returned `value`."""
    try:
        return CommandOutcome(FinalState.SUCCEEDED, response=as_response(value))
    except TooLarge as error:
        return failed("RESPONSE_TOO_LARGE", f"the handler's answer is too large: {error}")
    except NotJson as error:
        return failed("INVALID_RESPONSE", f"the handler's answer cannot be sent as JSON: {error}")


def from_exception(error: BaseException) -> CommandOutcome:
    """The outcome of a handler that raised `error`: its type and message, and never its stack."""
    if isinstance(error, CommandFailed):
        said = fault(error.code, error.message, error.details)
        return CommandOutcome(FinalState.FAILED, error=said)
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 - a user's __str__ may raise anything
        message = f"(its message raised {type(broken).__name__})"
    # Nobody meant this text for operators: drivers put their whole URL into it.
    message = redact_text(message)
    name = type(error).__qualname__
    return failed("HANDLER_RAISED", f"{name}: {message}" if message else name)
