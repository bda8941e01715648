"""Marking neurons down, by PostgreSQL's clock.

A neuron comes up by what it does (`sessions.open_later`, a heartbeat in `ingest`), and goes
down here: `domain/presence.py` says when; a test proves that this SQL says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from federation_server.domain.doubt import MASS_LEAST, MASS_WITHIN, Loss
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

# The register of servers is asked only about those who are silent. Who is heard at this moment is
# waited for, and then judged by what was known before: so it must still be as it was.
_SWEEP = f"""
WITH judged AS (
    SELECT s.neuron_id, s.presence, s.session_epoch, s.session_open, s.last_heartbeat_time,
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
      AND NOT s.server_id = ANY (%(spared)s)
      AND NOT EXISTS (
          SELECT FROM unnest(%(lost_servers)s::text[], %(lost_first)s::timestamptz[],
                             %(lost_last)s::timestamptz[]) AS loss (server_id, first, last)
          WHERE NOT s.session_open AND s.server_id = loss.server_id
            AND s.session_close_time BETWEEN loss.first AND loss.last
            AND now() - s.session_close_time < %(mass_offline_after)s)
)
UPDATE neuron_states s SET
    presence = judged.verdict,
    presence_time = now(),
    presence_reason = CASE WHEN s.session_open OR s.session_close_time IS NULL
                                OR s.session_close_time < s.last_heartbeat_time
                      THEN 'heartbeats missing' ELSE s.presence_reason END
FROM judged
WHERE s.neuron_id = judged.neuron_id AND judged.verdict <> judged.presence
  AND (s.presence, s.session_epoch, s.session_open)
      = (judged.presence, judged.session_epoch, judged.session_open)
  AND s.last_heartbeat_time IS NOT DISTINCT FROM judged.last_heartbeat_time
RETURNING s.neuron_id, s.presence::text, s.presence_reason
""".encode()

# A stream that a heartbeat without one has followed was given up by its neuron, and not lost.
_LOSSES = b"""
WITH lost AS (
    SELECT s.server_id, s.session_close_time AS time, count(*) OVER (
        PARTITION BY s.server_id ORDER BY s.session_close_time
        RANGE BETWEEN %(within)s PRECEDING AND CURRENT ROW) AS number
    FROM neuron_states s
    WHERE s.presence = 'SUSPECT' AND NOT s.session_open AND s.server_id <> ''
      AND s.session_close_time > now() - %(newer_than)s
      AND s.session_close_time >= coalesce(s.last_heartbeat_time, s.session_close_time)
), most AS (
    SELECT server_id, min(time) - %(within)s AS first, max(time) AS last, max(number) AS number
    FROM lost WHERE number >= %(least)s GROUP BY server_id
)
SELECT server_id, first, last, number,
    (SELECT count(*) FROM neuron_states s
     WHERE s.session_open AND s.server_id = most.server_id)
FROM most
"""


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


async def losses(connection: Connection, *, newer_than: timedelta) -> list[Loss]:
    """For each server of which streams were lost together, since that long at the most: those
    whose neurons are still away. One that has lost fewer than make a mass is left out.
    """
    cursor = await connection.execute(
        _LOSSES, {"within": MASS_WITHIN, "least": MASS_LEAST, "newer_than": newer_than}
    )
    return [Loss(*row) for row in await cursor.fetchall()]


async def sweep(
    connection: Connection,
    *,
    offline_after: timedelta,
    spared: Sequence[str] = (),
    losses: Sequence[Loss] = (),
    mass_offline_after: timedelta = timedelta(),
    until: datetime = NEVER,
) -> list[tuple[str, Presence, str]]:
    """Marks down the neurons whose time is over; returns each with its new presence and why.

    The neurons of the servers that are `spared` are left alone; those whose streams were lost in
    one of the `losses`, for `mass_offline_after`. Later than `until` nobody is marked down: then
    nobody's heartbeats could be written.
    """
    cursor = await connection.execute(
        _SWEEP,
        {
            "offline_after": offline_after,
            "spared": list(spared),
            "lost_servers": [loss.server_id for loss in losses],
            "lost_first": [loss.first for loss in losses],
            "lost_last": [loss.last for loss in losses],
            "mass_offline_after": mass_offline_after,
            "until": until,
        },
    )
    return [
        (neuron_id, Presence(presence), reason)
        for neuron_id, presence, reason in await cursor.fetchall()
    ]


async def count(connection: Connection) -> dict[Presence, int]:
    """How many neurons have each presence."""
    cursor = await connection.execute(
        b"SELECT presence::text, count(*) FROM neuron_states GROUP BY presence"
    )
    counts = dict.fromkeys(Presence, 0)
    counts.update({Presence(presence): number for presence, number in await cursor.fetchall()})
    return counts
