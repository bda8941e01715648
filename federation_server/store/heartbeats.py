"""Reading the history of heartbeats; `ingest` writes it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, Text, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.heartbeat import Heartbeat, StoredHeartbeat
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import heartbeats

_JSON = frozenset({"host", "dependencies", "versions"})
"""Columns that the domain carries as JSON text."""


def _select(neuron_id: str) -> Select[Any]:
    columns = (
        cast(heartbeats.c[name], Text).label(name) if name in _JSON else heartbeats.c[name]
        for name in Heartbeat._fields
    )
    query = select(heartbeats.c.receive_time, heartbeats.c.epoch, *columns)
    return query.where(heartbeats.c.neuron_id == neuron_id)


async def get(
    connection: AsyncConnection, neuron_id: str, receive_time: datetime
) -> Heartbeat | None:
    """The heartbeat that came at that time; None once it is older than the history."""
    query = _select(neuron_id).where(heartbeats.c.receive_time == receive_time)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _stored(row).heartbeat


async def list_heartbeats(
    connection: AsyncConnection,
    neuron_id: str,
    *,
    start_time: datetime | None,
    end_time: datetime | None,
    page_size: int,
    page_token: str,
) -> tuple[list[StoredHeartbeat], str]:
    """A page of a neuron's heartbeats that came within [start_time, end_time), newest first, and
    the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    query = _select(neuron_id)
    if start_time is not None:
        query = query.where(heartbeats.c.receive_time >= start_time)
    if end_time is not None:
        query = query.where(heartbeats.c.receive_time < end_time)
    asked = page(page_size, page_token, "heartbeats", neuron_id, str(start_time), str(end_time))
    newest_first = [SortKey(heartbeats.c.receive_time, descending=True)]
    rows, next_page_token = await asked.read(connection, query, newest_first)
    return [_stored(row) for row in rows], next_page_token


def _stored(row: Row[Any]) -> StoredHeartbeat:
    values = tuple(row)
    return StoredHeartbeat(values[0], values[1], Heartbeat(*values[2:]))
