"""What neurons say of their commands, written inside the transaction of `ingest.apply`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from federation_server.domain.command import CommandUpdate, apply
from federation_server.store import ledger
from federation_server.store.database import Connection
from federation_server.store.ledger import ChangedCommand, Row


async def write(
    connection: Connection,
    rows: Mapping[str, Row],
    updates: Sequence[tuple[str, CommandUpdate]],
    *,
    now: datetime,
) -> list[ChangedCommand]:
    """Applies each neuron's updates in order to the locked commands; says which changed.

    An update for an unknown command, for another neuron's, of another attempt, or backwards,
    changes nothing.
    """
    for neuron_id, update in updates:
        row = rows.get(update.command_id)
        if row is None or row.entry.neuron_id != neuron_id:
            continue
        after = apply(row.entry, update, now)
        if after is not None:
            row.become(after, f"neuron:{neuron_id}")
    return await ledger.save(connection, rows.values())
