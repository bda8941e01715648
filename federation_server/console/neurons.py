"""`federation neurons …`: see and steer neurons."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import ParseDict, ParseError

from federation.v1 import access_service_pb2 as access_pb
from federation.v1 import fleet_service_pb2 as pb
from federation.v1.neuron_pb2 import Neuron, NeuronDescription
from federation_server.console import heartbeat_view, neuron_view, neuron_watch, values
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.wire import timestamp

app = noun("See and steer neurons.")

NeuronId = Annotated[str, typer.Argument(metavar="NEURON", help="The neuron's id.")]
FILTER_HELP = (
    "Which neurons, by neuron_id, name, type, language, version, lifecycle, presence,"
    " health_score, cpu_percent, memory_percent, error_rate_percent, mean_response_ms,"
    " last_heartbeat_time, create_time, update_time, labels.KEY, capabilities, dependencies."
)
Filter = Annotated[str, typer.Option("--filter", help=FILTER_HELP)]
OrderBy = Annotated[
    str,
    typer.Option(
        help="neuron_id, name, type, presence, health_score, last_heartbeat_time or create_time;"
        " with ' desc' for the reverse."
    ),
]
Reason = Annotated[str, typer.Option(help="Why, for people.")]


@leaf(
    app,
    "list",
    example="neurons list --filter 'type = \"scraper\" AND NOT presence = ONLINE'",
)
def list_neurons(
    session: Session,
    *,
    filter_text: Filter = "",
    order_by: OrderBy = "",
    limit: Limit = 0,
) -> None:
    """The neurons, one a line."""
    method = session.federation.fleet.ListNeurons
    request = pb.ListNeuronsRequest(filter=filter_text, order_by=order_by)
    nothing = "no neuron matches" if filter_text else "no neuron has registered yet"
    shown = Listing("neurons", neuron_view.COLUMNS, neuron_view.row)
    shown.show(session, method, request, limit=limit, nothing=nothing)


@leaf(app, "show", example="neurons show python-processor-001")
def show(session: Session, neuron: NeuronId) -> None:
    """All that is known of one neuron."""
    federation = session.federation
    request = pb.GetNeuronRequest(neuron_id=neuron)
    answer = federation.call(federation.fleet.GetNeuron, request)
    _show(session, answer.neuron)


@leaf(app, "watch", example="neurons watch --filter 'type = \"scraper\"'")
def watch(
    session: Session,
    *,
    filter_text: Filter = "",
    order_by: OrderBy = "",
    interval: Annotated[
        timedelta, typer.Option(parser=values.span, metavar="SPAN", help="How often to look.")
    ] = "1s",  # type: ignore[assignment]  # read by the parser
) -> None:
    """The neurons as they are, again and again, until Ctrl-C.

    On a terminal a table; in a pipe or with --json one JSON object for each neuron that was added,
    changed or removed. Goes on when the federation is away for a while.
    """
    neuron_watch.watch(
        session, filter_text=filter_text, order_by=order_by, interval=interval.total_seconds()
    )


@leaf(app, "update", example='neurons update scraper-7 --set labels=\'{"zone":"eu"}\'')
def update(
    session: Session,
    neuron: NeuronId,
    *,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field's new value, as JSON or as text: name, base_url, healthcheck_endpoint,"
            " resource_requirements, deployment, alert_thresholds, auto_restart, labels, metadata,"
            " max_concurrent_commands. It is replaced as a whole.",
        ),
    ] = None,
    release: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD", help="A field to give back: the neuron's next start sets it again."
        ),
    ] = None,
) -> None:
    """Changes a neuron's description; the change outlives the neuron's next start."""
    if not (assign or release):
        raise typer.BadParameter("say what to change with --set or --release")
    federation = session.federation
    fields = values.fields(assign or [])
    request = pb.UpdateNeuronRequest(
        neuron_id=neuron,
        description=_description(fields),
        update_mask=FieldMask(paths=sorted(fields)),
        release_mask=FieldMask(paths=release or []),
    )
    _show(session, federation.call(federation.fleet.UpdateNeuron, request).neuron)


@leaf(app, "deactivate", example="neurons deactivate scraper-7 --reason 'bad data since noon'")
def deactivate(session: Session, neuron: NeuronId, *, reason: Reason = "") -> None:
    """Shuts a neuron out until it is activated: its stream ends within seconds."""
    federation = session.federation
    request = pb.DeactivateNeuronRequest(neuron_id=neuron, reason=reason)
    answer = federation.call(federation.fleet.DeactivateNeuron, request)
    _changed(session, answer.neuron, "is deactivated")


@leaf(app, "activate", example="neurons activate scraper-7")
def activate(session: Session, neuron: NeuronId, *, reason: Reason = "") -> None:
    """Lets a deactivated neuron come back."""
    federation = session.federation
    request = pb.ActivateNeuronRequest(neuron_id=neuron, reason=reason)
    answer = federation.call(federation.fleet.ActivateNeuron, request)
    _changed(session, answer.neuron, "is active")


@leaf(app, "approve", example="neurons approve scraper-7 --code K7QX-2MPA")
def approve(
    session: Session,
    neuron: NeuronId,
    *,
    code: Annotated[
        str, typer.Option(help="What the neuron logs, to be sure that it is the one you mean.")
    ] = "",
    reason: Reason = "",
) -> None:
    """Lets a neuron take part that waits for it (`neurons list --filter 'lifecycle = PENDING'`)."""
    federation = session.federation
    request = access_pb.ApproveNeuronRequest(neuron_id=neuron, approval_code=code, reason=reason)
    answer = federation.call(federation.access.ApproveNeuron, request)
    _changed(session, answer.neuron, "is approved")


@leaf(app, "reject", example="neurons reject scraper-7 --reason 'not one of ours'")
def reject(session: Session, neuron: NeuronId, *, reason: Reason = "") -> None:
    """Turns a neuron away that waits for its approval."""
    federation = session.federation
    request = access_pb.RejectNeuronRequest(neuron_id=neuron, reason=reason)
    answer = federation.call(federation.access.RejectNeuron, request)
    _changed(session, answer.neuron, "is rejected")


@leaf(app, "revoke-tokens", example="neurons revoke-tokens scraper-7 --reason 'laptop stolen'")
def revoke_tokens(session: Session, neuron: NeuronId, *, reason: Reason = "") -> None:
    """Ends a neuron's stream and all its tokens. It comes back with an enrollment token that
    allows re-enrollment, and not before.
    """
    federation = session.federation
    request = access_pb.RevokeNeuronTokensRequest(neuron_id=neuron, reason=reason)
    answer = federation.call(federation.access.RevokeNeuronTokens, request)
    _changed(session, answer.neuron, "has no valid token any more")


@leaf(app, "delete", example="neurons delete scraper-7 --yes")
def delete(
    session: Session,
    neuron: NeuronId,
    *,
    force: Annotated[bool, typer.Option("--force", help="Even if it is not OFFLINE.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forgets a neuron, its commands and all its history. There is no way back."""
    federation, out = session.federation, session.out
    if not yes and not typer.confirm(f"Forget {neuron} and all its history?", err=True):
        out.note("nothing is deleted")
        raise typer.Exit(1)
    request = pb.DeleteNeuronRequest(neuron_id=neuron, force=force)
    answer = federation.call(federation.fleet.DeleteNeuron, request)
    if out.json:
        out.document(answer)
    else:
        out.line(f"{neuron} is forgotten")


@leaf(app, "heartbeats", example="neurons heartbeats scraper-7 --since 15m")
def heartbeats(
    session: Session,
    neuron: NeuronId,
    *,
    since: Annotated[
        datetime | None,
        typer.Option(parser=values.past, metavar="SPAN|TIME", help="Not before this."),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(parser=values.past, metavar="SPAN|TIME", help="Before this."),
    ] = None,
    limit: Limit = 20,
) -> None:
    """A neuron's heartbeats, newest first."""
    method = session.federation.fleet.ListHeartbeats
    request = pb.ListHeartbeatsRequest(
        neuron_id=neuron, start_time=timestamp(since), end_time=timestamp(until)
    )
    shown = Listing("heartbeats", heartbeat_view.COLUMNS, heartbeat_view.row)
    shown.show(session, method, request, limit=limit, nothing="no heartbeat in that time")


def _description(fields: dict[str, object]) -> NeuronDescription:
    try:
        return ParseDict(fields, NeuronDescription())
    except ParseError as error:
        raise typer.BadParameter(f"--set: {error}") from None


def _show(session: Session, neuron: Neuron) -> None:
    if session.out.json:
        session.out.document(neuron)
    else:
        neuron_view.show(session.out, neuron)


def _changed(session: Session, neuron: Neuron, what: str) -> None:
    if session.out.json:
        session.out.document(neuron)
    else:
        session.out.line(f"{neuron.neuron_id} {what}")
