"""The ledger in the store: issuing, reading, and what the dispatcher takes from it.

The updates that neurons send are applied by `ingest_commands`. Every change raises the command's
`revision` and, where its state changes, leaves a row in `command_transitions`.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, insert, select
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.command import FINAL_STATES, CommandState
from federation_server.domain.neuron import JsonObject, Lifecycle
from federation_server.store.database import Connection
from federation_server.store.schema import (
    command_transitions,
    commands,
    neuron_states,
    neurons,
)


@dataclass(frozen=True, slots=True)
class CommandTransition:
    """One change of a command's state."""

    revision: int
    state: CommandState
    transition_time: datetime
    attempt: int
    actor: str
    reason: str


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """A command as the ledger holds it; the fields are those of the table."""

    command_id: str
    neuron_id: str
    issuer: str
    type: str
    data: JsonObject
    priority: int
    not_before_time: datetime | None
    expire_time: datetime
    run_timeout: timedelta | None
    state: CommandState
    state_reason: str
    attempt: int
    revision: int
    progress_fraction: float | None
    progress_message: str | None
    progress_time: datetime | None
    response: JsonObject | None
    error_code: str | None
    error_message: str | None
    error_details: JsonObject | None
    log_tail: str
    run_duration: timedelta | None
    create_time: datetime
    send_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None

    @property
    def final(self) -> bool:
        """True once nothing can change it any more."""
        return self.state in FINAL_STATES


RECORD_COLUMNS = tuple(commands.c[name] for name in CommandRecord.__slots__)


@dataclass(frozen=True, slots=True)
class NewCommand:
    """A command about to be issued."""

    neuron_id: str
    issuer: str
    request_id: str | None
    request_hash: bytes
    type: str
    data: JsonObject
    control: bool
    priority: int
    not_before_time: datetime | None
    expire_time: datetime
    run_timeout: timedelta | None


@dataclass(frozen=True, slots=True)
class Target:
    """What issuing needs to know of the neuron."""

    lifecycle: Lifecycle
    command_types: Sequence[JsonObject]
    server_id: str | None
    """The server that holds its stream, if one does."""


async def target(connection: AsyncConnection, neuron_id: str) -> Target | None:
    """The neuron that a command is for; it cannot be deleted before the transaction ends."""
    row = (
        await connection.execute(
            select(
                neurons.c.lifecycle,
                neurons.c.command_types,
                neuron_states.c.session_open,
                neuron_states.c.server_id,
            )
            .join(neuron_states, neuron_states.c.neuron_id == neurons.c.neuron_id)
            .where(neurons.c.neuron_id == neuron_id)
            .with_for_update(key_share=True, read=True, of=neurons)
        )
    ).one_or_none()
    if row is None:
        return None
    return Target(row.lifecycle, row.command_types, row.server_id if row.session_open else None)


async def find_request(
    connection: AsyncConnection, issuer: str, request_id: str | None
) -> tuple[CommandRecord, bytes] | None:
    """The command that its issuer made with that request_id, and the hash of that request."""
    if not request_id:
        return None
    stored = commands.c
    row = (
        await connection.execute(
            select(*RECORD_COLUMNS, stored.request_hash).where(
                stored.issuer == issuer, stored.request_id == request_id
            )
        )
    ).one_or_none()
    return None if row is None else (_record(row), row.request_hash)


async def insert_command(connection: AsyncConnection, new: NewCommand) -> CommandRecord | None:
    """Puts a command into the ledger; None if its issuer has used its request_id before."""
    values: dict[str, Any] = {name: getattr(new, name) for name in NewCommand.__slots__}
    made = (
        await connection.execute(
            pg_insert(commands)
            .values(
                command_id=str(uuid.uuid4()),
                state=CommandState.QUEUED,
                create_time=func.now(),
                **values,
            )
            .on_conflict_do_nothing(index_elements=["issuer", "request_id"])
            .returning(*RECORD_COLUMNS)
        )
    ).one_or_none()
    if made is None:
        return None
    record = _record(made)
    await connection.execute(
        insert(command_transitions).values(
            command_id=record.command_id,
            revision=record.revision,
            state=record.state,
            transition_time=record.create_time,
            attempt=0,
            actor=f"admin:{new.issuer}",
            reason="",
        )
    )
    return record


def preview(new: NewCommand, now: datetime) -> CommandRecord:
    """The command that `insert_command` would make, without an id."""
    issued = {name: getattr(new, name) for name in NewCommand.__slots__}
    for name in ("request_id", "request_hash", "control"):
        del issued[name]
    return CommandRecord(
        command_id="",
        state=CommandState.QUEUED,
        state_reason="",
        attempt=0,
        revision=0,
        progress_fraction=None,
        progress_message=None,
        progress_time=None,
        response=None,
        error_code=None,
        error_message=None,
        error_details=None,
        log_tail="",
        run_duration=None,
        create_time=now,
        send_time=None,
        start_time=None,
        end_time=None,
        **issued,
    )


async def get(connection: AsyncConnection, command_id: str) -> CommandRecord | None:
    """One command."""
    row = (
        await connection.execute(select(*RECORD_COLUMNS).where(commands.c.command_id == command_id))
    ).one_or_none()
    return None if row is None else _record(row)


async def transitions(
    connection: AsyncConnection, record: CommandRecord, *, after: int = 0
) -> list[CommandTransition]:
    """A command's changes of state beyond a revision, oldest first, and up to where the record
    shows it: it may have gone on since that was read.
    """
    names = CommandTransition.__slots__
    rows = await connection.execute(
        select(*(command_transitions.c[name] for name in names))
        .where(
            and_(
                command_transitions.c.command_id == record.command_id,
                command_transitions.c.revision > after,
                command_transitions.c.revision <= record.revision,
            )
        )
        .order_by(command_transitions.c.revision)
    )
    return [CommandTransition(*row) for row in rows]


def _record(row: Sequence[Any]) -> CommandRecord:
    return CommandRecord(*row[: len(RECORD_COLUMNS)])


@dataclass(frozen=True, slots=True)
class ClaimedCommand:
    """A command that this server is to write to its neuron's stream."""

    command_id: str
    neuron_id: str
    session_epoch: int
    attempt: int
    type: str
    data: JsonObject
    priority: int
    run_timeout: timedelta | None
    expire_after: timedelta
    again: bool
    """It was sent before, on an earlier session, and its fate is unknown."""


# Two kinds of commands are taken: what waits and has a place (control commands need none), and
# what is in flight since an earlier session and was not named in this one's Hello. The latter is
# sent again with the same attempt; the neuron's journal answers for it. A command whose session
# is superseded meanwhile is found again by the next one. To a doubtful session goes also what was
# marked SENT for that very session: the answer to an earlier claim was lost.
_CLAIM = b"""
WITH place AS (
    SELECT s.neuron_id, s.session_epoch, w.doubtful,
        n.max_concurrent_commands - (
            SELECT count(*) FROM commands c
            WHERE c.neuron_id = s.neuron_id AND NOT c.control
              AND c.state IN ('SENT', 'ACCEPTED', 'RUNNING', 'CANCELLING')
        ) AS free
    FROM unnest(%(neuron_ids)s::text[], %(epochs)s::int8[], %(doubtful)s::bool[])
         AS w (neuron_id, epoch, doubtful)
    JOIN neuron_states s ON s.neuron_id = w.neuron_id AND s.session_epoch = w.epoch
    JOIN neurons n ON n.neuron_id = s.neuron_id
    WHERE s.session_open
), picked AS (
    SELECT p.session_epoch, c.command_id, c.state
    FROM place p
    CROSS JOIN LATERAL (
        (SELECT command_id, state FROM commands
         WHERE neuron_id = p.neuron_id AND control AND state = 'QUEUED'
           AND (not_before_time IS NULL OR not_before_time <= now()) AND expire_time > now()
         ORDER BY priority DESC, create_time LIMIT 16)
        UNION ALL
        (SELECT command_id, state FROM commands
         WHERE neuron_id = p.neuron_id AND NOT control AND state = 'QUEUED'
           AND (not_before_time IS NULL OR not_before_time <= now()) AND expire_time > now()
         ORDER BY priority DESC, create_time LIMIT greatest(p.free, 0))
        UNION ALL
        (SELECT command_id, state FROM commands
         WHERE neuron_id = p.neuron_id
           AND (session_epoch < p.session_epoch OR (p.doubtful AND state = 'SENT'))
           AND state IN ('SENT', 'ACCEPTED', 'RUNNING', 'CANCELLING')
         ORDER BY priority DESC, create_time)
    ) c
), claimed AS (
    UPDATE commands c SET
        state = CASE WHEN c.state = 'QUEUED' THEN 'SENT' ELSE c.state END,
        attempt = CASE WHEN c.state = 'QUEUED' THEN c.attempt + 1 ELSE c.attempt END,
        session_epoch = picked.session_epoch,
        send_time = now(),
        state_reason = CASE WHEN c.state = 'QUEUED' THEN '' ELSE 'sent again to a new session' END,
        revision = c.revision + 1
    FROM picked
    WHERE c.command_id = picked.command_id AND c.state = picked.state
    RETURNING c.*, picked.state <> 'QUEUED' AS again
), logged AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT command_id, revision, state, now(), attempt, 'server:' || %(server_id)s, ''
    FROM claimed WHERE NOT again
)
SELECT command_id::text, neuron_id, session_epoch, attempt, type, data, priority, run_timeout,
       expire_time - now(), again
FROM claimed
ORDER BY neuron_id, again DESC, control DESC, priority DESC, create_time
"""


async def claim(
    connection: Connection,
    server_id: str,
    sessions: Sequence[tuple[str, int]],
    *,
    doubtful: Collection[tuple[str, int]] = (),
) -> list[ClaimedCommand]:
    """Takes what those sessions (neuron_id, epoch) of this server are to be sent now, and marks
    it SENT. One statement: what it returns is committed. `doubtful` are those of them for which the
    answer to an earlier claim was lost.
    """
    cursor = await connection.execute(
        _CLAIM,
        {
            "server_id": server_id,
            "neuron_ids": [neuron_id for neuron_id, _ in sessions],
            "epochs": [epoch for _, epoch in sessions],
            "doubtful": [session in doubtful for session in sessions],
        },
    )
    return [ClaimedCommand(*row) for row in await cursor.fetchall()]


_WAITING = b"""
SELECT DISTINCT c.neuron_id
FROM commands c JOIN neuron_states s USING (neuron_id)
WHERE s.session_open AND s.server_id = %(server_id)s
  AND ((c.state = 'QUEUED' AND (c.not_before_time IS NULL OR c.not_before_time <= now()))
       OR (c.state IN ('SENT', 'ACCEPTED', 'RUNNING', 'CANCELLING')
           AND c.session_epoch < s.session_epoch))
"""


async def neurons_with_work(connection: Connection, server_id: str) -> list[str]:
    """The neurons with a stream on this server for which something waits: what hints missed, and
    what had to wait for its time.
    """
    cursor = await connection.execute(_WAITING, {"server_id": server_id})
    return [neuron_id for (neuron_id,) in await cursor.fetchall()]


_EXPIRE = b"""
WITH over AS (
    SELECT command_id FROM commands
    WHERE state = 'QUEUED' AND expire_time <= now()
    ORDER BY expire_time LIMIT %(most)s
    FOR NO KEY UPDATE SKIP LOCKED
), expired AS (
    UPDATE commands c SET
        state = 'EXPIRED', state_reason = 'not sent in time', end_time = now(),
        revision = c.revision + 1
    FROM over WHERE c.command_id = over.command_id
    RETURNING c.*
), logged AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT command_id, revision, state, now(), attempt, 'server:' || %(server_id)s, state_reason
    FROM expired
)
SELECT command_id::text FROM expired
"""


async def expire(connection: Connection, server_id: str, *, most: int = 1000) -> list[str]:
    """Ends queued commands whose time is over; returns their ids, at most so many."""
    cursor = await connection.execute(_EXPIRE, {"server_id": server_id, "most": most})
    return [command_id for (command_id,) in await cursor.fetchall()]
