"""The server processes, each with a lease: whose lease is over is taken for dead.

With it goes the longest interval that a server's streams may be keeping between two heartbeats
because it told them; the sweeper (`presence.py`) is patient accordingly.
"""

from __future__ import annotations

from datetime import timedelta

from federation_server.store.database import Connection

LEASE = timedelta(seconds=10)
"""How long a server that has stopped renewing counts as alive."""

_RENEW = b"""
INSERT INTO servers (server_id, start_time, lease_expire_time, version, heartbeat_interval)
VALUES (%(server_id)s, now(), now() + %(lease)s, %(version)s, %(interval)s)
ON CONFLICT (server_id) DO UPDATE
SET lease_expire_time = excluded.lease_expire_time, heartbeat_interval = excluded.heartbeat_interval
"""


async def renew(
    connection: Connection,
    server_id: str,
    version: str,
    heartbeat_interval: timedelta | None = None,
) -> None:
    """Enters the server into the register, or renews its lease."""
    await connection.execute(
        _RENEW,
        {
            "server_id": server_id,
            "lease": LEASE,
            "version": version,
            "interval": heartbeat_interval,
        },
    )


async def leave(connection: Connection, server_id: str) -> None:
    """Takes the server out of the register."""
    await connection.execute(b"DELETE FROM servers WHERE server_id = %s", (server_id,))


async def forget_dead(connection: Connection) -> None:
    """Removes servers whose lease ended long ago."""
    await connection.execute(
        b"DELETE FROM servers WHERE lease_expire_time < now() - interval '1 day'"
    )
