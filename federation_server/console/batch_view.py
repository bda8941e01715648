"""How a batch reads: what it would do, how far it is, and whom it did not serve."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandBatch, CommandState
from federation.v1.errors_pb2 import ErrorReason
from federation_server.console import command_view
from federation_server.console.command_view import FINAL
from federation_server.console.render import Column, Output, plain, struct_json, word
from federation_server.console.wording import both, enum, joined, relative

COLUMNS = (
    Column("BATCH"),
    Column("TYPE", folds=True),
    Column("ISSUED"),
    Column("ENDED", right=True),
    Column("STATES", folds=True),
)
SKIPPED = (Column("NEURONS", folds=True), Column("WHY", folds=True))
UNSERVED = (Column("NEURON", folds=True), Column("STATE"), Column("WHY", folds=True))

FAILED = FINAL - {
    CommandState.COMMAND_STATE_SUCCEEDED,
    CommandState.COMMAND_STATE_CANCELLED,
}
"""The ends that somebody has to look into."""

SHOWN_NAMES = 10
"""How many neurons are named before the rest is a number."""


def total(batch: CommandBatch) -> int:
    """How many commands it has."""
    return batch.matched_count - batch.skipped_count


def ended(batch: CommandBatch) -> int:
    """How many of them have ended."""
    return sum(each.count for each in batch.counts if each.state in FINAL)


def succeeded(batch: CommandBatch) -> bool:
    """Every command has SUCCEEDED."""
    return batch.HasField("end_time") and all(
        each.state == CommandState.COMMAND_STATE_SUCCEEDED for each in batch.counts if each.count
    )


def commands(count: int) -> str:
    """A number of commands."""
    return "1 command" if count == 1 else f"{count} commands"


def neurons(count: int) -> str:
    """A number of neurons."""
    return "1 neuron" if count == 1 else f"{count} neurons"


def states(batch: CommandBatch) -> Text:
    """How many commands are in which state: "3 RUNNING, 10 SUCCEEDED"."""
    parts = []
    for each in batch.counts:
        name = enum(CommandState, each.state)
        parts.append(Text(f"{each.count} ") + word(name))
    return Text(", ").join(parts)


def row(batch: CommandBatch) -> tuple[str, ...]:
    """A batch's row under COLUMNS."""
    return (
        batch.batch_id,
        batch.type,
        relative(batch.create_time),
        f"{ended(batch)}/{total(batch)}",
        states(batch).plain,
    )


def preview(
    out: Output, request: pb.IssueCommandBatchRequest, answer: pb.IssueCommandBatchResponse
) -> None:
    """Prints whom an order would reach, on what terms, and whom not."""
    batch = answer.batch
    bound = f"at most {batch.max_in_flight} neurons" if batch.max_in_flight else "all"
    out.facts(
        f"{batch.type} for {neurons(total(batch))}",
        [
            ("filter", batch.filter),
            ("neurons", _named(answer.neuron_ids, total(batch))),
            *_terms(request.command),
            ("at a time", bound),
        ],
    )
    if batch.skipped_count:
        out.line(f"{neurons(batch.skipped_count)} would get none")
        _skipped(out, answer.skipped_neurons, batch.skipped_count)


def show(out: Output, batch: CommandBatch) -> None:
    """Prints all that became of a batch."""
    skipped = f"{batch.skipped_count} got none" if batch.skipped_count else ""
    cancelled = joined(both(batch.cancel_time), batch.cancel_reason)
    out.facts(
        batch.batch_id,
        [
            ("type", batch.type),
            ("data", struct_json(batch.data) if batch.data.fields else ""),
            ("filter", batch.filter),
            ("matched", joined(neurons(batch.matched_count), skipped)),
            ("at a time", str(batch.max_in_flight or "all")),
            ("issued", joined(both(batch.create_time), batch.issuer)),
            ("cancelled", cancelled if batch.HasField("cancel_time") else ""),
            ("ended", both(batch.end_time) if batch.HasField("end_time") else ""),
        ],
    )
    out.facts(
        commands(total(batch)),
        [(str(each.count), enum(CommandState, each.state)) for each in batch.counts],
    )


def tell(out: Output, batch: CommandBatch) -> None:
    """Prints a batch on one line."""
    out.line(summary(batch))


def summary(batch: CommandBatch) -> Text:
    """A batch on one line: its id and how far it is."""
    return plain(f"{batch.batch_id}  {commands(total(batch))}: ").append_text(states(batch))


def failures(batch: CommandBatch) -> int:
    """How many of its commands have ended otherwise than as SUCCEEDED or CANCELLED."""
    return sum(each.count for each in batch.counts if each.state in FAILED)


def unserved(out: Output, batch: CommandBatch, found: Sequence[Command]) -> None:
    """Prints the first of the commands that went wrong."""
    if not found:
        return
    out.line("Not succeeded")
    out.table(UNSERVED, map(_unserved, found))
    if more := _more(failures(batch) - len(found)):
        out.line(more)
    wanted = f'batch_id = "{batch.batch_id}" AND NOT state = SUCCEEDED'
    out.note(f"their ids: federation command list --filter '{wanted}'")


def failed_filter(batch_id: str) -> str:
    """Which commands of a batch went wrong, as a filter."""
    wrong = " OR ".join(f"state = {enum(CommandState, state)}" for state in sorted(FAILED))
    return f'batch_id = "{batch_id}" AND ({wrong})'


def _unserved(command: Command) -> tuple[str, ...]:
    error = command.error
    why = f"{error.code}: {error.message}" if command.HasField("error") else command.state_reason
    return (command.neuron_id, command_view.state(command), command_view.cut(why))


def _named(neuron_ids: Sequence[str], count: int) -> str:
    names = ", ".join(neuron_ids[:SHOWN_NAMES])
    return names + _more(count - len(neuron_ids[:SHOWN_NAMES]), " and ")


def _skipped(out: Output, skipped: Sequence[pb.SkippedNeuron], count: int) -> None:
    """The neurons that would get none, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for each in skipped:
        reasons.setdefault(_why(each), []).append(each.neuron_id)
    shown = list(reasons.items())[:SHOWN_NAMES]
    out.table(SKIPPED, ((_named(names, len(names)), why) for why, names in shown))
    if more := _more(count - sum(len(names) for _, names in shown)):
        out.line(f"and {more} (--dry-run --json names the first 100)")


def _more(count: int, before: str = "") -> str:
    return f"{before}{count} more" if count > 0 else ""


def _why(skipped: pb.SkippedNeuron) -> str:
    detail = skipped.detail.removeprefix(f"the neuron {skipped.neuron_id} ")
    return command_view.cut(detail) or enum(ErrorReason, skipped.reason)


def _terms(spec: pb.CommandSpec) -> list[tuple[str, str]]:
    """What was said of the commands themselves."""
    given = Command(max_attempts=1)
    names = Command.DESCRIPTOR.fields_by_name
    for field, value in spec.ListFields():
        if field.name not in names:
            continue
        if field.message_type is not None:
            getattr(given, field.name).CopyFrom(value)
        else:
            setattr(given, field.name, value)
    rows = command_view.order(given)
    return [
        (name, value)
        for name, value in rows
        if name not in {"neuron", "type"} and (name != "priority" or spec.HasField("priority"))
    ]
