"""Batches in the store: the same command for many neurons.

With a bound on how many of its commands may be with their neurons at a time, a batch's commands are
inserted held, and released as others end: `release` is the only way out of being held, and it has
the batch's row locked, so the bound holds over all servers.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, Text, cast, func, insert, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, JSONPATH, UUID
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.command import FINAL_STATES, CommandState
from federation_server.domain.neuron import JsonObject, Lifecycle
from federation_server.store.database import Connection, driver
from federation_server.store.ledger import changes
from federation_server.store.ledger.changes import CONNECTED, IN_FLIGHT, ChangedCommand, states
from federation_server.store.ledger.commands import NewCommand, is_control
from federation_server.store.neuron_list import matching
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import (
    command_batches,
    command_transitions,
    commands,
    neuron_states,
    neurons,
)

MOST_NEURONS = 10_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A neuron that matches a batch's filter."""

    neuron_id: str
    lifecycle: Lifecycle
    advertised: JsonObject | None
    """How it advertises the command type, if it does."""


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch as the store holds it; the fields are those of the table."""

    batch_id: str
    issuer: str
    filter: str
    type: str
    data: JsonObject
    max_in_flight: int
    matched_count: int
    skipped_count: int
    create_time: datetime
    cancel_time: datetime | None
    cancel_reason: str


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is."""

    counts: Sequence[tuple[CommandState, int]]
    """How many of its commands are in which state, in the order of the states."""
    end_time: datetime | None
    """When the last of them ended; None before."""


_RECORD = tuple(command_batches.c[name] for name in BatchRecord.__slots__)
_ORDER = list(CommandState)

# A column of a command that is the batch's, and not the neuron's.
_SHARED = tuple(
    name for name in NewCommand.__slots__ if name not in {"neuron_id", "control", "request_id"}
)


async def candidates(
    connection: AsyncConnection, filter_text: str, command_type: str
) -> list[Candidate]:
    """The neurons that match a filter, in the order of their ids, at most one more than
    MOST_NEURONS. None of them can be deleted before the transaction ends.

    Raises:
        FilterError: the filter cannot be understood.
    """
    how = func.jsonb_path_query_first(
        neurons.c.command_types,
        cast("$[*] ? (@.type == $type)", JSONPATH),
        func.jsonb_build_object("type", command_type),
        type_=JSONB,
    )
    rows = await connection.execute(
        select(neurons.c.neuron_id, neurons.c.lifecycle, how)
        .join(neuron_states, neuron_states.c.neuron_id == neurons.c.neuron_id)
        .where(matching(filter_text))
        .order_by(neurons.c.neuron_id)
        .limit(MOST_NEURONS + 1)
        .with_for_update(key_share=True, read=True, of=neurons)
    )
    return [Candidate(*row) for row in rows]


async def find_request(
    connection: AsyncConnection, issuer: str, request_id: str
) -> tuple[BatchRecord, bytes] | None:
    """The batch that its issuer made with that request_id, and the hash of that request."""
    if not request_id:
        return None
    stored = command_batches.c
    row = (
        await connection.execute(
            select(*_RECORD, stored.request_hash).where(
                stored.issuer == issuer, stored.request_id == request_id
            )
        )
    ).one_or_none()
    return None if row is None else (BatchRecord(*row[:-1]), row[-1])


async def insert_batch(
    connection: AsyncConnection,
    template: NewCommand,
    chosen: Sequence[Candidate],
    *,
    filter_text: str,
    max_in_flight: int,
    skipped_count: int,
) -> BatchRecord | None:
    """Puts a batch and a command for each chosen neuron into the ledger, or gives None if its
    issuer has used the request_id before. `template` is the command, for any of the neurons.
    """
    made = (
        await connection.execute(
            pg_insert(command_batches)
            .values(
                batch_id=str(uuid.uuid4()),
                filter=filter_text,
                max_in_flight=max_in_flight,
                matched_count=len(chosen) + skipped_count,
                skipped_count=skipped_count,
                create_time=func.now(),
                holding=max_in_flight > 0,
                **{
                    name: getattr(template, name)
                    for name in ("issuer", "request_id", "request_hash", "type", "data")
                },
            )
            .on_conflict_do_nothing(index_elements=["issuer", "request_id"])
            .returning(*_RECORD)
        )
    ).one_or_none()
    if made is None:
        return None
    record = BatchRecord(*made)
    await _insert_commands(connection, template, chosen, record)
    return record


async def _insert_commands(
    connection: AsyncConnection,
    template: NewCommand,
    chosen: Sequence[Candidate],
    batch: BatchRecord,
) -> None:
    command_ids = [str(uuid.uuid4()) for _ in chosen]
    each = (
        func.unnest(
            cast(command_ids, ARRAY(UUID(as_uuid=False))),
            cast([neuron.neuron_id for neuron in chosen], ARRAY(Text)),
            cast([is_control(neuron.advertised) for neuron in chosen], ARRAY(Boolean)),
        )
        .table_valued("command_id", "neuron_id", "control")
        .render_derived()
    )
    shared: dict[str, Any] = {name: getattr(template, name) for name in _SHARED}
    shared |= {
        "state": CommandState.QUEUED,
        "create_time": batch.create_time,
        "batch_id": batch.batch_id,
        "held": batch.max_in_flight > 0,
    }
    columns = [cast(value, commands.c[name].type) for name, value in shared.items()]
    await connection.execute(
        insert(commands).from_select(
            ["command_id", "neuron_id", "control", *shared],
            select(each.c.command_id, each.c.neuron_id, each.c.control, *columns),
            include_defaults=False,
        )
    )
    await connection.execute(
        insert(command_transitions).from_select(
            ["command_id", "revision", "state", "transition_time", "attempt", "actor", "reason"],
            select(
                commands.c.command_id,
                commands.c.revision,
                commands.c.state,
                commands.c.create_time,
                commands.c.attempt,
                literal(f"admin:{batch.issuer}"),
                literal(""),
            ).where(commands.c.batch_id == batch.batch_id),
            include_defaults=False,
        )
    )


async def get(connection: AsyncConnection, batch_id: str) -> BatchRecord | None:
    """One batch."""
    query = select(*_RECORD).where(command_batches.c.batch_id == batch_id)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else BatchRecord(*row)


async def progress(
    connection: AsyncConnection, batch_ids: Collection[str]
) -> dict[str, BatchProgress]:
    """How far those batches are."""
    own = commands.c
    rows = await connection.execute(
        select(own.batch_id, own.state, func.count(), func.max(own.end_time))
        .where(own.batch_id.in_(batch_ids))
        .group_by(own.batch_id, own.state)
    )
    found: dict[str, list[tuple[CommandState, int, datetime | None]]] = {
        batch_id: [] for batch_id in batch_ids
    }
    for batch_id, state, number, end_time in rows:
        found[batch_id].append((state, number, end_time))
    return {batch_id: _progress(of_batch) for batch_id, of_batch in found.items()}


def _progress(found: list[tuple[CommandState, int, datetime | None]]) -> BatchProgress:
    found.sort(key=lambda each: _ORDER.index(each[0]))
    ended = all(state in FINAL_STATES for state, _, _ in found)
    times = [time for _, _, time in found if time is not None]
    return BatchProgress(
        counts=[(state, number) for state, number, _ in found],
        end_time=max(times, default=None) if ended else None,
    )


async def list_batches(
    connection: AsyncConnection, *, page_size: int, page_token: str
) -> tuple[list[BatchRecord], str]:
    """A page of the batches, newest first, and the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    own = command_batches.c
    keys = (SortKey(own.create_time, descending=True), SortKey(own.batch_id))
    asked = page(page_size, page_token, "command_batches")
    rows, next_page_token = await asked.read(connection, select(*_RECORD), keys)
    return [BatchRecord(*row) for row in rows], next_page_token


async def cancel(
    connection: AsyncConnection, batch_id: str, *, actor: str, reason: str
) -> list[ChangedCommand]:
    """Cancels what has not ended of a batch; says which commands changed. Until the transaction
    ends nothing of the batch is released.
    """
    own = command_batches.c
    await connection.execute(
        update(command_batches)
        .where(own.batch_id == batch_id)
        .values(
            cancel_time=func.coalesce(own.cancel_time, func.now()),
            cancel_reason=func.coalesce(func.nullif(own.cancel_reason, ""), reason),
            holding=False,
        )
    )
    open_ids = await connection.execute(
        select(commands.c.command_id).where(
            commands.c.batch_id == batch_id, commands.c.state.not_in(FINAL_STATES)
        )
    )
    return await changes.cancel_commands(
        await driver(connection), list(open_ids.scalars()), actor=actor, reason=reason
    )


# ---- releasing

_LOCK_HOLDING = """
SELECT batch_id FROM command_batches
WHERE holding AND (%(all)s OR batch_id = ANY (%(batch_ids)s::uuid[]))
ORDER BY batch_id
FOR NO KEY UPDATE
"""

# A command that was released and whose neuron went away before it was sent gives its place back.
_HOLD_AGAIN = f"""
UPDATE commands c SET held = true
FROM neuron_states s
WHERE c.batch_id = ANY (%(batch_ids)s::uuid[]) AND c.state = 'QUEUED' AND c.attempt = 0
  AND NOT c.held AND s.neuron_id = c.neuron_id AND NOT coalesce({CONNECTED}, false)
"""

_RELEASE = f"""
WITH room AS (
    SELECT b.batch_id, b.max_in_flight - (
        SELECT count(*) FROM commands c
        WHERE c.batch_id = b.batch_id AND NOT c.held
          AND (c.state IN {states(CommandState.QUEUED)} OR c.state IN {IN_FLIGHT})
    ) AS free
    FROM command_batches b WHERE b.batch_id = ANY (%(batch_ids)s::uuid[])
), picked AS (
    SELECT c.command_id, c.server_id
    FROM room r
    CROSS JOIN LATERAL (
        SELECT c.command_id, s.server_id
        FROM commands c JOIN neuron_states s USING (neuron_id)
        WHERE c.batch_id = r.batch_id AND c.held AND c.state = 'QUEUED' AND {CONNECTED}
        ORDER BY c.neuron_id LIMIT greatest(r.free, 0)
    ) c
)
UPDATE commands c SET held = false
FROM picked WHERE c.command_id = picked.command_id AND c.state = 'QUEUED'
RETURNING c.neuron_id, picked.server_id
"""

_ALL_RELEASED = b"""
UPDATE command_batches b SET holding = false
WHERE b.batch_id = ANY (%(batch_ids)s::uuid[]) AND NOT EXISTS (
    SELECT FROM commands c
    WHERE c.batch_id = b.batch_id AND c.state = 'QUEUED' AND (c.held OR c.attempt = 0))
"""


async def release(
    connection: Connection, batch_ids: Collection[str] | None = None, *, wait: bool = False
) -> list[tuple[str, str]]:
    """Releases as many commands of those batches (None: of all) as there is room for, to neurons
    that are connected. Returns their neurons, each with the server that holds its stream.

    A batch of which somebody else releases commands at the moment is left out, unless `wait`.
    """
    async with connection.transaction():
        cursor = await connection.execute(
            (_LOCK_HOLDING if wait else f"{_LOCK_HOLDING} SKIP LOCKED").encode(),
            {"all": batch_ids is None, "batch_ids": list(batch_ids or ())},
        )
        locked = [batch_id for (batch_id,) in await cursor.fetchall()]
        if not locked:
            return []
        # Statements of their own: each sees what was committed before the lock was taken.
        await connection.execute(_HOLD_AGAIN.encode(), {"batch_ids": locked})
        cursor = await connection.execute(_RELEASE.encode(), {"batch_ids": locked})
        released: list[tuple[str, str]] = await cursor.fetchall()
        await connection.execute(_ALL_RELEASED, {"batch_ids": locked})
    return released
