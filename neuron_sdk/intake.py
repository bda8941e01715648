"""A delivery on its way in: whether it can run, its handler's arguments, and its context."""

from __future__ import annotations

from typing import Any

from neuron_sdk.commands import Command
from neuron_sdk.context import CommandContext, Report
from neuron_sdk.delivery import Delivery
from neuron_sdk.logs import get_logger
from neuron_sdk.outcome import CommandOutcome, rejected
from neuron_sdk.problems import InvalidData

_log = get_logger("neuron_sdk.command")


def read(delivery: Delivery, command: Command | None) -> dict[str, Any] | CommandOutcome:
    """The handler's arguments, or why it will not run."""
    if command is None:
        return unknown(delivery)
    if delivery.expire_after is not None and delivery.expire_after <= 0:
        return rejected("EXPIRED", "its time was over when it arrived")
    try:
        return command.parameters.convert(delivery.data)
    except InvalidData as error:
        return rejected("INVALID_DATA", str(error), {"violations": error.problems})
    except Exception as error:  # noqa: BLE001 - a user's type may raise anything while it is built
        return rejected("INVALID_DATA", f"{type(error).__qualname__}: {error}")


def unknown(delivery: Delivery) -> CommandOutcome:
    """The outcome of a command that the neuron does not have."""
    return rejected("UNKNOWN_COMMAND", f"this neuron has no command {delivery.type!r}")


def expired(delivery: Delivery) -> CommandOutcome:
    """The outcome of a command that has waited too long for its place."""
    return rejected("EXPIRED", f"it had not started within {delivery.expire_after or 0.0:g} s")


def make_context(delivery: Delivery, report: Report) -> CommandContext:
    """The context of a run of that delivery."""
    bound = _log.bind(**log_fields(delivery))

    def write(level: str, event: str, fields: dict[str, Any]) -> None:
        getattr(bound, level)(event, **({"action": "command.log"} | fields))

    return CommandContext(
        command_id=delivery.of.command_id,
        attempt=delivery.of.attempt,
        type=delivery.type,
        report=report,
        write_log=write,
        max_attempts=delivery.max_attempts,
        checkpoint=delivery.checkpoint,
    )


def log_fields(delivery: Delivery) -> dict[str, Any]:
    """What names a command in the log."""
    return {
        "command_id": delivery.of.command_id,
        "attempt": delivery.of.attempt,
        "command_type": delivery.type,
    }


def log_end(delivery: Delivery, outcome: CommandOutcome) -> None:
    """One line for each end of a command."""
    _log.info(
        "command ended",
        action="command.ended",
        state=outcome.state.value,
        code=outcome.error.code if outcome.error else None,
        run_s=None if outcome.run_duration is None else round(outcome.run_duration, 3),
        **log_fields(delivery),
    )
