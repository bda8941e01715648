"""Sessions without a stream: a process takes commands by calling, and holds them by a lease."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from federation_server.domain.command import fail, lose
from federation_server.store import presence
from federation_server.store.database import Connection
from federation_server.store.ledger import batches, changes, dispatch
from federation_server.store.ledger.changes import IN_FLIGHT, ChangedCommand
from federation_server.store.ledger.dispatch import ClaimedCancel, ClaimedCommand

LEASE_EXPIRED = "LEASE_EXPIRED"
_MOST = 1000


@dataclass(frozen=True, slots=True)
class Lease:
    """A session that a process has begun or goes on with."""

    epoch: int
    expire_time: datetime
    begun: bool
    """This call has begun it."""
    previous_server_id: str | None
    """The server that held the stream that it supersedes, if there was one."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a process gets."""

    commands: Sequence[ClaimedCommand]
    cancels: Sequence[ClaimedCancel]
    lost: Sequence[ChangedCommand]
    """Commands that ended because they must not be sent again."""


_SAME = """
NOT s.session_open AND s.lease_duration IS NOT NULL AND s.instance_id = %(instance_id)s
"""
"""Whether the newest session is the process's own. Its epoch may have been raised, by an admin who
ended it."""

# A process goes on with its session as long as nobody else has begun one since; who knows its epoch
# does not begin another one. The neuron's row is locked first, as everywhere.
_OPEN = f"""
WITH neuron AS MATERIALIZED (
    SELECT neuron_id FROM neurons
    WHERE neuron_id = %(neuron_id)s AND lifecycle = 'ACTIVE'
      AND token_generation <= %(generation)s
    FOR SHARE
), before AS (
    SELECT s.neuron_id, s.session_open, s.server_id, {_SAME} AS same
    FROM neuron JOIN neuron_states s USING (neuron_id)
    WHERE %(epoch)s = 0 OR s.session_epoch < %(epoch)s OR {_SAME}
    FOR NO KEY UPDATE OF s
)
UPDATE neuron_states s SET
    session_epoch = CASE WHEN before.same THEN s.session_epoch ELSE s.session_epoch + 1 END,
    session_open = false,
    session_close_time = CASE WHEN s.session_open THEN now() ELSE s.session_close_time END,
    instance_id = %(instance_id)s,
    server_id = '',
    lease_duration = %(duration)s,
    lease_expire_time = now() + %(duration)s
FROM before WHERE s.neuron_id = before.neuron_id
RETURNING s.session_epoch, s.lease_expire_time, NOT before.same,
    CASE WHEN before.session_open THEN before.server_id END
""".encode()

_RENEW = b"""
UPDATE neuron_states SET lease_expire_time = now() + lease_duration
WHERE neuron_id = %s AND session_epoch = %s AND NOT session_open AND lease_duration IS NOT NULL
RETURNING lease_expire_time
"""

_TAKE_OVER = f"""
UPDATE commands c SET session_epoch = %(epoch)s
FROM unnest(%(command_ids)s::uuid[], %(attempts)s::int8[]) AS r (command_id, attempt)
WHERE c.command_id = r.command_id AND c.attempt = r.attempt AND c.neuron_id = %(neuron_id)s
  AND c.state IN {IN_FLIGHT}
RETURNING c.command_id::text, c.attempt
"""

_DOUBTFUL = f"""
SELECT command_id::text FROM commands
WHERE neuron_id = %(neuron_id)s AND execution = 'AT_MOST_ONCE' AND state IN {IN_FLIGHT}
  AND state <> 'CANCELLING' AND (session_epoch < %(epoch)s OR state = 'SENT')
  AND NOT command_id = ANY (%(named)s::uuid[])
"""

_HOLDING = b"""
SELECT DISTINCT batch_id::text FROM commands
WHERE neuron_id = %s AND held AND state = 'QUEUED'
"""

_EXPIRED = f"""
SELECT c.command_id::text, c.execution = 'AT_MOST_ONCE'
FROM commands c JOIN neuron_states s USING (neuron_id)
WHERE c.state IN {IN_FLIGHT} AND c.session_epoch = s.session_epoch
  AND NOT s.session_open AND s.lease_expire_time < now() AND now() <= %(until)s
ORDER BY c.command_id LIMIT %(most)s
FOR NO KEY UPDATE OF c SKIP LOCKED
"""


async def open_lease(
    connection: Connection,
    neuron_id: str,
    generation: int,
    instance_id: str,
    duration: timedelta,
    *,
    epoch: int = 0,
) -> Lease | None:
    """Begins a process's session, or renews its lease. `epoch` is the one that the process knows; 0
    for none. None if the neuron may not hold a lease, or another session has begun since `epoch`.
    """
    cursor = await connection.execute(
        _OPEN,
        {
            "neuron_id": neuron_id,
            "generation": generation,
            "instance_id": instance_id,
            "duration": duration,
            "epoch": epoch,
        },
    )
    row = await cursor.fetchone()
    return None if row is None else Lease(*row)


async def renew(connection: Connection, neuron_id: str, epoch: int) -> datetime | None:
    """Renews a lease, and says until when; None if the session is no longer the newest."""
    cursor = await connection.execute(_RENEW, (neuron_id, epoch))
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def pull(
    connection: Connection,
    server_id: str,
    neuron_id: str,
    epoch: int,
    *,
    running: Collection[tuple[str, int]],
    most: int,
) -> Pulled:
    """Takes what the session is to be given now, at most that many commands, in the transaction
    that has opened its lease. `running` are the attempts that the process has.
    """
    # First, because it waits for others' releases, who may wait for commands in turn.
    await _release(connection, neuron_id)
    cursor = await connection.execute(
        _TAKE_OVER.encode(),
        {
            "neuron_id": neuron_id,
            "epoch": epoch,
            "command_ids": [command_id for command_id, _ in running],
            "attempts": [attempt for _, attempt in running],
        },
    )
    taken_over = set(await cursor.fetchall())
    named = {command_id for command_id, _ in taken_over}
    lost = await _lose_doubtful(connection, server_id, neuron_id, epoch, named)
    session = (neuron_id, epoch)
    claimed = await dispatch.claim(connection, server_id, [session], doubtful=[session], most=most)
    astray = [
        ClaimedCancel(command_id, neuron_id, epoch, attempt, "nobody waits for it any more")
        for command_id, attempt in running
        if (command_id, attempt) not in taken_over
    ]
    return Pulled(
        commands=[
            each for each in claimed.commands if not (each.again and each.command_id in named)
        ],
        cancels=[*claimed.cancels, *astray],
        lost=lost,
    )


async def _lose_doubtful(
    connection: Connection, server_id: str, neuron_id: str, epoch: int, named: Collection[str]
) -> list[ChangedCommand]:
    """Ends what must not be sent twice and the process does not have."""
    cursor = await connection.execute(
        _DOUBTFUL.encode(), {"neuron_id": neuron_id, "epoch": epoch, "named": list(named)}
    )
    rows = await changes.lock(connection, [command_id for (command_id,) in await cursor.fetchall()])
    for row in rows.values():
        if row.entry.in_flight:
            reason = "its neuron knows nothing of it, and it must not be sent twice"
            row.become(lose(row.entry, reason), f"server:{server_id}")
    return await changes.save(connection, rows.values())


async def _release(connection: Connection, neuron_id: str) -> None:
    cursor = await connection.execute(_HOLDING, (neuron_id,))
    holding = [batch_id for (batch_id,) in await cursor.fetchall()]
    if holding:
        await batches.release(connection, holding, wait=True)


async def end_expired(
    connection: Connection, server_id: str, *, until: datetime = presence.NEVER
) -> list[ChangedCommand]:
    """Ends the attempts of processes that have let their lease run out; returns the commands.
    `until` as in `timers.time_out_late`.
    """
    async with connection.transaction():
        cursor = await connection.execute(_EXPIRED.encode(), {"most": _MOST, "until": until})
        once: dict[str, bool] = dict(await cursor.fetchall())
        rows = await changes.lock(connection, once)
        now = await presence.clock(connection)
        words = "the process that had it did not renew its lease"
        for command_id, row in rows.items():
            if once[command_id]:
                after = lose(row.entry, words)
            else:
                after = fail(row.entry, LEASE_EXPIRED, words, now)
            row.become(after, f"server:{server_id}")
        return await changes.save(connection, rows.values())
