"""The audit log in the store: written with what it tells of, and read page by page.

An entry is written in the transaction of its change, so that there is neither without the other.
Nothing here changes or deletes one: triggers refuse it, and the log shrinks only by the partitions
that housekeeping drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime

import orjson
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.audit import Entry, Outcome
from federation_server.store import filter as filters
from federation_server.store.database import Connection, driver
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import audit_entries

ORDERS = {"entry_time": False, "entry_time desc": True}
"""How entries can be ordered, and whether that is downwards."""

_NAMES = tuple(field.name for field in fields(Entry))
_TYPES = {"before": "jsonb", "after": "jsonb", "count": "int8"}
_LIST = ", ".join(_NAMES)

INSERT = f"""
INSERT INTO audit_entries ({_LIST})
SELECT {_LIST} FROM json_to_recordset({{}}::json) AS e (
    {", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in _NAMES)})
"""
"""Puts entries into the log; to be formatted with the parameter that is their JSON."""

_INSERT = INSERT.format("%s").encode()

FIELDS: filters.Fields = {
    "entry_time": filters.Time(audit_entries.c.entry_time),
    **{name: filters.Text(audit_entries.c[name]) for name in _NAMES if name not in _TYPES},
    "method": filters.Text(audit_entries.c.method, is_path=True),
    "outcome": filters.Choice(audit_entries.c.outcome, Outcome),
}


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """An entry as the log holds it."""

    entry_time: datetime
    entry_id: int
    entry: Entry


def to_json(entries: Sequence[Entry]) -> str:
    """The entries as `INSERT` wants them."""
    return orjson.dumps(entries).decode()


async def record(connection: AsyncConnection, entry: Entry) -> None:
    """Puts an entry into the log, in the transaction of what it tells of."""
    await insert(await driver(connection), [entry])


async def insert(connection: Connection, entries: Sequence[Entry]) -> None:
    """Puts entries into the log."""
    await connection.execute(_INSERT, (to_json(entries),))


async def list_entries(
    connection: AsyncConnection,
    *,
    filter_text: str,
    order_by: str,
    page_size: int,
    page_token: str,
) -> tuple[list[StoredEntry], str]:
    """A page of the entries that match, newest first unless `order_by` (one of ORDERS) says
    otherwise, and the token of the next page.

    Raises:
        FilterError: the filter cannot be understood.
        PageTokenInvalid: the token is not of this list.
    """
    own = audit_entries.c
    downwards = ORDERS[order_by or "entry_time desc"]
    keys = (SortKey(own.entry_time, downwards), SortKey(own.entry_id, downwards))
    asked = page(page_size, page_token, "audit_entries", filter_text, order_by)
    query = select(own.entry_time, own.entry_id, *(own[name] for name in _NAMES)).where(
        filters.condition(filter_text, FIELDS)
    )
    rows, next_page_token = await asked.read(connection, query, keys)
    return [StoredEntry(row[0], row[1], Entry(*row[2:])) for row in rows], next_page_token
