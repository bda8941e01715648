"""What becomes of commands although nobody does anything: they expire, take too long, are lost.

All by PostgreSQL's clock. `expire` speaks of commands that wait here, and may run at any time.
The others speak of what neurons have, or may have, and are for a sweeper that has given them the
time to say what they know.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from federation_server.domain.command import Lateness, lose, time_out
from federation_server.store import presence
from federation_server.store.database import Connection
from federation_server.store.ledger import changes
from federation_server.store.ledger.changes import CONNECTED, IN_FLIGHT, ChangedCommand

RUN_GRACE = timedelta(seconds=10)
"""How much longer than its run_timeout a command may take to say that it has timed out: the neuron
ends it, which takes a while, and its word is the better one."""

CANCEL_PATIENCE = timedelta(minutes=5)
"""How long a neuron that is connected may leave a cancel unanswered."""

_MOST = 1000
"""How many commands one round changes."""

_EXPIRE = b"""
WITH over AS (
    SELECT command_id FROM commands
    WHERE state = 'QUEUED' AND expire_time <= now()
    ORDER BY expire_time LIMIT %(most)s
    FOR NO KEY UPDATE SKIP LOCKED
), expired AS (
    UPDATE commands c SET
        state = 'EXPIRED', end_time = now(), revision = c.revision + 1, next_attempt_time = NULL,
        state_reason = CASE c.attempt WHEN 0 THEN 'not sent in time'
            ELSE 'no time for another attempt; ' || c.state_reason END
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

# Locked here, so that a row which changes meanwhile is judged anew. AT_MOST_ONCE with its neuron
# away: it may have run, so it did not simply take too long.
_LATE = f"""
SELECT c.command_id::text, late.code, late.span,
       c.execution = 'AT_MOST_ONCE' AND NOT coalesce({CONNECTED}, false)
FROM commands c
JOIN neuron_states s USING (neuron_id)
CROSS JOIN LATERAL (VALUES
    ('ACCEPT_TIMEOUT', c.accept_timeout, c.send_time, c.state = 'SENT', interval '0'),
    ('RUN_TIMEOUT', c.run_timeout, c.start_time, c.state = 'RUNNING', %(run_grace)s),
    ('PROGRESS_TIMEOUT', c.progress_timeout, c.progress_time, c.state = 'RUNNING', interval '0')
) AS late (code, span, since, applies, grace)
WHERE c.state IN {IN_FLIGHT} AND late.applies AND now() - late.since > late.span + late.grace
  AND now() <= %(until)s AND NOT s.server_id = ANY (%(spared)s)
ORDER BY c.command_id LIMIT %(most)s
FOR NO KEY UPDATE OF c SKIP LOCKED
"""

_LOST = f"""
SELECT c.command_id::text, lost.reason
FROM commands c
JOIN neuron_states s USING (neuron_id)
LEFT JOIN spools p ON p.neuron_id = s.neuron_id AND p.spool_id = s.spool_id
CROSS JOIN LATERAL (SELECT CASE
    WHEN c.execution = 'AT_MOST_ONCE' AND c.state <> 'CANCELLING' AND s.session_open
         AND c.session_epoch < s.session_epoch
         AND coalesce(p.last_sequence, 0) >= s.backlog_sequence
        THEN 'its neuron came back and knows nothing of it, and it must not be sent twice'
    WHEN c.state = 'CANCELLING' AND c.cancel_time < now() - %(patience)s
         AND s.session_open AND s.session_open_time < now() - %(patience)s
        THEN 'its neuron has not answered the cancel'
    WHEN s.presence = 'OFFLINE' AND s.presence_time < now() - %(lost_after)s
         AND c.expire_time < now() AND NOT coalesce(s.lease_expire_time > now(), false)
        THEN 'its neuron is away, and its time is over'
    END) AS lost (reason)
WHERE c.state IN {IN_FLIGHT} AND lost.reason IS NOT NULL AND now() <= %(until)s
  AND NOT s.server_id = ANY (%(spared)s)
ORDER BY c.command_id LIMIT %(most)s
FOR NO KEY UPDATE OF c SKIP LOCKED
"""


async def expire(connection: Connection, server_id: str, *, most: int = _MOST) -> list[str]:
    """Ends queued commands whose time is over; returns their ids, at most so many."""
    cursor = await connection.execute(_EXPIRE, {"server_id": server_id, "most": most})
    return [command_id for (command_id,) in await cursor.fetchall()]


async def time_out_late(
    connection: Connection,
    server_id: str,
    *,
    spared: Sequence[str] = (),
    until: datetime = presence.NEVER,
) -> list[ChangedCommand]:
    """Ends the attempts that take longer than they may; returns the commands. What the neurons of
    `spared` servers have waits: they may have said what nobody has heard yet. After `until` it ends
    none: who asked has been late.
    """
    async with connection.transaction():
        cursor = await connection.execute(
            _LATE.encode(),
            {"run_grace": RUN_GRACE, "most": _MOST, "spared": list(spared), "until": until},
        )
        late = {command_id: found for command_id, *found in await cursor.fetchall()}
        rows = await changes.lock(connection, late)
        now = await presence.clock(connection)
        for command_id, row in rows.items():
            code, limit, unknowable = late[command_id]
            if unknowable:
                after = lose(row.entry, "its neuron is away, and it takes longer than it may")
            else:
                after = time_out(row.entry, Lateness(code), limit, now)
            row.become(after, f"server:{server_id}")
        return await changes.save(connection, rows.values())


async def give_up_lost(
    connection: Connection,
    server_id: str,
    *,
    lost_after: timedelta,
    spared: Sequence[str] = (),
    until: datetime = presence.NEVER,
) -> list[ChangedCommand]:
    """Ends the commands of which nobody will say any more what became of them; returns them.

    `lost_after` is how long a neuron has to be OFFLINE for that; `spared` and `until` as in
    `time_out_late`.
    """
    async with connection.transaction():
        cursor = await connection.execute(
            _LOST.encode(),
            {
                "patience": CANCEL_PATIENCE,
                "lost_after": lost_after,
                "most": _MOST,
                "spared": list(spared),
                "until": until,
            },
        )
        reasons: dict[str, str] = dict(await cursor.fetchall())
        rows = await changes.lock(connection, reasons)
        for command_id, row in rows.items():
            row.become(lose(row.entry, reasons[command_id]), f"server:{server_id}")
        return await changes.save(connection, rows.values())
