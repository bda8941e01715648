"""`federation events`: what neurons noted."""

from __future__ import annotations

from typing import Annotated

import typer

from federation.v1 import analytics_service_pb2 as pb
from federation.v1.report_pb2 import Severity
from federation_server.console.leaf import Session, leaf
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
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0: all.")] = 50,
) -> None:
    """The events that neurons reported, newest first."""
    federation, out = session.federation, session.out
    request = pb.ListReportedEventsRequest(filter=filter_text)
    method = federation.analytics.ListReportedEvents
    answer = federation.pages(method, request, "events", limit=limit)
    if out.json:
        out.document(answer)
    elif not answer.events:
        out.note("no event matches" if filter_text else "no event has been reported yet")
    else:
        out.table(COLUMNS, map(_row, answer.events))
        if answer.next_page_token:
            out.note(f"the newest {limit}; there are more (--limit)")


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
