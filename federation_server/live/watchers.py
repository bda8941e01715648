"""Who waits for a command's next change on this server.

A watcher is only woken; what changed it reads from the ledger. So a wake-up too many is harmless,
and one that another server could not give is made up for by the watcher's own slow look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CommandWatchers:
    """The watchers of each command."""

    def __init__(self) -> None:
        """Nobody watches anything."""
        self._events: dict[str, set[asyncio.Event]] = {}
        self.closed = False

    @contextmanager
    def watching(self, command_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the command may have changed."""
        event = asyncio.Event()
        self._events.setdefault(command_id, set()).add(event)
        try:
            yield event
        finally:
            events = self._events[command_id]
            events.discard(event)
            if not events:
                del self._events[command_id]

    def wake(self, command_ids: Iterable[str]) -> None:
        """Wakes the watchers of those commands."""
        for command_id in command_ids:
            for event in self._events.get(command_id, ()):
                event.set()

    def close(self) -> None:
        """Wakes every watcher, to find that this is `closed` and to end."""
        self.closed = True
        for events in self._events.values():
            for event in events:
                event.set()
