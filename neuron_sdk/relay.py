"""Progress on its way from a handler to the journal: newest only, and not too often."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from neuron_sdk.context import Progress

INTERVAL_S = 0.5


class ProgressRelay:
    """Passes on the newest progress of one command, at most one each `INTERVAL_S`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pass_on: Callable[[Progress], None]
    ) -> None:
        """`pass_on` is called on `loop`."""
        self._loop = loop
        self._pass_on = pass_on
        self._lock = threading.Lock()
        self._newest: Progress | None = None
        self._under_way = False
        self._closed = False
        self._last = -INTERVAL_S

    def tell(self, progress: Progress) -> None:
        """Take a progress, in any thread. A call that only replaces an older one costs nothing."""
        with self._lock:
            self._newest = progress
            if self._under_way or self._closed:
                return
            self._under_way = True
        try:
            self._loop.call_soon_threadsafe(self._flush_in_time)
        except RuntimeError:
            return  # the neuron has stopped

    def close(self) -> None:
        """Pass on nothing more: the command has ended."""
        with self._lock:
            self._closed = True
            self._newest = None

    def _flush_in_time(self) -> None:
        self._loop.call_at(max(self._last + INTERVAL_S, self._loop.time()), self._flush)

    def _flush(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, None
            self._under_way = False
            if self._closed or newest is None:
                return
        self._last = self._loop.time()
        self._pass_on(newest)
