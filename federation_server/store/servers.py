"""The server processes, each with a lease: whose lease is over is taken for dead.

With its lease each server publishes why it is in doubt of itself, if it is, and the longest
interval that its streams may be keeping between two heartbeats because it told them: for whoever
sweeps (`presence.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType

from sqlalchemy import Text, cast, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.doubt import OWN_CAUSES, Cause
from federation_server.domain.fleet import DoubtfulServer
from federation_server.store.database import Connection
from federation_server.store.schema import servers

LEASE = timedelta(seconds=10)
"""How long a server that has stopped renewing counts as alive."""

QUIET = timedelta(seconds=5)
"""A server that has not renewed its lease for this long is in doubt, and cannot say so."""

_RENEW = b"""
INSERT INTO servers (server_id, start_time, lease_expire_time, version, heartbeat_interval,
                     doubt_causes, doubt_time, sweeping)
VALUES (%(server_id)s, now(), now() + %(lease)s, %(version)s, %(interval)s,
        %(causes)s::text[]::doubt_cause[],
        now() - make_interval(secs => %(age_s)s::float8), %(sweeping)s)
ON CONFLICT (server_id) DO UPDATE SET
    lease_expire_time = excluded.lease_expire_time,
    heartbeat_interval = excluded.heartbeat_interval,
    doubt_causes = excluded.doubt_causes,
    doubt_time = excluded.doubt_time,
    sweeping = excluded.sweeping
"""

_DOUBTFUL = b"""
SELECT server_id FROM servers
WHERE server_id <> %(own)s AND lease_expire_time > now()
  AND (doubt_causes && %(causes)s::text[]::doubt_cause[]
       OR lease_expire_time <= now() + %(lease)s - %(quiet)s)
"""

_IN_DOUBT = (
    select(
        servers.c.server_id,
        cast(servers.c.doubt_causes, ARRAY(Text)),
        servers.c.doubt_time,
        servers.c.sweeping,
    )
    .where(servers.c.lease_expire_time > func.now(), func.cardinality(servers.c.doubt_causes) > 0)
    .order_by(servers.c.sweeping.desc(), servers.c.doubt_time, servers.c.server_id)
)


async def renew(
    connection: Connection,
    server_id: str,
    version: str,
    *,
    heartbeat_interval: timedelta | None = None,
    doubt: Mapping[Cause, float] = MappingProxyType({}),
    sweeping: bool = False,
) -> None:
    """Enters the server into the register, or renews its lease. `doubt` names the causes of its
    doubt of itself, each with how many seconds ago it began.
    """
    values = {
        "server_id": server_id,
        "lease": LEASE,
        "version": version,
        "interval": heartbeat_interval,
        "causes": [cause.value for cause in doubt],
        "age_s": max(doubt.values(), default=None),
        "sweeping": sweeping,
    }
    await connection.execute(_RENEW, values)


async def doubtful(connection: Connection, own: str) -> list[str]:
    """The living servers, but for that one, that may not have heard what their neurons sent."""
    cursor = await connection.execute(
        _DOUBTFUL,
        {
            "own": own,
            "causes": [cause.value for cause in OWN_CAUSES],
            "lease": LEASE,
            "quiet": QUIET,
        },
    )
    return [server_id for (server_id,) in await cursor.fetchall()]


async def in_doubt(connection: AsyncConnection) -> list[DoubtfulServer]:
    """The living servers that are in doubt of themselves, who sweeps first."""
    found = await connection.execute(_IN_DOUBT)
    return [
        DoubtfulServer(server_id, [Cause(cause) for cause in causes], since, sweeping)
        for server_id, causes, since, sweeping in found
    ]


async def leave(connection: Connection, server_id: str) -> None:
    """Takes the server out of the register."""
    await connection.execute(b"DELETE FROM servers WHERE server_id = %s", (server_id,))


async def forget_dead(connection: Connection) -> None:
    """Removes servers whose lease ended long ago."""
    await connection.execute(
        b"DELETE FROM servers WHERE lease_expire_time < now() - interval '1 day'"
    )
