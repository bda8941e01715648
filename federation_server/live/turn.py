"""What one server does at a time: the one that holds an advisory lock on a connection of its own.

When that server dies PostgreSQL lets go of the lock, and the next one that asks takes it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from federation_server.store.database import Connection, Database, bounded

LOCK_TIMEOUT_S = 10.0
"""How long PostgreSQL may take to say whose turn it is."""


@asynccontextmanager
async def turn(database: Database, name: str, lock: int) -> AsyncIterator[Connection | None]:
    """A connection of that name that holds the lock, for as long as the block takes; None if it is
    another server's turn.

    Raises:
        psycopg.Error: PostgreSQL does not answer.
    """
    async with await database.connect(name) as connection:
        with bounded(connection, LOCK_TIMEOUT_S):
            cursor = await connection.execute(b"SELECT pg_try_advisory_lock(%s)", (lock,))
            mine = await cursor.fetchone() == (True,)
        yield connection if mine else None
