"""Reading the events that neurons reported; `analytics/ingest.py` writes them."""

from __future__ import annotations

from sqlalchemy import select
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
    """A page of the events that match, newest first, and the token of the next page.

    Raises:
        FilterError: the filter cannot be understood.
        PageTokenInvalid: the token is not of this list.
    """
    columns = [reported_events.c[name] for name in StoredEvent.__slots__]
    newest_first = [
        SortKey(reported_events.c.event_time, descending=True),
        SortKey(reported_events.c.event_id, descending=True),
    ]
    asked = page(page_size, page_token, "reported_events", filter_text)
    query = select(*columns).where(filters.condition(filter_text, FIELDS))
    rows, next_page_token = await asked.read(connection, query, newest_first)
    return [StoredEvent(*row) for row in rows], next_page_token
