"""Sessions in the store: opening them, and finding those that are no longer the newest.

Closing is the writer's (`ingest.ClosedItem`), so that it comes after what the session sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from federation_server.domain.neuron import Lifecycle
from federation_server.store.database import Connection
from federation_server.store.ledger.changes import IN_FLIGHT
from federation_server.store.pipeline import Pipeline


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
    heartbeat_timeout: timedelta
    """How long the neuron may be silent until it is SUSPECT; for twice as long, until OFFLINE."""
    astray: Sequence[tuple[str, int]]
    """What the neuron has accepted and not finished, and the ledger does not wait for."""


@dataclass(frozen=True, slots=True)
class Busy:
    """The neuron's state is being changed: it is to be asked for again."""


# What the neuron says is running is at home there: it takes the new epoch, so that the dispatcher
# does not send it again. Reading the spool's mark in the same snapshot may show an older one than
# the fence leaves; the neuron then repeats messages that have no effect. The neurons' rows are
# locked first, as everywhere. No neuron is waited for: one that is being deactivated, deleted or
# written would hold up all the others. It is busy, and asked for again.
_OPEN = f"""
WITH asked AS (
    SELECT * FROM unnest($2::text[], $3::int8[], $4::uuid[], $5::text[], $6::text[], $7::text[],
                         $8::text[], $9::text[], $10::int8[])
        AS a (neuron_id, generation, session_id, instance_id, sdk_name, sdk_version,
              spool_id, peer, backlog_sequence)
), neuron AS MATERIALIZED (
    SELECT n.neuron_id
    FROM asked a JOIN neurons n USING (neuron_id)
    WHERE n.lifecycle = 'ACTIVE' AND n.token_generation <= a.generation
    FOR NO KEY UPDATE OF n SKIP LOCKED
), used AS (
    UPDATE neurons n SET token_generation = a.generation
    FROM neuron JOIN asked a USING (neuron_id)
    WHERE n.neuron_id = neuron.neuron_id AND n.token_generation < a.generation
), before AS (
    SELECT s.neuron_id, s.session_open, s.server_id
    FROM neuron JOIN neuron_states s USING (neuron_id)
    FOR NO KEY UPDATE OF s SKIP LOCKED
), opened AS (
    UPDATE neuron_states s SET
        session_epoch = s.session_epoch + 1,
        session_id = a.session_id,
        session_open = true,
        session_open_time = now(),
        session_close_time = NULL,
        lease_duration = NULL,
        lease_expire_time = NULL,
        instance_id = a.instance_id,
        sdk_name = a.sdk_name,
        sdk_version = a.sdk_version,
        server_id = $1::text,
        peer = a.peer,
        spool_id = a.spool_id,
        backlog_sequence = a.backlog_sequence,
        presence = 'ONLINE',
        presence_time = CASE WHEN s.presence <> 'ONLINE' THEN now() ELSE s.presence_time END,
        presence_reason = 'session opened'
    FROM before JOIN asked a USING (neuron_id)
    WHERE s.neuron_id = before.neuron_id
    RETURNING s.neuron_id, s.session_epoch, s.heartbeat_timeout,
        CASE WHEN before.session_open THEN before.server_id END AS previous_server_id
), named AS (
    SELECT * FROM unnest($11::text[], $12::uuid[], $13::int8[])
        AS r (neuron_id, command_id, attempt)
), expected AS MATERIALIZED (
    SELECT c.command_id, c.attempt, o.session_epoch
    FROM named r JOIN opened o USING (neuron_id)
    JOIN commands c USING (neuron_id, command_id, attempt)
    WHERE c.state IN {IN_FLIGHT}
    ORDER BY c.command_id
    FOR NO KEY UPDATE OF c
), running AS (
    UPDATE commands c SET session_epoch = e.session_epoch
    FROM expected e WHERE c.command_id = e.command_id
    RETURNING c.command_id, c.attempt
)
SELECT a.neuron_id,
       EXISTS (SELECT FROM neurons n WHERE n.neuron_id = a.neuron_id
               AND n.lifecycle = 'ACTIVE' AND n.token_generation <= a.generation),
       o.session_epoch, now(),
       coalesce(p.last_sequence, 0), o.previous_server_id, o.heartbeat_timeout,
       ARRAY(SELECT command_id::text || ' ' || attempt FROM named r
             WHERE r.neuron_id = a.neuron_id
               AND (command_id, attempt) NOT IN (SELECT command_id, attempt FROM running))
FROM asked a
LEFT JOIN opened o USING (neuron_id)
LEFT JOIN spools p ON p.neuron_id = a.neuron_id AND p.spool_id = a.spool_id
""".encode()


def open_later(
    send: Pipeline, server_id: str, new: Sequence[NewSession]
) -> Callable[[], Awaitable[list[OpenedSession | Busy | None]]]:
    """Opens sessions on that server, of different neurons, each of which supersedes its neuron's
    current one. Asks now, and gives what became of each when called.

    None stands for a neuron that may not hold one: it was deleted or deactivated, or its token's
    generation is over. Of a neuron that may, older tokens are no longer good.
    """
    running = [(each.neuron_id, *command) for each in new for command in each.running]
    answer = send(
        _OPEN,
        server_id,
        [each.neuron_id for each in new],
        [each.generation for each in new],
        [each.session_id for each in new],
        [each.instance_id for each in new],
        [each.sdk_name for each in new],
        [each.sdk_version for each in new],
        [each.spool_id for each in new],
        [each.peer for each in new],
        [each.backlog_sequence for each in new],
        *([[row[column] for row in running] for column in range(3)]),
    )

    async def opened() -> list[OpenedSession | Busy | None]:
        became: dict[str, OpenedSession | Busy | None] = {}
        for neuron_id, stands, epoch, time, last, previous, timeout, astray in await answer:
            if not stands:
                became[neuron_id] = None
            elif epoch is None:
                became[neuron_id] = Busy()
            else:
                attempts = [_attempt(each) for each in astray]
                became[neuron_id] = OpenedSession(epoch, time, last, previous, timeout, attempts)
        return [became[each.neuron_id] for each in new]

    return opened


def _attempt(text: str) -> tuple[str, int]:
    command_id, _, attempt = text.partition(" ")
    return command_id, int(attempt)


@dataclass(frozen=True, slots=True)
class StaleSession:
    """A session that is not its neuron's newest, or that is closed."""

    neuron_id: str
    newest: bool
    """It is the newest: somebody closed it."""
    superseded: bool
    """Another one has begun since, a stream or a process's; else somebody ended it for good."""
    lifecycle: Lifecycle | None
    """None: the neuron was deleted."""


# Who ends a session raises the epoch, and leaves all that its Hello said. A process that begins one
# leaves the session_id as well, and has a lease.
_STALE = b"""
SELECT b.neuron_id, coalesce(s.session_epoch = b.epoch, false),
       coalesce(s.session_id <> b.session_id OR s.lease_duration IS NOT NULL, false),
       n.lifecycle::text
FROM unnest(%s::text[], %s::int8[], %s::uuid[]) AS b (neuron_id, epoch, session_id)
LEFT JOIN neuron_states s USING (neuron_id)
LEFT JOIN neurons n USING (neuron_id)
WHERE s.session_epoch IS DISTINCT FROM b.epoch OR NOT s.session_open
"""


async def stale(
    connection: Connection, sessions: Sequence[tuple[str, int, str]]
) -> list[StaleSession]:
    """Those of the sessions (neuron_id, epoch, session_id) that the store does not have as open."""
    if not sessions:
        return []
    columns = [[each[column] for each in sessions] for column in range(3)]
    cursor = await connection.execute(_STALE, columns)
    return [
        StaleSession(neuron_id, newest, superseded, Lifecycle(lifecycle) if lifecycle else None)
        for neuron_id, newest, superseded, lifecycle in await cursor.fetchall()
    ]
