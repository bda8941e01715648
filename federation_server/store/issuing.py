"""Putting commands into the ledger, many at a time."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import orjson

from federation_server.domain.neuron import JsonObject, Lifecycle
from federation_server.store.commands import (
    CommandRecord,
    NewCommand,
    preview,
    record_of,
    select_list,
)
from federation_server.store.database import Connection


@dataclass(frozen=True, slots=True)
class Target:
    """What issuing needs to know of the neuron that a command is for."""

    lifecycle: Lifecycle
    advertised: JsonObject | None
    """How it advertises the command's type, if it does."""
    server_id: str | None
    """The server that holds its stream, if one does."""
    now: datetime
    """The transaction's time, by PostgreSQL's clock."""


@dataclass(frozen=True, slots=True)
class Known:
    """A command that its issuer has made before, with the same request_id."""

    record: CommandRecord
    request_hash: bytes


_TARGETS = b"""
SELECT n.neuron_id, w.type, n.lifecycle::text,
    jsonb_path_query_first(n.command_types, '$[*] ? (@.type == $type)',
                           jsonb_build_object('type', w.type)),
    CASE WHEN s.session_open THEN s.server_id END, now()
FROM (SELECT DISTINCT * FROM unnest(%s::text[], %s::text[]) AS u (neuron_id, type)) AS w
JOIN neurons n USING (neuron_id)
JOIN neuron_states s USING (neuron_id)
ORDER BY n.neuron_id
FOR KEY SHARE OF n
"""

_KNOWN = f"""
SELECT c.issuer, c.request_id, c.request_hash, {select_list("c")}
FROM unnest(%s::text[], %s::text[]) AS w (issuer, request_id)
JOIN commands c ON c.issuer = w.issuer AND c.request_id = w.request_id
"""

_KINDS = {
    "command_id": "uuid",
    "neuron_id": "text",
    "issuer": "text",
    "request_id": "text",
    "request_hash": "bytea",
    "type": "text",
    "data": "text",
    "control": "bool",
    "priority": "int2",
    "not_before_time": "timestamptz",
    "expire_time": "timestamptz",
    "accept_timeout": "interval",
    "run_timeout": "interval",
    "progress_timeout": "interval",
    "execution": "text",
    "max_attempts": "int4",
    "retry_backoff": "interval",
    "allow_unadvertised": "bool",
    "retry_of_command_id": "uuid",
}
_CASTS = {"data": "data::jsonb", "execution": "execution::execution"}

_INSERT = f"""
WITH made AS (
    INSERT INTO commands ({", ".join(_KINDS)}, state, create_time)
    SELECT {", ".join(_CASTS.get(name, name) for name in _KINDS)}, 'QUEUED', now()
    FROM unnest({", ".join(f"%s::{kind}[]" for kind in _KINDS.values())})
         AS b ({", ".join(_KINDS)})
    ON CONFLICT (issuer, request_id) DO NOTHING
    RETURNING *
), noted AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT command_id, revision, state, create_time, attempt, 'admin:' || issuer, '' FROM made
)
SELECT command_id::text FROM made
"""


async def targets(
    connection: Connection, wanted: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Target]:
    """For each (neuron_id, command type): the neuron, if there is one. It cannot be deleted before
    the transaction ends.
    """
    cursor = await connection.execute(
        _TARGETS, ([neuron_id for neuron_id, _ in wanted], [kind for _, kind in wanted])
    )
    return {
        (neuron_id, kind): Target(Lifecycle(lifecycle), advertised, server_id, now)
        for neuron_id, kind, lifecycle, advertised, server_id, now in await cursor.fetchall()
    }


async def known(
    connection: Connection, requests: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Known]:
    """Which of the requests (issuer, request_id) have made a command."""
    if not requests:
        return {}
    cursor = await connection.execute(
        _KNOWN.encode(), ([issuer for issuer, _ in requests], [request for _, request in requests])
    )
    return {
        (issuer, request_id): Known(record_of(row), request_hash)
        for issuer, request_id, request_hash, *row in await cursor.fetchall()
    }


async def insert(
    connection: Connection, commands: Sequence[tuple[NewCommand, datetime]]
) -> list[CommandRecord | None]:
    """Puts the commands into the ledger, at the transaction's time; None for each whose issuer has
    used its request_id before.
    """
    made = [
        replace(preview(new, now), command_id=str(uuid.uuid4()), revision=1)
        for new, now in commands
    ]
    columns: list[list[Any]] = [[] for _ in _KINDS]
    for (new, _), record in zip(commands, made, strict=True):
        for column, name in zip(columns, _KINDS, strict=True):
            match name:
                case "command_id":
                    column.append(record.command_id)
                case "data":
                    column.append(orjson.dumps(new.data).decode())
                case _:
                    column.append(getattr(new, name))
    cursor = await connection.execute(_INSERT.encode(), columns)
    inserted = {command_id for (command_id,) in await cursor.fetchall()}
    return [record if record.command_id in inserted else None for record in made]
