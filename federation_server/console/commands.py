"""`federation command …`: order neurons about."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from federation.v1 import command_service_pb2 as pb
from federation_server.console import command_view, execution, values
from federation_server.console.failure import Failure
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.problem import CallFailure
from federation_server.console.wire import duration, timestamp

app = noun("Order neurons about.")

NeuronId = Annotated[str, typer.Argument(metavar="NEURON", help="The neuron's id.")]
Type = Annotated[
    str, typer.Argument(metavar="TYPE", help="What to do: a type that the neuron advertises.")
]
Parameters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Parameters: JSON where it is JSON, else text; a dotted key nests.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="JSON|@FILE|-",
        help="The parameters as a JSON object: as it is, from a file, or from stdin.",
    ),
]
Priority = Annotated[
    int | None, typer.Option(min=0, max=9, help="Higher goes first.", show_default="5")
]
RunTimeout = Annotated[
    timedelta | None,
    typer.Option(parser=values.span, metavar="SPAN", help="How long it may run, like 30s."),
]
Expire = Annotated[
    datetime | None,
    typer.Option(
        parser=values.future,
        metavar="SPAN|TIME",
        help="Give it up if it has not started by then.",
        show_default="24h",
    ),
]
NotBefore = Annotated[
    datetime | None,
    typer.Option(parser=values.future, metavar="SPAN|TIME", help="Do not send it before this."),
]
RequestId = Annotated[
    str,
    typer.Option(
        help="The same id and the same order make one command, however often it is said.",
        show_default="a new one",
    ),
]
Unadvertised = Annotated[
    bool,
    typer.Option("--allow-unadvertised", help="Also a type that the neuron does not advertise."),
]


@leaf(app, "issue", example="command issue scraper-7 run_task input_source=db limit=10")
def issue(
    session: Session,
    neuron: NeuronId,
    command_type: Type,
    parameters: Parameters = None,
    *,
    data: Data = None,
    priority: Priority = None,
    run_timeout: RunTimeout = None,
    expire: Expire = None,
    not_before: NotBefore = None,
    request_id: RequestId = "",
    allow_unadvertised: Unadvertised = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and order nothing.")
    ] = False,
) -> None:
    """Orders a command and returns at once."""
    federation, out = session.federation, session.out
    request = pb.IssueCommandRequest(
        command=pb.CommandSpec(
            neuron_id=neuron,
            type=command_type,
            data=_struct(values.parameters(parameters or [], data)),
            priority=priority,
            run_timeout=duration(run_timeout),
            expire_time=timestamp(expire),
            not_before_time=timestamp(not_before),
            allow_unadvertised=allow_unadvertised,
        ),
        request_id=request_id or str(uuid.uuid4()),
        dry_run=dry_run,
    )
    try:
        answer = federation.call(federation.commands.IssueCommand, request)
    except CallFailure as failure:
        raise _perhaps_issued(failure, request.request_id) from None
    if out.json:
        out.document(answer.command)
    elif dry_run:
        out.facts("This would be ordered", command_view.order(answer.command))
    else:
        out.line(
            f"{answer.command.command_id}  {command_view.state(answer.command)}"
            f"  {command_type} for {neuron}"
        )


@leaf(app, "exec", example="command exec scraper-7 run_task input_source=db --run-timeout 5m")
def execute(
    session: Session,
    neuron: NeuronId,
    command_type: Type,
    parameters: Parameters = None,
    *,
    data: Data = None,
    priority: Priority = None,
    run_timeout: RunTimeout = None,
    expire: Expire = None,
    not_before: NotBefore = None,
    request_id: RequestId = "",
    allow_unadvertised: Unadvertised = False,
) -> int:
    """Orders a command and follows it to its end. Exit code 0 if it SUCCEEDED, else 1.

    Ctrl-C leaves the command running. If the federation goes away for a while, this waits for it
    and goes on.
    """
    request = pb.ExecuteCommandRequest(
        command=pb.CommandSpec(
            neuron_id=neuron,
            type=command_type,
            data=_struct(values.parameters(parameters or [], data)),
            priority=priority,
            run_timeout=duration(run_timeout),
            expire_time=timestamp(expire),
            not_before_time=timestamp(not_before),
            allow_unadvertised=allow_unadvertised,
        ),
        request_id=request_id or str(uuid.uuid4()),
    )
    try:
        return execution.run(session, request)
    except CallFailure as failure:
        raise _perhaps_issued(failure, request.request_id) from None


@leaf(app, "list", example="command list --filter 'neuron_id = \"scraper-*\" AND state = FAILED'")
def list_commands(
    session: Session,
    *,
    filter_text: Annotated[
        str,
        typer.Option(
            "--filter",
            help="Which commands, by command_id, neuron_id, type, state, priority, issuer, attempt,"
            " create_time, start_time, end_time.",
        ),
    ] = "",
    order_by: Annotated[
        str,
        typer.Option(
            help="create_time or priority; with ' desc' for the reverse.",
            show_default="create_time desc",
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0: all.")] = 50,
) -> None:
    """The commands, newest first."""
    federation, out = session.federation, session.out
    request = pb.ListCommandsRequest(filter=filter_text, order_by=order_by)
    answer = federation.pages(federation.commands.ListCommands, request, "commands", limit=limit)
    if out.json:
        out.document(answer)
    elif not answer.commands:
        out.note("no command matches" if filter_text else "no command has been issued yet")
    else:
        out.table(command_view.COLUMNS, map(command_view.row, answer.commands))
        if answer.next_page_token:
            out.note(f"the first {limit}; there are more (--limit)")


@leaf(app, "show", example="command show 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11")
def show(
    session: Session,
    command: Annotated[str, typer.Argument(metavar="ID", help="The command's id.")],
) -> None:
    """All that became of one command."""
    federation, out = session.federation, session.out
    request = pb.GetCommandRequest(command_id=command)
    answer = federation.call(federation.commands.GetCommand, request)
    if out.json:
        out.document(answer.command)
    else:
        command_view.show(out, answer.command)


def _struct(data: dict[str, Any]) -> Struct | None:
    """The parameters for the wire; none at all stay absent."""
    try:
        return ParseDict(data, Struct()) if data else None
    except (ParseError, RecursionError):
        raise typer.BadParameter("the parameters are nested too deeply") from None


def _perhaps_issued(failure: CallFailure, request_id: str) -> Failure:
    """The failure, with what to do where nobody knows whether the order has arrived."""
    if not failure.maybe_done:
        return failure
    advice = f"it may have been issued: say the same with --request-id {request_id} to find out"
    return Failure(*failure.lines, advice, exit_code=failure.exit_code)
