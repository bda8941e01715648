"""What neurons say of their commands, written inside the transaction of `ingest.apply`.

The commands' rows are locked, the domain's table decides each update in turn, and what comes of
them all is written by one UPDATE and one INSERT of transitions.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from federation_server.domain.command import CommandProgress, CommandState, CommandUpdate, apply
from federation_server.domain.neuron import JsonObject
from federation_server.store.database import Connection


class ChangedCommand(NamedTuple):
    """A command that a batch has changed."""

    command_id: str
    neuron_id: str
    state: CommandState
    seconds: float | None
    """From issue to final state; None before."""


@dataclass(slots=True)
class _Row:
    """A locked command: as it was, as it is after the updates so far, and what it went through."""

    now: CommandProgress
    revision: int
    passed: list[CommandState]
    progressed: bool = False


_LOCK = """
SELECT command_id::text, neuron_id, state::text, attempt, revision
FROM commands WHERE command_id = ANY (%s::uuid[])
ORDER BY command_id
FOR NO KEY UPDATE
"""

_UPDATE = """
UPDATE commands c SET
    state = b.state::command_state,
    state_reason = '',
    revision = b.revision,
    accept_time = CASE WHEN b.accepted THEN coalesce(c.accept_time, now()) ELSE c.accept_time END,
    start_time = CASE WHEN b.started THEN coalesce(c.start_time, now()) ELSE c.start_time END,
    end_time = CASE WHEN b.final THEN now() ELSE c.end_time END,
    progress_fraction = coalesce(b.fraction, c.progress_fraction),
    progress_message = coalesce(b.message, c.progress_message),
    progress_time = CASE WHEN b.progressed THEN now() ELSE c.progress_time END,
    response = b.response::jsonb,
    error_code = b.error_code,
    error_message = b.error_message,
    error_details = b.error_details::jsonb,
    log_tail = b.log_tail,
    run_duration = b.run_duration
FROM unnest(
    %s::uuid[], %s::text[], %s::int8[], %s::bool[], %s::bool[], %s::bool[], %s::bool[],
    %s::float8[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
    %s::interval[]
) AS b (command_id, state, revision, accepted, started, final, progressed, fraction, message,
        response, error_code, error_message, error_details, log_tail, run_duration)
WHERE c.command_id = b.command_id
RETURNING c.command_id::text, extract(epoch FROM c.end_time - c.create_time)::float8
"""

_TRANSITIONS = """
INSERT INTO command_transitions
    (command_id, revision, state, transition_time, attempt, actor, reason)
SELECT command_id, revision, state::command_state, now(), attempt, actor, reason
FROM unnest(%s::uuid[], %s::int8[], %s::text[], %s::int8[], %s::text[], %s::text[])
     AS b (command_id, revision, state, attempt, actor, reason)
"""


async def write(
    connection: Connection, updates: Sequence[tuple[str, CommandUpdate]]
) -> list[ChangedCommand]:
    """Applies each neuron's updates in order; says which commands changed.

    An update for an unknown command, for another neuron's, of another attempt, or backwards,
    changes nothing.
    """
    rows = await _lock(connection, {update.command_id for _, update in updates})
    for neuron_id, update in updates:
        row = rows.get(update.command_id)
        if row is not None and row.now.neuron_id == neuron_id:
            _advance(row, update)
    changed = [row for row in rows.values() if row.passed or row.progressed]
    if not changed:
        return []
    seconds = await _update(connection, changed)
    await _log(connection, changed)
    return [
        ChangedCommand(
            row.now.command_id, row.now.neuron_id, row.now.state, seconds[row.now.command_id]
        )
        for row in changed
    ]


def is_command_id(text: str) -> bool:
    """Whether a text can be a command's id at all."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


async def _lock(connection: Connection, command_ids: set[str]) -> dict[str, _Row]:
    known = [command_id for command_id in command_ids if is_command_id(command_id)]
    cursor = await connection.execute(_LOCK.encode(), (known,))
    return {
        command_id: _Row(
            CommandProgress(command_id, neuron_id, CommandState(state), attempt), revision, []
        )
        for command_id, neuron_id, state, attempt, revision in await cursor.fetchall()
    }


def _advance(row: _Row, update: CommandUpdate) -> None:
    after = apply(row.now, update)
    if after is None:
        return
    if after.state is not row.now.state:
        row.passed.append(after.state)
    else:
        row.progressed = True
    row.now = after


async def _update(connection: Connection, changed: Sequence[_Row]) -> dict[str, float | None]:
    columns: list[list[Any]] = [[] for _ in range(15)]
    for row in changed:
        finished = row.now.finished
        error = finished.error if finished else None
        values = (
            row.now.command_id,
            row.now.state.value,
            row.revision + max(1, len(row.passed)),
            CommandState.ACCEPTED in row.passed,
            CommandState.RUNNING in row.passed,
            row.now.final,
            row.now.fraction is not None,
            row.now.fraction,
            row.now.message,
            _json(finished.response) if finished else None,
            error.code if error else None,
            error.message if error else None,
            _json(error.details) if error else None,
            finished.log_tail if finished else "",
            finished.run_duration if finished else None,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    cursor = await connection.execute(_UPDATE.encode(), columns)
    return dict(await cursor.fetchall())


async def _log(connection: Connection, changed: Sequence[_Row]) -> None:
    columns: list[list[Any]] = [[] for _ in range(6)]
    for row in changed:
        for offset, state in enumerate(row.passed, start=1):
            error = row.now.finished.error if row.now.final and row.now.finished else None
            reason = f"{error.code}: {error.message}" if error and state is row.now.state else ""
            actor = f"neuron:{row.now.neuron_id}"
            values = (
                row.now.command_id,
                row.revision + offset,
                state.value,
                row.now.attempt,
                actor,
                reason,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    if columns[0]:
        await connection.execute(_TRANSITIONS.encode(), columns)


def _json(value: JsonObject | None) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
