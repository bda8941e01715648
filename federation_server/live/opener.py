"""From a neuron's Hello to its session: one transaction for all that wait for theirs.

    open ─▶ may it hold one ─▶ the next epoch ─▶ a hint to the server that held the last one
        ─▶ commit ─▶ the answer to the stream (rpc/stream.py)

A neuron alone is served at once; of a herd those that come while a transaction is under way share
the next one. Most of what a session costs is the transaction, in PostgreSQL as well as here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psycopg

from federation_server.live.notifier import send_end_hints
from federation_server.store.database import Connection, Database, OwnConnection, bounded
from federation_server.store.pipeline import pipeline
from federation_server.store.sessions import Busy, NewSession, OpenedSession, open_later

MOST_AT_ONCE = 100
OPEN_TIMEOUT_S = 10.0
BUSY_PAUSE_S = 0.01
"""How long those wait that were busy, if nobody else comes."""


@dataclass(eq=False, slots=True)
class _Request:
    new: NewSession
    answer: asyncio.Future[OpenedSession | None] = field(default_factory=asyncio.Future)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Opener:
    """Opens sessions."""

    def __init__(
        self, database: Database, server_id: str, *, unwanted: Callable[[NewSession, int], None]
    ) -> None:
        """Opens nothing before `run`. `unwanted` is called with a session and its epoch that was
        opened for a stream that has ended meanwhile.
        """
        self._server_id = server_id
        self._unwanted = unwanted
        self._waiting: list[_Request] = []
        self._wake = asyncio.Event()
        self._connection = OwnConnection(database, "opener", shared=True)

    async def open(self, new: NewSession) -> OpenedSession | None:
        """Opens a session that supersedes the neuron's current one. Returns None if the neuron may
        not hold one.

        Raises:
            psycopg.Error: PostgreSQL does not answer; the session may have been opened.
        """
        request = _Request(new)
        self._waiting.append(request)
        self._wake.set()
        try:
            return await request.answer
        except asyncio.CancelledError:
            answer = request.answer
            if not answer.cancelled() and answer.exception() is None:
                self._give_up(new, answer.result())  # it came in the same moment
            raise

    async def run(self) -> None:
        """Opens until it is cancelled."""
        try:
            while True:
                await self._wake.wait()
                requests = self._next()
                if requests and not await self._handle(requests):
                    await asyncio.sleep(BUSY_PAUSE_S)
        finally:
            await self._connection.close()
            for request in self._waiting:
                request.answer.cancel()

    def _next(self) -> list[_Request]:
        """Those whose turn it is: one for each neuron, since each supersedes the one before."""
        turn: dict[str, _Request] = {}
        later: list[_Request] = []
        for request in self._waiting:
            if request.answer.done():  # its stream has ended
                continue
            if len(turn) < MOST_AT_ONCE and request.new.neuron_id not in turn:
                turn[request.new.neuron_id] = request
            else:
                later.append(request)
        self._waiting = later
        if not later:
            self._wake.clear()
        return list(turn.values())

    async def _handle(self, requests: Sequence[_Request]) -> bool:
        """Answers the requests. What the database will not take fails for its neuron alone. Says
        whether there was anything to do: False if all neurons were busy.
        """
        try:
            connection = await self._connection.get()
            with bounded(connection, OPEN_TIMEOUT_S):
                return await self._open(connection, requests)
        except psycopg.DataError as error:
            if len(requests) == 1:
                requests[0].fail(error)
                return True
            return any([await self._handle([request]) for request in requests])
        except psycopg.Error as error:
            await self._connection.close()
            for request in requests:
                request.fail(error)
            return True

    async def _open(self, connection: Connection, requests: Sequence[_Request]) -> bool:
        async with pipeline(connection, transaction=True) as send:
            became = await open_later(send, self._server_id, [each.new for each in requests])()
            send_end_hints(
                send,
                [
                    (opened.previous_server_id, request.new.neuron_id, opened.epoch)
                    for request, opened in zip(requests, became, strict=True)
                    if isinstance(opened, OpenedSession)
                    and opened.previous_server_id not in {None, self._server_id}
                ],
            )
        done = False
        for request, opened in zip(requests, became, strict=True):
            if isinstance(opened, Busy):
                self._waiting.append(request)
                self._wake.set()
                continue
            done = True
            if not request.answer.done():
                request.answer.set_result(opened)
            else:
                self._give_up(request.new, opened)
        return done

    def _give_up(self, new: NewSession, opened: OpenedSession | None) -> None:
        if opened is not None:
            self._unwanted(new, opened.epoch)
