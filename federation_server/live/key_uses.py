"""When API keys were last used: noted as calls come, written beside them, a minute exact."""

from __future__ import annotations

import asyncio
import time

import psycopg
import structlog
from sqlalchemy import exc as sql

from federation_server.store.api_keys import USE_INTERVAL, note_use
from federation_server.store.database import Database, first_line

log = structlog.get_logger(__name__)

RETRY_INTERVAL_S = 5.0


class KeyUses:
    """Writes each key's use once a minute at most; nobody waits for it."""

    def __init__(self, database: Database) -> None:
        """Writes nothing before `run`."""
        self._database = database
        self._due: dict[str, float] = {}
        self._used: set[str] = set()
        self._wake = asyncio.Event()

    def note(self, name: str) -> None:
        """A call has shown that key, and it was good."""
        now = time.monotonic()
        if now >= self._due.get(name, now):
            self._due[name] = now + USE_INTERVAL.total_seconds()
            self._used.add(name)
            self._wake.set()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            used, self._used = self._used, set()
            try:
                async with self._database.begin() as connection:
                    await note_use(connection, used)
            except (psycopg.Error, sql.SQLAlchemyError) as error:
                log.info(
                    "uses of API keys not written",
                    action="key_uses_retry",
                    reason=first_line(error),
                )
                self._used |= used
                self._wake.set()
                await asyncio.sleep(RETRY_INTERVAL_S)
