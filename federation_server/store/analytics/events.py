"""Reading the events that neurons reported; `analytics/ingest.py` writes them."""

from __future__ import annotations

from sqlalchemy import Text, cast, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.analytics import Severity, StoredEvent
from federation_server.store import filter as filters
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import reported_events

FIELDS: filters.Fields = {
    "neuron_id": filters.Text(reported_events.c.neuron_id),
    "severity": filters.Choice(reported_events.c.severity, Severity, ordered=True),
    "type": filters.Text(reported_events.c.type),
    "message": filters.Text(reported_events.c.message),
    "event_time": filters.Time(reported_events.c.event_time),
}


async def list_reported_events(
    connection: AsyncConnection, *, filter_text: str, page_size: int, page_token: str
) -> tuple[list[StoredEvent], str]:
    """A page of the events that match, newest first, and the token of the next page; fewer than
    asked for where they are large.

    Raises:
        FilterError: the filter cannot be understood.
        PageTokenInvalid: the token is not of this list.
    """
    newest_first = [
        SortKey(reported_events.c.event_time, descending=True),
        SortKey(reported_events.c.event_id, descending=True),
    ]
    asked = page(page_size, page_token, "reported_events", filter_text)
    own = reported_events.c
    payload = func.octet_length(own.message) + func.octet_length(cast(own.attributes, Text))
    query = select(own.event_time, own.event_id, payload.label("payload")).where(
        filters.condition(filter_text, FIELDS)
    )
    rows, next_page_token = await asked.read(connection, query, newest_first, bytes_in="payload")
    if not rows:
        return [], next_page_token
    shown = await connection.execute(
        select(*(own[name] for name in StoredEvent.__slots__))
        .where(
            own.event_id.in_([row.event_id for row in rows]),
            own.event_time.between(rows[-1].event_time, rows[0].event_time),
        )
        .order_by(own.event_time.desc(), own.event_id.desc())
    )
    return [StoredEvent(*row) for row in shown], next_page_token
