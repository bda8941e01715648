"""The service's background work: coroutines that run beside the commands, for as long as it does.

A worker that raises is logged and started again, with growing waits; one that returns is done.
All of it happens on the work loop.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

from neuron_sdk.backoff import Backoff
from neuron_sdk.errors import HandlerError
from neuron_sdk.logs import get_logger

Worker = Callable[[], Awaitable[None]]
_STOP_GRACE_S = 5.0
_log = get_logger(__name__)


class Workers:
    """The workers of one neuron, unique by name."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, worker: Worker) -> None:
        """Take a coroutine function without parameters.

        Raises:
            HandlerError: it is none, or its name is taken.
        """
        name = getattr(worker, "__name__", repr(worker))
        if not inspect.iscoroutinefunction(worker):
            raise HandlerError(f"worker {name}: make it a coroutine function (async def)")
        if inspect.signature(worker).parameters:
            raise HandlerError(f"worker {name}: take no parameters")
        if name in self._workers:
            raise HandlerError(f"worker {name} exists already: choose another name")
        self._workers[name] = worker

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._workers)

    def start(self) -> None:
        """Start those that do not run, on the running loop."""
        for name, worker in self._workers.items():
            if name not in self._tasks or self._tasks[name].done():
                self._tasks[name] = asyncio.create_task(_keep(name, worker), name=f"worker:{name}")

    async def stop(self, name: str | None = None) -> list[str]:
        """Cancel one or all, and wait for them; returns the names of those that ran."""
        chosen = [name] if name is not None else list(self._tasks)
        tasks = {key: task for key in chosen if (task := self._tasks.pop(key, None)) is not None}
        running = [task for task in tasks.values() if not task.done()]
        for task in running:
            task.cancel()
        if running:
            _, late = await asyncio.wait(running, timeout=_STOP_GRACE_S)
            for task in late:
                _log.warning("worker does not end", action="worker.stuck", worker=task.get_name())
        return list(tasks)

    async def restart(self, name: str | None = None) -> list[str]:
        """Cancel one or all and start them anew; returns their names."""
        await self.stop(name)
        self.start()
        return [name] if name is not None else list(self._workers)


async def _keep(name: str, worker: Worker) -> None:
    backoff = Backoff(first_s=1.0, most_s=60.0)
    while True:
        backoff.opened(time.monotonic())
        try:
            await worker()
        except Exception:  # noqa: BLE001 - logged, and tried again
            wait = backoff.next_s(time.monotonic())
            _log.exception(
                "worker failed", action="worker.failed", worker=name, retry_s=round(wait, 1)
            )
            await asyncio.sleep(wait)
        else:
            _log.info("worker is done", action="worker.done", worker=name)
            return
