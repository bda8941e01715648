"""Ends what a call waits for, with an error of ours.

`asyncio.timeout` does that too, at the cost of an object, a timer and its end for each wait; a
stream waits for each of its messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Interruptible:
    """What one task waits for; made in that task."""

    __slots__ = ("_error", "_task", "_waits")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._task = task
        self._error: Exception | None = None
        self._waits = False

    def end(self, error: Exception) -> None:
        """Whoever waits gets that error, now or when he comes; a second one is left out."""
        if self._error is None:
            self._error = error
            if self._waits:
                self._task.cancel()

    async def wait(self, begin: Callable[[], Awaitable[T]]) -> T:
        """Waits for what `begin` gives.

        Raises:
            Exception: what `end` was called with.
        """
        self._check()
        self._waits = True
        try:
            return await begin()
        except asyncio.CancelledError:
            if self._error is None or self._task.uncancel():  # cancelled by somebody else, too
                raise
            raise self._error from None
        finally:
            self._waits = False

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
