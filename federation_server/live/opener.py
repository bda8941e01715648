"""From a neuron's Hello to its session: one transaction for all that wait for theirs.

    open ─▶ may it hold one ─▶ the next epoch ─▶ a hint to the server that held the last one
        ─▶ commit ─▶ the answer to the stream (rpc/stream.py)

One of a neuron's streams after the other, since each supersedes the one before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from federation_server.live.group_commit import Asked, GroupCommit
from federation_server.live.notifier import send_end_hints
from federation_server.store.database import Connection, Database, OwnConnection
from federation_server.store.pipeline import pipeline
from federation_server.store.sessions import Busy, NewSession, OpenedSession, open_later

MOST_AT_ONCE = 100
BUSY_PAUSE_S = 0.01
"""How long all wait if those whose turn it was were all busy."""


@dataclass(eq=False, slots=True)
class _Request(Asked[OpenedSession | None]):
    new: NewSession


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
        self._group = GroupCommit(
            OwnConnection(database, "opener", shared=True),
            self._open,
            most=MOST_AT_ONCE,
            key=lambda request: request.new.neuron_id,
        )

    async def open(self, new: NewSession) -> OpenedSession | None:
        """Opens a session that supersedes the neuron's current one. Returns None if the neuron may
        not hold one.

        Raises:
            psycopg.Error: PostgreSQL does not answer; the session may have been opened.
        """
        request = _Request(new)
        self._group.add(request)
        try:
            return await request.answer
        except asyncio.CancelledError:
            answer = request.answer
            if not answer.cancelled() and answer.exception() is None:
                self._give_up(new, answer.result())  # it came in the same moment
            raise

    async def run(self) -> None:
        """Opens until it is cancelled."""
        await self._group.run()

    async def _open(self, connection: Connection, requests: Sequence[_Request]) -> None:
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
        busy = 0
        for request, opened in zip(requests, became, strict=True):
            if isinstance(opened, Busy):
                self._group.add(request)
                busy += 1
            elif not request.give(opened):
                self._give_up(request.new, opened)
        if busy == len(requests):
            await asyncio.sleep(BUSY_PAUSE_S)

    def _give_up(self, new: NewSession, opened: OpenedSession | None) -> None:
        if opened is not None:
            self._unwanted(new, opened.epoch)
