"""What every order of a command may say besides whom it is for: its options, and its spec."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Execution
from federation_server.console import values
from federation_server.console.failure import Failure
from federation_server.console.problem import CallFailure
from federation_server.console.wire import duration, timestamp

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
RequestId = Annotated[
    str,
    typer.Option(
        help="The same id and the same order are carried out once, however often it is said.",
        show_default="a new one",
    ),
]


_PANEL = "How it is carried out"


def _span(help_text: str, default: str = "") -> Any:
    return typer.Option(
        parser=values.span,
        metavar="SPAN",
        help=help_text,
        show_default=default or True,
        rich_help_panel=_PANEL,
    )


def _time(help_text: str, default: str = "") -> Any:
    return typer.Option(
        parser=values.future,
        metavar="SPAN|TIME",
        help=help_text,
        show_default=default or True,
        rich_help_panel=_PANEL,
    )


@dataclass(frozen=True)
class Terms:
    """With what parameters, when, how often and for how long: the options of an order."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE|-",
            help="The parameters as a JSON object: as it is, from a file, or from stdin.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    priority: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=9,
            metavar="0-9",
            help="Higher goes first.",
            show_default="5",
            rich_help_panel=_PANEL,
        ),
    ] = None
    not_before: Annotated[datetime | None, _time("Do not send it before this.")] = None
    expire: Annotated[
        datetime | None, _time("Give it up if it has not started by then.", "24h")
    ] = None
    accept_timeout: Annotated[
        timedelta | None, _span("How long an attempt may wait for its neuron to take it, like 30s.")
    ] = None
    run_timeout: Annotated[timedelta | None, _span("How long an attempt may run, like 5m.")] = None
    progress_timeout: Annotated[
        timedelta | None, _span("How long an attempt may run without saying how far it is.")
    ] = None
    max_attempts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            metavar="N",
            help="Try up to this often if it fails or takes too long.",
            show_default="1",
            rich_help_panel=_PANEL,
        ),
    ] = None
    retry_backoff: Annotated[
        timedelta | None,
        _span("How long to wait after the first failure; twice as long after each further.", "1s"),
    ] = None
    at_most_once: Annotated[
        bool,
        typer.Option(
            "--at-most-once",
            help="Never send it twice, even if nobody can know whether it has run.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    allow_unadvertised: Annotated[
        bool,
        typer.Option(
            "--allow-unadvertised",
            help="Also a type that the neuron does not advertise.",
            rich_help_panel=_PANEL,
        ),
    ] = False

    def spec(
        self, command_type: str, parameters: Sequence[str] | None, *, neuron_id: str = ""
    ) -> pb.CommandSpec:
        """The order on these terms.

        Raises:
            typer.BadParameter: the parameters cannot be read.
        """
        return pb.CommandSpec(
            neuron_id=neuron_id,
            type=command_type,
            data=_struct(values.parameters(parameters or [], self.data)),
            priority=self.priority,
            not_before_time=timestamp(self.not_before),
            expire_time=timestamp(self.expire),
            accept_timeout=duration(self.accept_timeout),
            run_timeout=duration(self.run_timeout),
            progress_timeout=duration(self.progress_timeout),
            max_attempts=self.max_attempts or 0,
            retry_backoff=duration(self.retry_backoff),
            execution=Execution.EXECUTION_AT_MOST_ONCE
            if self.at_most_once
            else Execution.EXECUTION_UNSPECIFIED,
            allow_unadvertised=self.allow_unadvertised,
        )


def fresh(request_id: str) -> str:
    """The id that was given, or a new one."""
    return request_id or str(uuid.uuid4())


def perhaps_issued(failure: CallFailure, request_id: str) -> Failure:
    """The failure, with what to do where nobody knows whether the order has arrived."""
    if not failure.maybe_done:
        return failure
    return Failure(*failure.lines, find_out(request_id), exit_code=failure.exit_code)


def find_out(request_id: str) -> str:
    """How to learn whether an order has arrived."""
    return f"it may have been issued: say the same with --request-id {request_id} to find out"


def _struct(data: dict[str, Any]) -> Struct | None:
    """The parameters for the wire; none at all stay absent."""
    try:
        return ParseDict(data, Struct()) if data else None
    except (ParseError, RecursionError):
        raise typer.BadParameter("the parameters are nested too deeply") from None
