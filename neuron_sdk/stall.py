"""Watches the service's own event loop: one that does not answer is reported as STALLED."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable

from neuron_sdk.logs import get_logger

STALL_LIMIT_S = 5.0
PING_S = 1.0

_log = get_logger(__name__)


class StallWatch:
    """Belongs to the control loop; made on the work loop's thread."""

    def __init__(self, on_work: Callable[[Callable[[], object]], None]) -> None:
        """`on_work` calls something on the work loop, soon."""
        self._on_work = on_work
        self._work_thread = threading.get_ident()
        self.stalled = False
        """Whether the work loop has not answered for longer than `STALL_LIMIT_S`."""

    async def run(self) -> None:
        """Ask, again and again. To be cancelled."""
        loop = asyncio.get_running_loop()
        answered = threading.Event()
        while True:
            answered.clear()
            asked = loop.time()
            self._on_work(answered.set)
            while not answered.is_set():
                await asyncio.sleep(min(PING_S, STALL_LIMIT_S))
                if loop.time() - asked > STALL_LIMIT_S and not self.stalled:
                    self.stalled = True
                    self._log_stall()
            if self.stalled:
                self.stalled = False
                _log.info(
                    "the work loop answers again",
                    action="work.back",
                    silent_s=round(loop.time() - asked, 1),
                )
            await asyncio.sleep(PING_S)

    def _log_stall(self) -> None:
        frame = sys._current_frames().get(self._work_thread)  # noqa: SLF001 - the documented way
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        _log.error(
            "the work loop has not answered: something blocks it; use await, or a handler that is "
            "no coroutine",
            action="work.stalled",
            limit_s=STALL_LIMIT_S,
            stack=stack,
        )
