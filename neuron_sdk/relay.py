"""Progress on its way from a handler to the journal: newest only, and not too often.

A checkpoint goes at once, and whoever told it learns when it is kept. It is never lost to newer
progress, which takes it along.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from neuron_sdk.context import Progress
from neuron_sdk.errors import CommandInterrupted

INTERVAL_S = 0.5


class ProgressRelay:
    """Passes on the newest progress of one command, at most one each `INTERVAL_S`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pass_on: Callable[[Progress], Future[None]]
    ) -> None:
        """`pass_on` is called on `loop`; its answer is done when the progress is on disk."""
        self._loop = loop
        self._pass_on = pass_on
        self._lock = threading.Lock()
        self._newest: Progress | None = None
        self._waiting: list[Future[None]] = []
        self._under_way = False
        self._closed = False
        self._last = -INTERVAL_S

    def tell(self, progress: Progress) -> Future[None] | None:
        """Take a progress, in any thread. A call that only replaces an older one costs nothing.

        Returns:
            What is done when the checkpoint is on disk; None for a progress without one.

        Raises:
            CommandInterrupted: the command has ended, and there is a checkpoint.
        """
        if progress.checkpoint is None:
            self._tell(progress)
            return None
        return self._keep(progress)

    def _tell(self, progress: Progress) -> None:
        with self._lock:
            if self._closed:
                return
            if self._newest is not None:
                progress = replace(progress, checkpoint=self._newest.checkpoint)
            self._newest = progress
            if self._under_way:
                return
            self._under_way = True
        self._call_soon(self._flush_in_time)

    def _keep(self, progress: Progress) -> Future[None]:
        kept: Future[None] = Future()
        with self._lock:
            taken = not self._closed
            if taken:
                self._newest = progress
                self._waiting.append(kept)
        if not taken or not self._call_soon(self._flush):
            raise CommandInterrupted("the command has ended: no checkpoint is taken any more")
        return kept

    def _call_soon(self, call: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            return False  # the neuron has stopped
        return True

    def close(self) -> None:
        """The command has ended: pass on the newest checkpoint, and nothing after it. On `loop`."""
        with self._lock:
            self._closed = True
            if self._newest is not None and self._newest.checkpoint is None:
                self._newest = None
        self._flush()

    def _flush_in_time(self) -> None:
        self._loop.call_at(max(self._last + INTERVAL_S, self._loop.time()), self._flush_due)

    def _flush_due(self) -> None:
        with self._lock:
            self._under_way = False
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, None
            waiting, self._waiting = self._waiting, []
        if newest is None:
            return
        self._last = self._loop.time()
        self._pass_on(newest).add_done_callback(lambda done: _tell_all(waiting, done))


def _tell_all(waiting: list[Future[None]], done: Future[None]) -> None:
    error = done.exception()
    for kept in waiting:
        if not kept.set_running_or_notify_cancel():
            continue
        if error is None:
            kept.set_result(None)
        else:
            kept.set_exception(error)
