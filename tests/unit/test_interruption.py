"""What a call waits for is ended with an error, by whoever ends it, and by nobody else."""

from __future__ import annotations

import asyncio

import pytest

from federation_server.rpc.interruption import Interruptible
from tests.support.waiting import eventually


class Over(Exception):
    pass


class Call:
    """A task that waits for its event as often as it can."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.waits = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        self.interruptible = Interruptible()
        while True:
            self.waits += 1
            await self.interruptible.wait(self.event.wait)
            self.event.clear()

    async def begun(self) -> Call:
        await eventually(lambda: self.waits)
        return self


async def test_who_waits_gets_the_error_and_its_task_is_not_cancelled() -> None:
    call = await Call().begun()
    call.interruptible.end(Over("first"))
    call.interruptible.end(Over("second"))
    with pytest.raises(Over, match="first"):
        await call.task
    assert not call.task.cancelling()


async def test_who_comes_later_gets_the_error_before_anything_is_begun() -> None:
    own = Interruptible()
    own.end(Over())
    begun = asyncio.Event()

    async def begin() -> None:
        begun.set()

    with pytest.raises(Over):
        await own.wait(begin)
    assert not begun.is_set()


async def test_what_came_in_time_is_had_and_what_is_not_waited_for_is_not_cancelled() -> None:
    own = Interruptible()
    assert await own.wait(lambda: asyncio.sleep(0, "answer")) == "answer"
    own.end(Over())
    await asyncio.sleep(0)  # a cancellation would arrive here


async def test_a_task_that_is_cancelled_is_cancelled() -> None:
    call = await Call().begun()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task


@pytest.mark.parametrize("first", ["end", "cancel"])
async def test_a_task_that_is_cancelled_and_ended_at_once_is_cancelled(first: str) -> None:
    call = await Call().begun()
    if first == "cancel":
        call.task.cancel()
    call.interruptible.end(Over())
    if first == "end":
        call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
