"""`federation command …`: order neurons about."""

from __future__ import annotations

from typing import Annotated

import typer

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandState
from federation_server.console import batch_order, command_view, following
from federation_server.console.failure import EXIT_INTERRUPTED
from federation_server.console.leaf import Session, leaf, noun, report
from federation_server.console.listing import Limit, Listing
from federation_server.console.order import (
    Parameters,
    RequestId,
    Terms,
    Type,
    fresh,
    perhaps_issued,
)
from federation_server.console.problem import CallFailure
from federation_server.console.render import to_dict

app = noun("Order neurons about.")

NeuronId = Annotated[str, typer.Argument(metavar="NEURON", help="The neuron's id.")]
CommandId = Annotated[str, typer.Argument(metavar="ID", help="The command's id.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show what becomes of it until its end.")]


@leaf(app, "issue", example="command issue scraper-7 run_task input_source=db limit=10")
def issue(
    session: Session,
    neuron: NeuronId,
    command_type: Type,
    parameters: Parameters = None,
    *,
    terms: Terms,
    request_id: RequestId = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and order nothing.")
    ] = False,
) -> None:
    """Orders a command and returns at once."""
    spec = terms.spec(command_type, parameters, neuron_id=neuron)
    _issue(session, spec, fresh(request_id), dry_run=dry_run)


@leaf(app, "exec", example="command exec scraper-7 run_task input_source=db --run-timeout 5m")
def execute(
    session: Session,
    neuron: NeuronId,
    command_type: Type,
    parameters: Parameters = None,
    *,
    terms: Terms,
    request_id: RequestId = "",
    follow: Annotated[
        bool, typer.Option(help="Follow it to its end; else this is `command issue`.")
    ] = True,
) -> int:
    """Orders a command and follows it to its end.

    Exit code 0 if it SUCCEEDED, else 1. Ctrl-C leaves the command running.
    If the federation goes away for a while, this waits for it and goes on.
    """
    spec = terms.spec(command_type, parameters, neuron_id=neuron)
    request_id = fresh(request_id)
    if not follow:
        _issue(session, spec, request_id)
        return 0
    request = pb.ExecuteCommandRequest(command=spec, request_id=request_id)
    try:
        return following.execute(session, request)
    except CallFailure as failure:
        raise perhaps_issued(failure, request_id) from None


@leaf(
    app,
    "batch",
    example="command batch run_task limit=10 --filter 'type = \"scraper\"' --max-in-flight 5",
)
def batch(
    session: Session,
    command_type: Type,
    parameters: Parameters = None,
    *,
    filter_text: Annotated[
        str,
        typer.Option("--filter", help="Which neurons; see `neurons list --help`."),
    ],
    max_in_flight: Annotated[
        int,
        typer.Option(
            min=0,
            max=10_000,
            metavar="N",
            help="How many neurons may have it at a time.",
            show_default="all",
        ),
    ] = 0,
    terms: Terms,
    request_id: RequestId = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show whom it would reach and order nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    follow: Annotated[bool, typer.Option(help="Follow it to the end of the last command.")] = True,
) -> int:
    """Orders the same of every neuron that matches a filter, and follows it to its end.

    Shows first whom it would reach, and asks; without a terminal it needs --yes.
    Exit code 0 if every command SUCCEEDED, else 1. Ctrl-C leaves the batch running.
    """
    request = pb.IssueCommandBatchRequest(
        filter=filter_text,
        command=terms.spec(command_type, parameters),
        max_in_flight=max_in_flight,
        request_id=fresh(request_id),
        dry_run=dry_run,
    )
    return batch_order.issue(session, request, confirmed=yes, follow=follow)


@leaf(app, "follow", example="command follow 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11")
def follow(session: Session, command: CommandId) -> int:
    """Shows what became of a command, and follows it to its end.

    Exit code 0 if it SUCCEEDED, else 1. Ctrl-C leaves the command running.
    If the federation goes away for a while, this waits for it and goes on.
    """
    return following.follow(session, command)


@leaf(app, "cancel", example="command cancel 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11 --follow")
def cancel(
    session: Session,
    commands: Annotated[list[str], typer.Argument(metavar="ID…", help="The commands' ids.")],
    *,
    reason: Annotated[str, typer.Option(help="Why, for people; the neuron gets it too.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until each has ended; 0 if all are CANCELLED.")
    ] = False,
) -> int:
    """Cancels commands: one that waits at once, one that its neuron has when that gives it up.

    All are tried, also if one of them has ended; the exit code is the worst.
    """
    federation, out = session.federation, session.out
    code = 0
    cancelled: list[Command] = []
    for command_id in commands:
        request = pb.CancelCommandRequest(command_id=command_id, reason=reason)
        try:
            answer = federation.call(federation.commands.CancelCommand, request)
        except CallFailure as failure:
            report(failure)
            code = max(code, failure.exit_code)
            continue
        cancelled.append(answer.command)
        if out.json and follow:
            out.object({"command": to_dict(answer.command)})
        else:
            _tell(session, answer.command)
    return max(code, _until_cancelled(session, cancelled)) if follow else code


@leaf(app, "retry", example="command retry 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11 --follow")
def retry(
    session: Session, command: CommandId, *, follow: Follow = False, request_id: RequestId = ""
) -> int:
    """Orders anew what a command ordered that has ended: a new command with the same terms.

    With --follow the exit code is 0 if the new one SUCCEEDED, else 1.
    """
    federation = session.federation
    request = pb.RetryCommandRequest(command_id=command, request_id=fresh(request_id))
    try:
        answer = federation.call(federation.commands.RetryCommand, request)
    except CallFailure as failure:
        raise perhaps_issued(failure, request.request_id) from None
    if not follow:
        _tell(session, answer.command)
        return 0
    return following.follow(session, answer.command.command_id)


@leaf(app, "explain", example="command explain 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11")
def explain(session: Session, command: CommandId) -> None:
    """Why a command is where it is: the nearest cause first."""
    federation, out = session.federation, session.out
    request = pb.ExplainCommandRequest(command_id=command)
    answer = federation.call(federation.commands.ExplainCommand, request)
    if out.json:
        out.document(answer)
    else:
        command_view.explain(out, answer.command, answer.facts)


@leaf(app, "list", example="command list --filter 'neuron_id = \"scraper-*\" AND state = FAILED'")
def list_commands(
    session: Session,
    *,
    filter_text: Annotated[
        str,
        typer.Option(
            "--filter",
            help="Which commands, by command_id, batch_id, neuron_id, type, state, priority,"
            " issuer, attempt, create_time, start_time, end_time.",
        ),
    ] = "",
    order_by: Annotated[
        str,
        typer.Option(
            help="create_time or priority; with ' desc' for the reverse.",
            show_default="create_time desc",
        ),
    ] = "",
    limit: Limit = 50,
) -> None:
    """The commands, newest first."""
    method = session.federation.commands.ListCommands
    request = pb.ListCommandsRequest(filter=filter_text, order_by=order_by)
    nothing = "no command matches" if filter_text else "no command has been issued yet"
    shown = Listing("commands", command_view.COLUMNS, command_view.row)
    shown.show(session, method, request, limit=limit, nothing=nothing)


@leaf(app, "show", example="command show 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11")
def show(session: Session, command: CommandId) -> None:
    """All that became of one command."""
    federation, out = session.federation, session.out
    request = pb.GetCommandRequest(command_id=command)
    answer = federation.call(federation.commands.GetCommand, request)
    if out.json:
        out.document(answer.command)
    else:
        command_view.show(out, answer.command)


def _until_cancelled(session: Session, commands: list[Command]) -> int:
    """Follows those that have not ended yet, one after the other. Returns the worst exit code."""
    code = 0
    for known in commands:
        if known.state in command_view.FINAL:
            continue
        if len(commands) > 1 and not session.out.json:
            session.out.line()
            command_view.tell(session.out, known)
        wanted = CommandState.COMMAND_STATE_CANCELLED
        code = max(code, following.follow(session, known.command_id, known=known, wanted=wanted))
        if code == EXIT_INTERRUPTED:
            break
    return code


def _issue(
    session: Session, spec: pb.CommandSpec, request_id: str, *, dry_run: bool = False
) -> None:
    federation, out = session.federation, session.out
    request = pb.IssueCommandRequest(command=spec, request_id=request_id, dry_run=dry_run)
    try:
        answer = federation.call(federation.commands.IssueCommand, request)
    except CallFailure as failure:
        raise perhaps_issued(failure, request_id) from None
    if dry_run and not out.json:
        out.facts("This would be ordered", command_view.order(answer.command))
    elif out.json:
        out.document(answer.command)
    else:
        _tell(session, answer.command)


def _tell(session: Session, command: Command) -> None:
    """Prints a command that was just changed on one line."""
    if session.out.json:
        session.out.object(to_dict(command))
    else:
        command_view.tell(session.out, command)
