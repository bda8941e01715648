"""Putting commands into the ledger, many at a time."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import orjson

from federation_server.domain.audit import Entry
from federation_server.domain.neuron import JsonObject, Lifecycle
from federation_server.store import audit
from federation_server.store.ledger.commands import (
    CommandRecord,
    NewCommand,
    preview,
    record_of,
    select_list,
)
from federation_server.store.pipeline import Pipeline


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
FROM (SELECT DISTINCT * FROM unnest($1::text[], $2::text[]) AS u (neuron_id, type)) AS w
JOIN neurons n USING (neuron_id)
JOIN neuron_states s USING (neuron_id)
ORDER BY n.neuron_id
FOR KEY SHARE OF n
"""

_KNOWN = f"""
SELECT c.issuer, c.request_id, c.request_hash, {select_list("c")}
FROM unnest($1::text[], $2::text[]) AS w (issuer, request_id)
JOIN commands c ON c.issuer = w.issuer AND c.request_id = w.request_id
""".encode()

_COLUMNS = (
    "neuron_id",
    "issuer",
    "request_id",
    "type",
    "data",
    "control",
    "priority",
    "not_before_time",
    "expire_time",
    "execution",
    "max_attempts",
    "allow_unadvertised",
    "retry_of_command_id",
)
_SPANS = ("accept_timeout", "run_timeout", "progress_timeout", "retry_backoff")

_INSERT = f"""
WITH made AS (
    INSERT INTO commands (command_id, request_hash, state, create_time,
        {", ".join(_COLUMNS)}, {", ".join(_SPANS)})
    SELECT command_id, decode(request_hash, 'hex'), 'QUEUED', now(),
        {", ".join(_COLUMNS)}, {", ".join(f"{name} * interval '1 s'" for name in _SPANS)}
    FROM json_to_recordset($1::json) AS b (command_id uuid, request_hash text, neuron_id text,
        issuer text, request_id text, type text, data jsonb, control bool, priority int2,
        not_before_time timestamptz, expire_time timestamptz, execution execution,
        max_attempts int4, allow_unadvertised bool, retry_of_command_id uuid,
        {", ".join(f"{name} float8" for name in _SPANS)})
    ON CONFLICT (issuer, request_id) DO NOTHING
    RETURNING *
), noted AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT command_id, revision, state, create_time, attempt, 'admin:' || issuer, '' FROM made
), audited AS ({audit.INSERT.format("$2")}
    -- IS TRUE: looked up in a hash table. Else it were a join, each with each.
    WHERE (object_id::uuid IN (SELECT command_id FROM made)) IS TRUE
)
SELECT command_id::text FROM made
""".encode()


def targets_later(
    send: Pipeline, wanted: Sequence[tuple[str, str]]
) -> Callable[[], Awaitable[dict[tuple[str, str], Target]]]:
    """For each (neuron_id, command type): the neuron, if there is one. It cannot be deleted before
    the transaction ends. Asks now, and gives them when called.
    """
    answer = send(_TARGETS, [neuron_id for neuron_id, _ in wanted], [kind for _, kind in wanted])

    async def targets() -> dict[tuple[str, str], Target]:
        return {
            (neuron_id, kind): Target(Lifecycle(lifecycle), advertised, server_id, now)
            for neuron_id, kind, lifecycle, advertised, server_id, now in await answer
        }

    return targets


def known_later(
    send: Pipeline, requests: Sequence[tuple[str, str]]
) -> Callable[[], Awaitable[dict[tuple[str, str], Known]]]:
    """Which of the requests (issuer, request_id) have made a command. Asks now, and gives them when
    called.
    """
    columns = [issuer for issuer, _ in requests], [request for _, request in requests]
    answer = send(_KNOWN, *columns) if requests else None

    async def known() -> dict[tuple[str, str], Known]:
        return {
            (issuer, request_id): Known(record_of(row), request_hash)
            for issuer, request_id, request_hash, *row in (
                await answer if answer is not None else ()
            )
        }

    return known


def insert_later(
    send: Pipeline, commands: Sequence[tuple[NewCommand, datetime, Entry]]
) -> Callable[[], Awaitable[list[CommandRecord | None]]]:
    """Puts the commands into the ledger, at the transaction's time, and for each an entry into the
    audit log, whose object it becomes. Asks now, and gives them when called; None for each whose
    issuer has used its request_id before.
    """
    made = [
        replace(preview(new, now), command_id=str(uuid.uuid4()), revision=1)
        for new, now, _ in commands
    ]
    entries = [
        replace(entry, object_id=record.command_id)
        for (_, _, entry), record in zip(commands, made, strict=True)
    ]
    values = [
        {
            "command_id": record.command_id,
            "request_hash": new.request_hash.hex(),
            **{name: getattr(new, name) for name in _COLUMNS},
            **{
                name: span.total_seconds()
                for name in _SPANS
                if (span := getattr(new, name)) is not None
            },
        }
        for (new, _, _), record in zip(commands, made, strict=True)
    ]
    answer = send(_INSERT, orjson.dumps(values).decode(), audit.to_json(entries))

    async def inserted() -> list[CommandRecord | None]:
        if not any(new.request_id for new, _, _ in commands):  # nothing to wait for
            return list(made)
        ids = {command_id for (command_id,) in await answer}
        return [record if record.command_id in ids else None for record in made]

    return inserted
