"""Changes of commands that their neurons have, or may have: one way for all of them.

The commands' rows are locked, the domain's rules decide what becomes of each, and what comes of
them all is written by one statement, with their transitions. Who changes them, and why, is the
caller's: neurons (`ingest`), timers (`timers`), operators (`cancel_commands`).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import orjson

from federation_server.domain.command import (
    IN_FLIGHT_STATES,
    CommandState,
    Entry,
    Execution,
    cancel,
)
from federation_server.store.database import Connection
from federation_server.store.pipeline import Pipeline, pipeline


class ChangedCommand(NamedTuple):
    """A command that has been changed."""

    command_id: str
    neuron_id: str
    state: CommandState
    to_cancel: bool
    """Its neuron is to give an attempt of it up."""
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
    answered: bool = False
    """Its neuron has said how the attempt ended that it was to give up."""

    def become(self, after: Entry, actor: str) -> None:
        """Takes a change over."""
        if after.state is not self.entry.state:
            self.passed.append(Change(after.state, actor, after.state_reason))
        self.entry = after
        self.changed = True

    def answer(self) -> None:
        """Its neuron need not be told any more to give an attempt up."""
        self.entry = replace(self.entry, cancel_attempt=None)
        self.answered = True

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
SELECT {_ENTRY} FROM commands WHERE command_id = ANY ($1::uuid[])
ORDER BY command_id
FOR NO KEY UPDATE
""".encode()

# Progress and results are replaced where the change brings them. What an attempt left behind
# (error, log) stays until the next attempt begins, which the dispatcher's claim writes.
_SAVE = b"""
WITH b AS MATERIALIZED (
    SELECT * FROM json_to_recordset($1::json) AS b (
        command_id uuid, attempt int8, revision int8, passed json, state text, state_reason text,
        next_attempt_time timestamptz, cancel_attempt int8, cancelled bool, accepted bool,
        started bool, final bool, fraction float8, message text, checkpoint jsonb, response jsonb,
        error_code text, error_message text, error_details jsonb, log_tail text, run_s float8)
), changed AS (
    UPDATE commands c SET
        state = b.state::command_state,
        state_reason = b.state_reason,
        revision = b.revision + greatest(1, json_array_length(b.passed)),
        next_attempt_time = b.next_attempt_time,
        cancel_attempt = b.cancel_attempt,
        cancel_epoch = CASE WHEN b.cancel_attempt IS DISTINCT FROM c.cancel_attempt THEN NULL
                            ELSE c.cancel_epoch END,
        cancel_time = CASE WHEN b.cancelled THEN now() ELSE c.cancel_time END,
        accept_time = CASE WHEN b.accepted THEN coalesce(c.accept_time, now())
                           ELSE c.accept_time END,
        start_time = CASE WHEN b.started THEN coalesce(c.start_time, now()) ELSE c.start_time END,
        end_time = CASE WHEN b.final THEN now() END,
        progress_fraction = coalesce(b.fraction, c.progress_fraction),
        progress_message = coalesce(b.message, c.progress_message),
        progress_time = CASE WHEN b.fraction IS NULL THEN c.progress_time ELSE now() END,
        checkpoint = coalesce(b.checkpoint, c.checkpoint),
        response = b.response,
        error_code = b.error_code,
        error_message = b.error_message,
        error_details = b.error_details,
        log_tail = b.log_tail,
        run_duration = b.run_s * interval '1 s'
    FROM b WHERE c.command_id = b.command_id
    RETURNING c.command_id, extract(epoch FROM c.end_time - c.create_time)::float8, c.batch_id
), noted AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT b.command_id, b.revision + p.number, (p.change ->> 'state')::command_state, now(),
        b.attempt, p.change ->> 'actor', p.change ->> 'reason'
    FROM b CROSS JOIN json_array_elements(b.passed) WITH ORDINALITY AS p (change, number)
)
SELECT command_id::text, extract, batch_id::text FROM changed
"""

# No change of the command: nobody who reads it sees a difference.
_ANSWERED = b"""
UPDATE commands SET cancel_attempt = NULL, cancel_epoch = NULL
WHERE command_id = ANY ($1::uuid[])
"""


def is_command_id(text: str) -> bool:
    """Whether a text can be a command's id at all."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


async def lock(connection: Connection, command_ids: Iterable[str]) -> dict[str, Row]:
    """Those of the commands that there are, locked until the transaction ends."""
    async with pipeline(connection) as send:
        return await lock_later(send, command_ids)()


def lock_later(
    send: Pipeline, command_ids: Iterable[str]
) -> Callable[[], Awaitable[dict[str, Row]]]:
    """The same: asks now, and gives the rows when called."""
    known = sorted({command_id for command_id in command_ids if is_command_id(command_id)})
    answer = send(_LOCK, known) if known else None

    async def locked() -> dict[str, Row]:
        return {row[0]: _row(row) for row in (await answer if answer is not None else ())}

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
    async with pipeline(connection) as send:
        return await save_later(send, rows)()


def save_later(
    send: Pipeline, rows: Iterable[Row]
) -> Callable[[], Awaitable[list[ChangedCommand]]]:
    """The same: writes now, and says which when called."""
    rows = list(rows)
    if answered := [row.entry.command_id for row in rows if row.answered and not row.changed]:
        send(_ANSWERED, answered)
    changed = [row for row in rows if row.changed]
    values = orjson.dumps([_values(row) for row in changed]).decode()
    answer = send(_SAVE, values) if changed else None

    async def saved() -> list[ChangedCommand]:
        answers = await answer if answer is not None else ()
        written = {command_id: rest for command_id, *rest in answers}
        return [
            ChangedCommand(
                entry.command_id,
                entry.neuron_id,
                entry.state,
                entry.cancel_attempt is not None,
                *written[entry.command_id],
            )
            for entry in (row.entry for row in changed)
        ]

    return saved


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


def _values(row: Row) -> dict[str, Any]:
    """What `_SAVE` reads of a row."""
    entry = row.entry
    values: dict[str, Any] = {
        "command_id": entry.command_id,
        "attempt": entry.attempt,
        "revision": row.revision,
        "passed": row.passed,
        "state": entry.state,
        "state_reason": entry.state_reason,
        "next_attempt_time": entry.next_attempt_time,
        "cancel_attempt": entry.cancel_attempt,
        "cancelled": row.passed_through(CommandState.CANCELLING),
        "accepted": row.passed_through(CommandState.ACCEPTED),
        "started": row.passed_through(CommandState.RUNNING),
        "final": entry.final,
        "fraction": entry.fraction,
        "message": entry.message,
        "checkpoint": entry.checkpoint,
        "log_tail": "",
    }
    if (finished := entry.finished) is not None:
        values["response"] = finished.response
        values["log_tail"] = finished.log_tail
        if finished.run_duration is not None:
            values["run_s"] = finished.run_duration.total_seconds()
        if (error := finished.error) is not None:
            values["error_code"] = error.code
            values["error_message"] = error.message
            values["error_details"] = error.details
    return values
