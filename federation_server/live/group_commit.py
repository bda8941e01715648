"""Group commit: one transaction for all that wait for one.

Who comes alone is served at once; those that come while a transaction is under way share the next
one. Most of what a small change costs is the transaction, in PostgreSQL as well as here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import psycopg

from federation_server.store.database import Connection, OwnConnection, bounded

TIMEOUT_S = 10.0
"""How long a transaction may take."""

Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class Asked(Generic[Answer]):
    """What somebody waits for."""

    answer: asyncio.Future[Answer] = field(default_factory=asyncio.Future, kw_only=True)

    def give(self, answer: Answer) -> bool:
        """The answer, and whether somebody still waits for it."""
        if self.answer.done():
            return False
        self.answer.set_result(answer)
        return True

    def fail(self, error: Exception) -> None:
        """The answer is that error; for one who still waits."""
        if not self.answer.done():
            self.answer.set_exception(error)


Request = TypeVar("Request", bound="Asked[Any]")


class GroupCommit(Generic[Request]):
    """Those who wait, and the transactions that serve them."""

    def __init__(
        self,
        connection: OwnConnection,
        commit: Callable[[Connection, Sequence[Request]], Awaitable[None]],
        *,
        most: int,
        key: Callable[[Request], Hashable] = lambda request: request,
    ) -> None:
        """Serves nobody before `run`.

        Args:
            connection: for the transactions, and for nothing else.
            commit: serves some in one transaction: it gives each its answer, or adds it again.
            most: no transaction serves more.
            key: no two with the same key are served by the same transaction; the one that came
                first is the first.
        """
        self._connection = connection
        self._commit = commit
        self._most = most
        self._key = key
        self._waiting: list[Request] = []
        self._wake = asyncio.Event()

    def add(self, request: Request) -> None:
        """Lets a request wait. Its answer is an error if it could not be served; after a
        psycopg.Error that is not a DataError it may have been.
        """
        self._waiting.append(request)
        self._wake.set()

    async def run(self) -> None:
        """Serves until it is cancelled; who waits then is cancelled too."""
        served: list[Request] = []
        try:
            while True:
                await self._wake.wait()
                served = self._next()
                if served:
                    await self._serve(served)
        finally:
            await self._connection.close()
            for request in (*served, *self._waiting):
                request.answer.cancel()

    def _next(self) -> list[Request]:
        """Whose turn it is; who has gone meanwhile is forgotten."""
        turn: dict[Hashable, Request] = {}
        later: list[Request] = []
        for request in self._waiting:
            if request.answer.done():
                continue
            key = self._key(request)
            if len(turn) < self._most and key not in turn:
                turn[key] = request
            else:
                later.append(request)
        self._waiting = later
        if not later:
            self._wake.clear()
        return list(turn.values())

    async def _serve(self, requests: Sequence[Request]) -> None:
        """Answers the requests. What the database will not take fails alone."""
        try:
            connection = await self._connection.get()
            with bounded(connection, TIMEOUT_S):
                await self._commit(connection, requests)
        except psycopg.DataError as error:
            if len(requests) == 1:
                requests[0].fail(error)
                return
            for request in requests:
                await self._serve([request])
        except psycopg.Error as error:
            await self._connection.close()
            for request in requests:
                request.fail(error)
