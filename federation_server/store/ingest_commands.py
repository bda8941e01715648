"""What neurons say of their commands, written inside the transaction of `ingest.apply`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from federation_server.domain.command import CommandUpdate, apply
from federation_server.store import ledger
from federation_server.store.database import Connection
from federation_server.store.ledger import ChangedCommand


async def write(
    connection: Connection, updates: Sequence[tuple[str, CommandUpdate]], *, now: datetime
) -> list[ChangedCommand]:
    """Applies each neuron's updates in order; says which commands changed.

    An update for an unknown command, for another neuron's, of another attempt, or backwards,
    changes nothing.
    """
    rows = await ledger.lock(connection, (update.command_id for _, update in updates))
    for neuron_id, update in updates:
        row = rows.get(update.command_id)
        if row is None or row.entry.neuron_id != neuron_id:
            continue
        after = apply(row.entry, update, now)
        if after is not None:
            row.become(after, f"neuron:{neuron_id}")
    return await ledger.save(connection, rows.values())
