"""Blocking calls off an event loop, in daemon threads.

asyncio.to_thread would do, but its threads are joined when the interpreter ends: a disk that
hangs would then keep the service from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def offload(call: Callable[[], T], name: str = "neuron-offload") -> T:
    """Call it in a thread of its own and return its answer. Cancelling abandons the thread."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(answer)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)
