"""Sessions in the store: opening one, and finding those that are no longer the newest.

Closing is the writer's (`ingest.ClosedItem`), so that it comes after what the session sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.neuron import Lifecycle
from federation_server.store.database import Connection
from federation_server.store.ledger.changes import IN_FLIGHT


@dataclass(frozen=True, slots=True)
class NewSession:
    """What a neuron's Hello says of the session that it wants."""

    neuron_id: str
    generation: int
    session_id: str
    instance_id: str
    sdk_name: str
    sdk_version: str
    spool_id: str
    server_id: str
    peer: str
    backlog_sequence: int
    """The last sequence that the neuron's spool holds; 0 for none."""
    running: Sequence[tuple[str, int]]
    """The commands, with their attempts, that the neuron has accepted and not finished."""


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session that has been opened."""

    epoch: int
    server_time: datetime
    last_sequence: int
    """How far the neuron's spool has been applied."""
    previous_server_id: str | None
    """The server that held the session before, if that was open."""
    astray: Sequence[tuple[str, int]]
    """What the neuron has accepted and not finished, and the ledger does not wait for."""


# What the neuron says is running is at home there: it takes the new epoch, so that the dispatcher
# does not send it again. Reading the spool's mark in the same snapshot may show an older one than
# the fence leaves; the neuron then repeats messages that have no effect. The neuron's row is locked
# first, as everywhere: a deactivation that has just begun is waited for, and then seen.
_OPEN = text(f"""
WITH neuron AS MATERIALIZED (
    SELECT neuron_id FROM neurons
    WHERE neuron_id = :neuron_id AND lifecycle = 'ACTIVE' AND token_generation = :generation
    FOR SHARE
), before AS (
    SELECT s.neuron_id, s.session_open, s.server_id, s.presence
    FROM neuron JOIN neuron_states s USING (neuron_id)
    FOR NO KEY UPDATE OF s
), opened AS (
    UPDATE neuron_states s SET
        session_epoch = s.session_epoch + 1,
        session_id = cast(:session_id AS uuid),
        session_open = true,
        session_open_time = now(),
        session_close_time = NULL,
        lease_duration = NULL,
        lease_expire_time = NULL,
        instance_id = :instance_id,
        sdk_name = :sdk_name,
        sdk_version = :sdk_version,
        server_id = :server_id,
        peer = :peer,
        spool_id = :spool_id,
        backlog_sequence = :backlog_sequence,
        presence = 'ONLINE',
        presence_time = CASE WHEN s.presence <> 'ONLINE' THEN now() ELSE s.presence_time END,
        presence_reason = 'session opened'
    FROM before WHERE s.neuron_id = before.neuron_id
    RETURNING s.session_epoch, before.session_open, before.server_id AS previous_server_id
), named AS (
    SELECT command_id, attempt
    FROM unnest(cast(:command_ids AS uuid[]), cast(:attempts AS int8[])) AS r (command_id, attempt)
), running AS (
    UPDATE commands c SET session_epoch = opened.session_epoch
    FROM opened, named
    WHERE c.command_id = named.command_id AND c.attempt = named.attempt
      AND c.neuron_id = :neuron_id AND c.state IN {IN_FLIGHT}
    RETURNING c.command_id, c.attempt
)
SELECT opened.session_epoch, now(),
       coalesce((SELECT last_sequence FROM spools
                 WHERE neuron_id = :neuron_id AND spool_id = :spool_id), 0),
       CASE WHEN opened.session_open THEN opened.previous_server_id END,
       ARRAY(SELECT command_id::text || ' ' || attempt FROM named
             WHERE (command_id, attempt) NOT IN (SELECT command_id, attempt FROM running))
FROM opened
""")


async def open_session(connection: AsyncConnection, new: NewSession) -> OpenedSession | None:
    """Opens a session that supersedes the neuron's current one.

    Returns None if the neuron may not hold one: it was deleted or deactivated, or its token's
    generation is over.
    """
    row = (
        await connection.execute(
            _OPEN,
            {
                "neuron_id": new.neuron_id,
                "generation": new.generation,
                "session_id": new.session_id,
                "instance_id": new.instance_id,
                "sdk_name": new.sdk_name,
                "sdk_version": new.sdk_version,
                "spool_id": new.spool_id,
                "backlog_sequence": new.backlog_sequence,
                "server_id": new.server_id,
                "peer": new.peer,
                "command_ids": [command_id for command_id, _ in new.running],
                "attempts": [attempt for _, attempt in new.running],
            },
        )
    ).one_or_none()
    if row is None:
        return None
    epoch, server_time, last_sequence, previous_server_id, astray = row
    return OpenedSession(
        epoch, server_time, last_sequence, previous_server_id, [_attempt(each) for each in astray]
    )


def _attempt(text: str) -> tuple[str, int]:
    command_id, _, attempt = text.partition(" ")
    return command_id, int(attempt)


@dataclass(frozen=True, slots=True)
class StaleSession:
    """A session that is not its neuron's newest, or that is closed."""

    neuron_id: str
    newest: bool
    """It is the newest: somebody closed it."""
    lifecycle: Lifecycle | None
    """None: the neuron was deleted."""


_STALE = b"""
SELECT b.neuron_id, coalesce(s.session_epoch = b.epoch, false), n.lifecycle::text
FROM unnest(%s::text[], %s::int8[]) AS b (neuron_id, epoch)
LEFT JOIN neuron_states s USING (neuron_id)
LEFT JOIN neurons n USING (neuron_id)
WHERE s.session_epoch IS DISTINCT FROM b.epoch OR NOT s.session_open
"""


async def stale(connection: Connection, sessions: Sequence[tuple[str, int]]) -> list[StaleSession]:
    """Those of the sessions (neuron_id, epoch) that the store does not have as open."""
    if not sessions:
        return []
    cursor = await connection.execute(
        _STALE, ([neuron_id for neuron_id, _ in sessions], [epoch for _, epoch in sessions])
    )
    return [
        StaleSession(neuron_id, newest, Lifecycle(lifecycle) if lifecycle else None)
        for neuron_id, newest, lifecycle in await cursor.fetchall()
    ]
