"""How a command reads: a row in a list, the whole of it, and one transition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from federation.v1.command_pb2 import CommandState
from federation_server.console.render import Column, Output, plain, struct_json, word
from federation_server.console.wording import (
    NOTHING,
    both,
    clock,
    enum,
    joined,
    relative,
    span,
)

if TYPE_CHECKING:
    from federation.v1.command_pb2 import Command, CommandTransition

FINAL = frozenset(
    {
        CommandState.COMMAND_STATE_SUCCEEDED,
        CommandState.COMMAND_STATE_FAILED,
        CommandState.COMMAND_STATE_REJECTED,
        CommandState.COMMAND_STATE_CANCELLED,
        CommandState.COMMAND_STATE_TIMED_OUT,
        CommandState.COMMAND_STATE_EXPIRED,
        CommandState.COMMAND_STATE_OUTCOME_UNKNOWN,
    }
)

COLUMNS = (
    Column("COMMAND"),
    Column("NEURON", folds=True),
    Column("TYPE", folds=True),
    Column("STATE"),
    Column("ISSUED"),
    Column("TOOK", right=True, spare=True),
)


def state(command: Command) -> str:
    """Where it stands."""
    return enum(CommandState, command.state)


def row(command: Command) -> tuple[str, ...]:
    """A command's row under COLUMNS."""
    return (
        command.command_id,
        command.neuron_id,
        command.type,
        state(command),
        relative(command.create_time),
        span(command.run_duration) if command.HasField("run_duration") else NOTHING,
    )


def order(command: Command) -> list[tuple[str, str]]:
    """What was ordered."""
    return [
        ("neuron", command.neuron_id),
        ("type", command.type),
        ("data", struct_json(command.data) if command.data.fields else ""),
        ("priority", str(command.priority)),
        ("not before", _when(command, "not_before_time")),
        ("expires", _when(command, "expire_time")),
        ("may run for", span(command.run_timeout) if command.HasField("run_timeout") else ""),
    ]


def show(out: Output, command: Command) -> None:
    """Prints all that became of a command."""
    progress = command.progress
    share = f"{progress.fraction:.0%}".replace("%", " %") if command.HasField("progress") else ""
    out.facts(
        command.command_id,
        [
            ("state", joined(state(command), command.state_reason)),
            *order(command),
            ("issued", joined(both(command.create_time), command.issuer)),
            ("attempt", str(command.attempt) if command.attempt else ""),
            ("progress", joined(share, progress.message)),
            ("started", _when(command, "start_time")),
            ("ended", _when(command, "end_time")),
            ("took", span(command.run_duration) if command.HasField("run_duration") else ""),
        ],
    )
    if command.transitions:
        out.line("History")
        for transition in command.transitions:
            out.line(transition_text(transition, indent=2))
    outcome(out, command)


def transition_text(transition: CommandTransition, *, indent: int = 0) -> Text:
    """One line: the time, the state, who and why."""
    name = enum(CommandState, transition.state)
    text = Text(" " * indent + clock(transition.transition_time) + "  ")
    text.append_text(word(name))
    why = joined(
        f"attempt {transition.attempt}" if transition.attempt > 1 else "",
        transition.reason,
        transition.actor,
    )
    if why:
        text.append_text(plain(" " * (11 - len(name)) + f"  {why}"))
    return text


def outcome(out: Output, command: Command) -> None:
    """Prints what a command gave back: the response, the error, the end of its log."""
    if command.HasField("error"):
        error = command.error
        out.line(f"Error {error.code}:")
        out.block(error.message)
        if error.details.fields:
            out.block(struct_json(error.details, indent=2))
    if command.log_tail:
        out.line("Log")
        out.block(command.log_tail.rstrip("\n"))
    if command.HasField("response"):
        out.line("Response")
        out.block(struct_json(command.response, indent=2))


def _when(command: Command, name: str) -> str:
    return both(getattr(command, name)) if getattr(command, name).ByteSize() else ""
