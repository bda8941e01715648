"""Marking neurons down, by PostgreSQL's clock.

A neuron comes up by what it does (`sessions.open_session`, a heartbeat in `ingest`), and goes
down here: `domain/presence.py` says when; a test proves that this SQL says the same.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from federation_server.domain.neuron import Presence
from federation_server.domain.presence import TOLD_INTERVALS
from federation_server.store.database import Connection

NEVER = datetime.max.replace(tzinfo=UTC)

# A server that died could not close its sessions: their streams are lost.
_LOST = b"""
UPDATE neuron_states s SET
    session_open = false,
    session_close_time = now(),
    presence = 'SUSPECT',
    presence_time = CASE WHEN s.presence <> 'SUSPECT' THEN now() ELSE s.presence_time END,
    presence_reason = 'server lost'
WHERE s.session_open AND now() <= %(until)s
  AND NOT EXISTS (SELECT FROM servers v
                  WHERE v.server_id = s.server_id AND v.lease_expire_time > now())
"""

# The register of servers is asked only about those who are silent.
_SWEEP = f"""
WITH judged AS (
    SELECT s.neuron_id, s.presence,
        CASE
            WHEN s.presence = 'SUSPECT' AND NOT s.session_open
                 AND s.session_close_time >= coalesce(s.last_heartbeat_time, s.session_close_time)
                THEN CASE WHEN now() - s.presence_time >= %(offline_after)s
                     THEN 'OFFLINE'::presence ELSE 'SUSPECT' END
            WHEN heard.time IS NULL OR now() - heard.time < s.heartbeat_timeout THEN s.presence
            WHEN now() - heard.time >= 2 * patience.span THEN 'OFFLINE'
            WHEN now() - heard.time >= patience.span THEN 'SUSPECT'
            ELSE s.presence
        END AS verdict
    FROM neuron_states s
    CROSS JOIN LATERAL (
        SELECT greatest(s.last_heartbeat_time,
                        CASE WHEN s.session_open THEN s.session_open_time END) AS time
    ) heard
    CROSS JOIN LATERAL (
        SELECT greatest(s.heartbeat_timeout, (
            SELECT {TOLD_INTERVALS} * v.heartbeat_interval FROM servers v
            WHERE s.session_open AND v.server_id = s.server_id)) AS span
    ) patience
    WHERE s.presence <> 'OFFLINE' AND now() <= %(until)s
)
UPDATE neuron_states s SET
    presence = judged.verdict,
    presence_time = now(),
    presence_reason = CASE WHEN s.session_open OR s.session_close_time IS NULL
                                OR s.session_close_time < s.last_heartbeat_time
                      THEN 'heartbeats missing' ELSE s.presence_reason END
FROM judged
WHERE s.neuron_id = judged.neuron_id AND judged.verdict <> judged.presence
  AND s.presence = judged.presence
RETURNING s.neuron_id, s.presence::text, s.presence_reason
""".encode()


async def clock(connection: Connection) -> datetime:
    """PostgreSQL's time."""
    row = await (await connection.execute(b"SELECT now()")).fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


async def close_lost_sessions(connection: Connection, *, until: datetime = NEVER) -> int:
    """Closes the sessions of servers that are dead; returns how many. Later than `until`, none:
    then PostgreSQL has stood still, and the servers could not renew their leases.
    """
    return (await connection.execute(_LOST, {"until": until})).rowcount


async def sweep(
    connection: Connection, *, offline_after: timedelta, until: datetime = NEVER
) -> list[tuple[str, Presence, str]]:
    """Marks down the neurons whose time is over; returns each with its new presence and why. Later
    than `until`, none: then nobody's heartbeats could be written.
    """
    cursor = await connection.execute(_SWEEP, {"offline_after": offline_after, "until": until})
    return [
        (neuron_id, Presence(presence), reason)
        for neuron_id, presence, reason in await cursor.fetchall()
    ]


async def count(connection: Connection) -> dict[Presence, int]:
    """How many active neurons have each presence."""
    cursor = await connection.execute(
        b"SELECT presence::text, count(*) FROM neuron_states GROUP BY presence"
    )
    counts = dict.fromkeys(Presence, 0)
    counts.update({Presence(presence): number for presence, number in await cursor.fetchall()})
    return counts
