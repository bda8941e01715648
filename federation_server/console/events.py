"""`federation events`: what neurons noted."""

from __future__ import annotations

from typing import Annotated

import typer

from federation.v1 import analytics_service_pb2 as pb
from federation.v1.report_pb2 import Severity
from federation_server.console.leaf import Session, leaf
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import Column, struct_json
from federation_server.console.wording import absolute, enum

app = typer.Typer(add_completion=False)

COLUMNS = (
    Column("TIME", folds=True),
    Column("NEURON", folds=True),
    Column("SEVERITY"),
    Column("TYPE", folds=True),
    Column("MESSAGE", folds=True),
)


@leaf(app, "events", example="events --filter 'severity >= ERROR AND neuron_id = \"scraper-*\"'")
def events(
    session: Session,
    *,
    filter_text: Annotated[
        str,
        typer.Option(
            "--filter", help="Which events, by neuron_id, severity, type, message, event_time."
        ),
    ] = "",
    limit: Limit = 50,
) -> None:
    """The events that neurons reported, newest first."""
    method = session.federation.analytics.ListReportedEvents
    request = pb.ListReportedEventsRequest(filter=filter_text)
    nothing = "no event matches" if filter_text else "no event has been reported yet"
    shown = Listing("events", COLUMNS, _row)
    shown.show(session, method, request, limit=limit, nothing=nothing)


def _row(stored: pb.StoredEvent) -> tuple[str, ...]:
    event = stored.event
    attributes = struct_json(event.attributes) if event.attributes.fields else ""
    return (
        absolute(event.event_time),
        stored.neuron_id,
        enum(Severity, event.severity),
        event.type,
        f"{event.message} {attributes}".strip(),
    )
