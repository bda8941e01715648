"""What a call without a stream waits for: that its message is stored."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

from federation_server.domain.access import NeuronIdentity
from federation_server.domain.violation import Violation
from federation_server.live.writer import Writer
from federation_server.rpc import errors
from federation_server.rpc.errors import Refused
from federation_server.rpc.standing import just_let_in, turned_away
from federation_server.store.database import Database
from federation_server.store.ingest import DurableItem

STORE_TIMEOUT_S = 10.0
"""How long a call waits."""


class _Fenced(Exception):
    """The message came too late."""


class Receipt:
    """The sender of a message without a stream: a call that waits until it is stored."""

    def __init__(
        self, database: Database, identity: NeuronIdentity, *, fenced: Refused | None = None
    ) -> None:
        """Nothing is known yet. `fenced` is what the call is told if its session is over, and its
        neuron stands as it did when it called; for one without a session that is a conflict.
        """
        self._database = database
        self._identity = identity
        self._otherwise = fenced
        self._stored: asyncio.Future[tuple[int, datetime]] = asyncio.Future()

    def stored(self, mark: int, time: datetime) -> None:
        """The message is committed."""
        if not self._stored.done():
            self._stored.set_result((mark, time))

    def fenced(self) -> None:
        """The session is over, or the neuron was deactivated or deleted, since it called."""
        if not self._stored.done():
            self._stored.set_exception(_Fenced())

    def refused(self, sequence: int, message: str) -> None:
        """The database would not take the message."""
        if not self._stored.done():
            detail = "a value in it cannot be stored"
            self._stored.set_exception(errors.invalid_fields([Violation(message, detail)]))

    async def store(self, writer: Writer, item: DurableItem, size_bytes: int) -> int:
        """Hands a durable message in; returns the spool's mark.

        Raises:
            errors.Refused: it was not stored, or not in time; or there is no room for it.
        """
        if writer.full:
            raise errors.database_unavailable()
        writer.durable(self, item._replace(receive_clock=time.monotonic()), size_bytes)
        writer.hurry()
        mark, _ = await self.wait()
        return mark

    async def wait(self) -> tuple[int, datetime]:
        """The spool's mark and the time of the commit.

        Raises:
            errors.Refused: it was not stored, or not in time.
        """
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await self._stored
        except TimeoutError:
            raise errors.database_unavailable() from None
        except _Fenced:
            async with self._database.begin_for_neurons() as connection:
                refused = await turned_away(connection, self._identity)
            raise refused or self._otherwise or just_let_in(self._identity.neuron_id) from None
