"""Gives each neuron that holds a stream a new token in the middle of the life of the one before.

The one before is good until the new one is used. A neuron's row is locked while its token is
issued: who revokes its tokens comes before, and then none is issued, or after, and finds it old.
A token whose key has retired gets no successor, and one whose key soon will gets it before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import psycopg
import structlog

from federation_server.domain.access import IssuedToken, NeuronIdentity
from federation_server.live.session import Session, Sessions
from federation_server.store import registration
from federation_server.store.database import Database, OwnConnection, bounded, first_line

log = structlog.get_logger(__name__)

TICK_S = 1.0
MOST_AT_ONCE = 100
"""How many tokens one round issues: those of a fleet that registered at once are spread."""

TIMEOUT_S = 10.0


class Tokens(Protocol):
    """Makes tokens."""

    def issue(self, neuron_id: str, generation: int, now: datetime) -> IssuedToken:
        """A token of that generation, at a time of PostgreSQL's."""

    def due_time(self, neuron: NeuronIdentity) -> datetime | None:
        """When a token is to have a successor; None if it is to have none any more."""


class TokenRotation:
    """Rotates the tokens of this server's sessions."""

    def __init__(self, database: Database, sessions: Sessions, tokens: Tokens) -> None:
        """Rotates nothing before `run`."""
        self._sessions = sessions
        self._tokens = tokens
        self._connection = OwnConnection(database, "rotation")

    async def run(self) -> None:
        """Rotates until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(TICK_S)
                if due := self._due(datetime.now(UTC)):
                    await self._rotate(due)
        finally:
            await self._connection.close()

    def _due(self, now: datetime) -> list[Session]:
        due = []
        for session in self._sessions:
            if session.credential is None:
                continue
            time = self._tokens.due_time(session.credential)
            if time is None:
                session.credential = None
            elif time <= now:
                due.append(session)
                if len(due) == MOST_AT_ONCE:
                    break
        return due

    async def _rotate(self, due: Sequence[Session]) -> None:
        try:
            connection = await self._connection.get()
            with bounded(connection, TIMEOUT_S):
                async with connection.transaction():
                    neuron_ids = [session.neuron_id for session in due]
                    good = await registration.good_generations(connection, neuron_ids)
                    issued = [
                        (session, self._next(session, *good[session.neuron_id]))
                        for session in due
                        if session.neuron_id in good
                    ]
        except psycopg.Error as error:
            await self._connection.close()
            log.warning("tokens not rotated", action="rotation_retry", reason=first_line(error))
            return
        for session, token in issued:
            session.credential = None if token is None else token.neuron
            if token is not None:
                session.send(token)
        log.info("tokens rotated", action="tokens_rotated", tokens=len(issued))

    def _next(self, session: Session, lowest: int, now: datetime) -> IssuedToken | None:
        """The token behind the one that the neuron has; None if that is no longer good."""
        before = session.credential
        if before is None or before.generation < lowest or self._tokens.due_time(before) is None:
            return None
        generation = registration.newer_generation(before.generation, now)
        return self._tokens.issue(session.neuron_id, generation, now)
