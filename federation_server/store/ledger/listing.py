"""Lists of commands: filter, order, pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Text, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.command import CommandState
from federation_server.store import filter as filters
from federation_server.store.ledger.commands import RECORD_COLUMNS, CommandRecord
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import commands

FIELDS: filters.Fields = {
    "command_id": filters.Text(cast(commands.c.command_id, Text)),
    "batch_id": filters.Text(cast(commands.c.batch_id, Text)),
    "neuron_id": filters.Text(commands.c.neuron_id),
    "type": filters.Text(commands.c.type),
    "state": filters.Choice(commands.c.state, CommandState),
    "priority": filters.Number(commands.c.priority),
    "issuer": filters.Text(commands.c.issuer),
    "attempt": filters.Number(commands.c.attempt),
    "create_time": filters.Time(commands.c.create_time),
    "start_time": filters.Time(commands.c.start_time),
    "end_time": filters.Time(commands.c.end_time),
}

_ORDERS: Mapping[str, tuple[str, bool]] = {
    "create_time": ("create_time", False),
    "create_time desc": ("create_time", True),
    "priority": ("priority", False),
    "priority desc": ("priority", True),
}

ORDERS: Sequence[str] = tuple(_ORDERS)
"""What `order_by` may say; empty means the second."""


async def list_commands(
    connection: AsyncConnection,
    *,
    filter_text: str,
    order_by: str,
    page_size: int,
    page_token: str,
) -> tuple[list[CommandRecord], str]:
    """A page of the commands that match, and the token of the next page.

    Raises:
        FilterError: the filter cannot be understood.
        KeyError: `order_by` is not one of ORDERS.
        PageTokenInvalid: the token is not of this list.
    """
    name, descending = _ORDERS[order_by or "create_time desc"]
    keys = (SortKey(commands.c[name], descending), SortKey(commands.c.command_id))
    asked = page(page_size, page_token, "commands", filter_text, order_by)
    query = select(*RECORD_COLUMNS).where(filters.condition(filter_text, FIELDS))
    rows, next_page_token = await asked.read(connection, query, keys)
    return [_without_payloads(CommandRecord(*row)) for row in rows], next_page_token


def _without_payloads(record: CommandRecord) -> CommandRecord:
    """The command without what can be large."""
    return replace(record, data={}, response=None, error_details=None, log_tail="")
