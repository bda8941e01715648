"""Changes of commands that their neurons have, or may have: one way for all of them.

The commands' rows are locked, the domain's rules decide what becomes of each, and what comes of
them all is written by one UPDATE and one INSERT of transitions. Who changes them, and why, is the
caller's: neurons (`ingest_commands`), timers (`timers`), operators (`cancel`).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from psycopg import AsyncCursor

from federation_server.domain.command import (
    IN_FLIGHT_STATES,
    CommandState,
    Entry,
    Execution,
    cancel,
)
from federation_server.domain.neuron import JsonObject
from federation_server.store.database import Connection


class ChangedCommand(NamedTuple):
    """A command that has been changed."""

    command_id: str
    neuron_id: str
    state: CommandState
    seconds: float | None
    """From issue to final state; None before."""
    batch_id: str | None
    """The batch that it is part of."""


@dataclass(slots=True)
class Change:
    """A transition: the state it came to, who caused it, and why."""

    state: CommandState
    actor: str
    reason: str


@dataclass(slots=True)
class Row:
    """A locked command: as it is after the changes so far, and what it went through."""

    entry: Entry
    revision: int
    passed: list[Change] = field(default_factory=list)
    changed: bool = False

    def become(self, after: Entry, actor: str) -> None:
        """Takes a change over."""
        if after.state is not self.entry.state:
            self.passed.append(Change(after.state, actor, after.state_reason))
        self.entry = after
        self.changed = True

    def passed_through(self, state: CommandState) -> bool:
        """Whether the changes so far have led to that state."""
        return any(change.state is state for change in self.passed)


def states(*wanted: CommandState) -> str:
    """The states as SQL writes them: `('QUEUED', 'SENT')`."""
    return f"({', '.join(repr(state.value) for state in sorted(wanted))})"


IN_FLIGHT = states(*IN_FLIGHT_STATES)

CONNECTED = "(s.session_open OR s.lease_expire_time > now())"
"""Whether the neuron of a state row `s` can be given commands: by its stream, or when it calls."""

_ENTRY = """
command_id::text, neuron_id, state::text, attempt, execution::text, max_attempts, retry_backoff,
expire_time, state_reason, next_attempt_time, cancel_attempt, revision
"""

_LOCK = f"""
SELECT {_ENTRY} FROM commands WHERE command_id = ANY (%s::uuid[])
ORDER BY command_id
FOR NO KEY UPDATE
"""

# Progress and results are replaced where the change brings them. What an attempt left behind
# (error, log) stays until the next attempt begins, which the dispatcher's claim writes.
_UPDATE = """
UPDATE commands c SET
    state = b.state::command_state,
    state_reason = b.state_reason,
    revision = b.revision,
    next_attempt_time = b.next_attempt_time,
    cancel_attempt = b.cancel_attempt,
    cancel_epoch = CASE WHEN b.cancel_attempt IS DISTINCT FROM c.cancel_attempt THEN NULL
                        ELSE c.cancel_epoch END,
    cancel_time = CASE WHEN b.cancelled THEN now() ELSE c.cancel_time END,
    accept_time = CASE WHEN b.accepted THEN coalesce(c.accept_time, now()) ELSE c.accept_time END,
    start_time = CASE WHEN b.started THEN coalesce(c.start_time, now()) ELSE c.start_time END,
    end_time = CASE WHEN b.final THEN now() END,
    progress_fraction = coalesce(b.fraction, c.progress_fraction),
    progress_message = coalesce(b.message, c.progress_message),
    progress_time = CASE WHEN b.fraction IS NULL THEN c.progress_time ELSE now() END,
    checkpoint = coalesce(b.checkpoint::jsonb, c.checkpoint),
    response = b.response::jsonb,
    error_code = b.error_code,
    error_message = b.error_message,
    error_details = b.error_details::jsonb,
    log_tail = b.log_tail,
    run_duration = b.run_duration
FROM unnest(
    %s::uuid[], %s::text[], %s::text[], %s::int8[], %s::timestamptz[], %s::int8[], %s::bool[],
    %s::bool[], %s::bool[], %s::bool[], %s::float8[], %s::text[], %s::text[], %s::text[],
    %s::text[], %s::text[], %s::text[], %s::text[], %s::interval[]
) AS b (command_id, state, state_reason, revision, next_attempt_time, cancel_attempt, cancelled,
        accepted, started, final, fraction, message, checkpoint, response,
        error_code, error_message, error_details, log_tail, run_duration)
WHERE c.command_id = b.command_id
RETURNING c.command_id::text, extract(epoch FROM c.end_time - c.create_time)::float8,
    c.batch_id::text
"""

_LOG = """
INSERT INTO command_transitions
    (command_id, revision, state, transition_time, attempt, actor, reason)
SELECT command_id, revision, state::command_state, now(), attempt, actor, reason
FROM unnest(%s::uuid[], %s::int8[], %s::text[], %s::int8[], %s::text[], %s::text[])
     AS b (command_id, revision, state, attempt, actor, reason)
"""


def is_command_id(text: str) -> bool:
    """Whether a text can be a command's id at all."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


async def lock(connection: Connection, command_ids: Iterable[str]) -> dict[str, Row]:
    """Those of the commands that there are, locked until the transaction ends."""
    return await (await lock_later(connection, command_ids))()


async def lock_later(
    connection: Connection, command_ids: Iterable[str]
) -> Callable[[], Awaitable[dict[str, Row]]]:
    """The same, in a pipeline: asks now, and gives the rows when called."""
    known = sorted({command_id for command_id in command_ids if is_command_id(command_id)})
    cursor = await connection.execute(_LOCK.encode(), (known,)) if known else None

    async def locked() -> dict[str, Row]:
        rows = await cursor.fetchall() if cursor is not None else ()
        return {row[0]: _row(row) for row in rows}

    return locked


def _row(row: Sequence[Any]) -> Row:
    entry = Entry(
        command_id=row[0],
        neuron_id=row[1],
        state=CommandState(row[2]),
        attempt=row[3],
        execution=Execution(row[4]),
        max_attempts=row[5],
        retry_backoff=row[6],
        expire_time=row[7],
        state_reason=row[8],
        next_attempt_time=row[9],
        cancel_attempt=row[10],
    )
    return Row(entry, row[11])


async def save(connection: Connection, rows: Iterable[Row]) -> list[ChangedCommand]:
    """Writes what has changed of locked commands, and says which."""
    changed = [row for row in rows if row.changed]
    if not changed:
        return []
    cursor = await _update(connection, changed)
    await _log(connection, changed)
    written = {command_id: rest for command_id, *rest in await cursor.fetchall()}
    return [
        ChangedCommand(entry.command_id, entry.neuron_id, entry.state, *written[entry.command_id])
        for entry in (row.entry for row in changed)
    ]


async def cancel_commands(
    connection: Connection, command_ids: Iterable[str], *, actor: str, reason: str
) -> list[ChangedCommand]:
    """Cancels those of the commands that have not ended; says which changed."""
    rows = await lock(connection, command_ids)
    for row in rows.values():
        after = cancel(row.entry, reason)
        if after is not None:
            row.become(after, actor)
    return await save(connection, rows.values())


async def _update(connection: Connection, changed: Sequence[Row]) -> AsyncCursor[tuple[Any, ...]]:
    columns: list[list[Any]] = [[] for _ in range(19)]
    for row in changed:
        entry = row.entry
        finished = entry.finished
        error = finished.error if finished else None
        values = (
            entry.command_id,
            entry.state.value,
            entry.state_reason,
            row.revision + max(1, len(row.passed)),
            entry.next_attempt_time,
            entry.cancel_attempt,
            row.passed_through(CommandState.CANCELLING),
            row.passed_through(CommandState.ACCEPTED),
            row.passed_through(CommandState.RUNNING),
            entry.final,
            entry.fraction,
            entry.message,
            _json(entry.checkpoint),
            _json(finished.response) if finished else None,
            error.code if error else None,
            error.message if error else None,
            _json(error.details) if error else None,
            finished.log_tail if finished else "",
            finished.run_duration if finished else None,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return await connection.execute(_UPDATE.encode(), columns)


async def _log(connection: Connection, changed: Sequence[Row]) -> None:
    columns: list[list[Any]] = [[] for _ in range(6)]
    for row in changed:
        for offset, change in enumerate(row.passed, start=1):
            values = (
                row.entry.command_id,
                row.revision + offset,
                change.state.value,
                row.entry.attempt,
                change.actor,
                change.reason,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    if columns[0]:
        await connection.execute(_LOG.encode(), columns)


def _json(value: JsonObject | None) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
