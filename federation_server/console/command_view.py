"""How a command reads: a row in a list, the whole of it, one transition, its end, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from federation.v1.command_pb2 import CommandState, Execution
from federation_server.console.render import Column, Output, plain, struct_json, word
from federation_server.console.wording import (
    NOTHING,
    both,
    clean_lines,
    clock,
    enum,
    joined,
    relative,
    span,
)

if TYPE_CHECKING:
    from federation.v1.command_pb2 import Command, CommandTransition
    from federation.v1.command_service_pb2 import CommandFact

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
    Column("ATTEMPT", spare=True),
    Column("ISSUED"),
    Column("TOOK", right=True, spare=True),
)

LONGEST_REASON = 240
"""Where a reason stands in a line; the error and `--json` have the whole of it."""

_STATE_WIDTH = 11


def state(command: Command) -> str:
    """Where it stands."""
    return enum(CommandState, command.state)


def attempt(command: Command) -> str:
    """Which attempt it is of how many: "attempt 2 of 3"."""
    return f"attempt {command.attempt} of {command.max_attempts}"


def progress(command: Command) -> str:
    """How far it is: "50 % · 5 rows"."""
    if not command.HasField("progress"):
        return ""
    share = f"{command.progress.fraction:.0%}".replace("%", " %")
    return joined(share, command.progress.message)


def row(command: Command) -> tuple[str, ...]:
    """A command's row under COLUMNS."""
    again = command.HasField("next_attempt_time")
    number = f"{command.attempt} of {command.max_attempts}" if command.max_attempts > 1 else NOTHING
    return (
        command.command_id,
        command.neuron_id,
        command.type,
        state(command),
        f"{number}, next {relative(command.next_attempt_time)}" if again else number,
        relative(command.create_time),
        _span(command, "run_duration") or NOTHING,
    )


def order(command: Command) -> list[tuple[str, str]]:
    """What was ordered, and on what terms."""
    once = command.execution == Execution.EXECUTION_AT_MOST_ONCE
    again = f"at most {command.max_attempts}" if command.max_attempts > 1 else ""
    first = f"{span(command.retry_backoff)} after the first, then twice as long each"
    return [
        ("neuron", command.neuron_id),
        ("type", command.type),
        ("data", struct_json(command.data) if command.data.fields else ""),
        ("priority", str(command.priority)),
        ("execution", "at most once: never sent twice" if once else ""),
        ("attempts", joined(again, first if again else "")),
        ("not before", _when(command, "not_before_time")),
        ("expires", _when(command, "expire_time")),
        ("accept timeout", _span(command, "accept_timeout")),
        ("run timeout", _span(command, "run_timeout")),
        ("progress timeout", _span(command, "progress_timeout")),
    ]


def show(out: Output, command: Command) -> None:
    """Prints all that became of a command."""
    why = "" if command.HasField("error") else command.state_reason
    several = command.max_attempts > 1
    out.facts(
        command.command_id,
        [
            ("state", joined(state(command), why)),
            *order(command),
            ("issued", joined(both(command.create_time), command.issuer)),
            ("retry of", command.retry_of_command_id),
            ("batch", command.batch_id),
            ("attempt", f"{command.attempt} of {command.max_attempts}" if several else ""),
            ("next attempt", _when(command, "next_attempt_time")),
            ("progress", progress(command)),
            ("started", _when(command, "start_time")),
            ("ended", _when(command, "end_time")),
            ("took", _span(command, "run_duration")),
        ],
    )
    if command.transitions:
        out.line("History")
        for transition in command.transitions:
            line(out, transition, command, indent=2)
    if command.HasField("checkpoint"):
        out.line("Checkpoint")
        out.block(struct_json(command.checkpoint, indent=2))
    outcome(out, command)


def tell(out: Output, command: Command) -> None:
    """Prints a command on one line: its id, where it stands, and what it is."""
    again = f", retry of {command.retry_of_command_id}" if command.retry_of_command_id else ""
    text = plain(f"{command.command_id}  ").append_text(word(state(command)))
    out.line(text.append_text(plain(f"  {command.type} for {command.neuron_id}{again}")))


def explain(out: Output, command: Command, facts: Sequence[CommandFact]) -> None:
    """Prints why a command is where it is, the nearest cause first."""
    tell(out, command)
    for number, fact in enumerate(facts, start=1):
        when = both(fact.time) if fact.HasField("time") else ""
        mark = plain(f"{number:>3}. ")
        if out.tty:
            out.entry(mark, cut(fact.message))
            if when:
                out.entry(plain(" " * 5), when)
        else:
            out.entry(mark, joined(cut(fact.message), when))


def line(out: Output, transition: CommandTransition, command: Command, *, indent: int = 0) -> None:
    """Prints a transition: the time, the state, the attempt that begins, why and who."""
    sent = transition.state == CommandState.COMMAND_STATE_SENT and command.max_attempts > 1
    body = joined(
        f"attempt {transition.attempt} of {command.max_attempts}" if sent else "",
        cut(transition.reason),
        _actor(transition.actor, command),
    )
    name = enum(CommandState, transition.state)
    out.entry(head(clock(transition.transition_time), name, indent=indent), body)


def head(at: str, name: str, *, indent: int = 0) -> Text:
    """How a line of a command's story begins: the time and what happened."""
    text = Text(" " * indent + at + "  ")
    text.append_text(word(name))
    return text.append_text(plain(" " * (_STATE_WIDTH - len(name)) + "  "))


def cut(reason: str) -> str:
    """A reason's first line, if it is short enough."""
    first, *more = clean_lines(reason).strip().split("\n", 1)
    return f"{first[: LONGEST_REASON - 1]}…" if more or len(first) > LONGEST_REASON else first


def end(out: Output, command: Command) -> None:
    """Prints how a command that was followed has ended."""
    took = f" after {_span(command, 'run_duration')}" if command.HasField("run_duration") else ""
    several = f" in {attempt(command)}" if command.max_attempts > 1 and command.attempt else ""
    told = command.HasField("error") or not command.state_reason
    text = plain(f"{command.command_id}  ")
    text.append_text(word(state(command)))
    out.line(
        text.append_text(plain(took + several + ("" if told else f": {command.state_reason}")))
    )
    outcome(out, command)


def outcome(out: Output, command: Command) -> None:
    """Prints what a command gave back: the response, the error, the end of its log."""
    if command.HasField("error"):
        error = command.error
        waits = command.state == CommandState.COMMAND_STATE_QUEUED
        out.line(f"Error {error.code}{f' of {attempt(command)}' if waits else ''}")
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


def _span(command: Command, name: str) -> str:
    return span(getattr(command, name)) if getattr(command, name).ByteSize() else ""


def _actor(actor: str, command: Command) -> str:
    """Who it was, as far as that is news; of a server the beginning of its id."""
    kind, _, name = actor.partition(":")
    if kind == "server":
        return f"server {name[:8]}"
    return "" if actor == f"neuron:{command.neuron_id}" else actor
