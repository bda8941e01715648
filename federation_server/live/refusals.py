"""Attempts that were refused, on their way into the audit log.

What was refused has changed nothing, so its entry need not wait for a transaction of its own, and
nobody waits for it: it is written within a second. Whoever tries again and again fills no disk:
those that are alike make one entry at once and then one a minute, with their number. Strangers are
alike by address and reason, whatever they ask for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import psycopg
import structlog

from federation_server.domain.audit import STRANGER, Entry, neighbourhood
from federation_server.store import audit
from federation_server.store.database import Database, OwnConnection, bounded, first_line

log = structlog.get_logger(__name__)

INTERVAL_S = 0.5
"""How long an entry waits for others to be written with."""

PAUSE_S = 60.0
"""How long those that are alike are counted before they make another entry."""

MOST_GROUPS = 1000
"""How many kinds are told apart; those beyond are told apart by their reason alone."""

WRITE_TIMEOUT_S = 10.0
LAST_WRITE_S = 1.0

_Kind: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """Attempts that are alike: those that wait to be written, as one entry."""

    waiting: Entry | None
    """With their number; None: there are none."""
    free_at: float = 0.0
    """When the next entry may be written."""


class Refusals:
    """Writes down what was refused."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Writes nothing before `run`; `clock` is in seconds."""
        self._connection = OwnConnection(database, "audit", shared=True)
        self._clock = clock
        self._groups: dict[_Kind, _Group] = {}
        self._writing = asyncio.Lock()

    def note(self, entry: Entry) -> None:
        """Takes the entry of an attempt."""
        kind = _kind(entry)
        if kind not in self._groups and len(self._groups) >= MOST_GROUPS:
            kind = ("", entry.outcome, entry.reason)
        group = self._groups.setdefault(kind, _Group(None))
        if group.waiting is not None:
            count = group.waiting.count + entry.count
            entry = replace(group.waiting.together(entry), count=count)
        group.waiting = entry

    async def run(self) -> None:
        """Writes until it is cancelled. What cannot be written waits, as numbers."""
        try:
            while True:
                await asyncio.sleep(INTERVAL_S)
                try:
                    await self._write(self._due(), within_s=WRITE_TIMEOUT_S)
                except psycopg.Error as error:
                    log.warning(
                        "audit log not written", action="audit_retry", reason=first_line(error)
                    )
        finally:
            await self._connection.close()

    async def finish(self) -> None:
        """Writes all that waits, once, whether or not its time has come."""
        try:
            waiting = {kind: each for kind, each in self._groups.items() if each.waiting}
            await self._write(waiting, within_s=LAST_WRITE_S)
        except psycopg.Error as error:
            log.warning("audit log not written", action="audit_lost", reason=first_line(error))

    def _due(self) -> dict[_Kind, _Group]:
        """Those that may be written now; groups that nobody has come to for a while end."""
        now = self._clock()
        over = {kind: group for kind, group in self._groups.items() if group.free_at <= now}
        for kind, group in over.items():
            if group.waiting is None:
                del self._groups[kind]
        return {kind: group for kind, group in over.items() if group.waiting}

    async def _write(self, groups: dict[_Kind, _Group], *, within_s: float) -> None:
        async with self._writing:
            taken = {kind: each.waiting for kind, each in groups.items() if each.waiting}
            if not taken:
                return
            try:
                connection = await self._connection.get()
                with bounded(connection, within_s):
                    await audit.insert(connection, list(taken.values()))
            except psycopg.Error:
                await self._connection.close()
                raise
            free_at = self._clock() + PAUSE_S
            for kind, written in taken.items():
                group = groups[kind]
                group.free_at = free_at
                more = group.waiting
                assert more is not None, "only a write takes from a group"
                count = more.count - written.count  # those that have come meanwhile
                group.waiting = replace(more, count=count) if count else None


def _kind(entry: Entry) -> _Kind:
    """What makes attempts alike."""
    alike = (neighbourhood(entry.peer), entry.outcome, entry.reason)
    if entry.actor == STRANGER or entry.outcome == "UNAUTHENTICATED":
        return alike
    return (*alike, entry.actor, entry.method, entry.object_type, entry.object_id, entry.neuron_id)
