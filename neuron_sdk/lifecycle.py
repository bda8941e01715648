"""How a neuron starts and ends: in the main thread, in somebody's loop, or beside a program.

The order is always the same. Start: STATE_DIR, control thread, `on_start` hooks, workers and
checks, then commands. End: commands, workers, `on_stop` hooks, the last report, what the spool
still holds, Goodbye. Signals belong to `run_in_main_thread` alone.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from neuron_sdk.errors import IsolatedImport, LifecycleError
from neuron_sdk.isolation import IN_CHILD
from neuron_sdk.logs import get_logger
from neuron_sdk.mode import Mode
from neuron_sdk.restart import execute_again

if TYPE_CHECKING:
    from neuron_sdk.dependencies import DependencyChecks
    from neuron_sdk.runtime import Runtime
    from neuron_sdk.workers import Workers

Hook = Callable[[], Awaitable[None] | None]

_FORCE_AFTER_S = 5.0
_EXIT_FORCED = 70  # EX_SOFTWARE

_log = get_logger(__name__)


class Service(Protocol):
    """What a lifecycle needs of a neuron."""

    @property
    def on_start_hooks(self) -> Sequence[Hook]: ...
    @property
    def on_stop_hooks(self) -> Sequence[Hook]: ...
    @property
    def workers(self) -> Workers: ...
    @property
    def checks(self) -> DependencyChecks: ...

    def open_runtime(self, loop: asyncio.AbstractEventLoop, *, mode: Mode) -> Runtime: ...


def refuse_isolated() -> None:
    """Raises IsolatedImport in the process of an isolated handler: there no neuron runs."""
    if os.environ.get(IN_CHILD):
        raise IsolatedImport


async def serve(
    service: Service,
    *,
    mode: Mode = Mode.BESIDE,
    opened: Callable[[Runtime], None] = lambda _: None,
    ready: Callable[[], None] = lambda: None,
) -> Runtime:
    """Run in this loop until the neuron is told to stop; returns when nothing of it runs.

    Args:
        service: the neuron.
        mode: what the neuron is to its process.
        opened: told of the runtime as soon as it exists.
        ready: told when the service has started.

    Raises:
        ConfigError: a setting cannot be used.
        Exception: whatever an `on_start` hook raised.
        CancelledError: the caller was cancelled; the neuron has stopped in order.
    """
    runtime = service.open_runtime(asyncio.get_running_loop(), mode=mode)
    opened(runtime)
    end_checks = asyncio.Event()
    checks = asyncio.create_task(service.checks.run(end_checks), name="dependency-checks")
    stopped = asyncio.create_task(runtime.commands_stopped.wait(), name="stopped")
    failure: BaseException | None = None
    try:
        if await _start(service, stopped):
            runtime.ready()
            ready()
            await asyncio.shield(stopped)
    except BaseException as error:  # noqa: BLE001 - raised again once all has ended
        failure = error
        runtime.request_stop(_why(error))
    ending = asyncio.create_task(_end(service, runtime, stopped), name="neuron-end")
    while not ending.done():
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError as error:
            # Cancelled once more: it ends in order all the same, only faster.
            failure = failure or error
            runtime.hurry()
    end_checks.set()
    await checks
    if failure is not None:
        raise failure
    return runtime


async def _start(service: Service, stopped: asyncio.Task[bool]) -> bool:
    """The service's own start. False if it was told to stop meanwhile."""
    start = asyncio.create_task(_call_hooks(service.on_start_hooks), name="on-start")
    try:
        await asyncio.wait({start, stopped}, return_when="FIRST_COMPLETED")
        if not start.done():
            return False
        start.result()
        service.workers.start()
    finally:
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
    return True


async def _end(service: Service, runtime: Runtime, stopped: asyncio.Task[bool]) -> None:
    await stopped
    await service.workers.stop()
    for hook in service.on_stop_hooks:
        try:
            await _call_hooks([hook])
        except Exception:  # noqa: BLE001 - logged; the neuron must end all the same
            _log.exception("an on_stop hook failed", action="neuron.hook_failed")
    runtime.work_done()
    await asyncio.wrap_future(runtime.closed)
    _log.info("stopped", action="neuron.stopped", reason=runtime.stop_reason)


async def _call_hooks(hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        answer = hook()
        if inspect.isawaitable(answer):
            await answer


def _why(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return f"its start failed: {type(error).__name__}: {error}"


def run_in_main_thread(service: Service, mode: Mode) -> str:
    """Run until SIGTERM, SIGINT or a command stops the neuron, or nothing is left to do. A restart
    replaces the process; if that fails the neuron runs again in this one, and the restart's
    command says why.

    Returns:
        Why it failed, for people; "" if it did not.

    Raises:
        LifecycleError: this is not the main thread, or a loop runs in it already.
        ConfigError: a setting cannot be used.
    """
    refuse_isolated()
    if threading.current_thread() is not threading.main_thread():
        raise LifecycleError("neuron.run() belongs in the main thread: use neuron.start() here")
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise LifecycleError("an event loop runs here already: use `await neuron.serve()`")
    folder = Path.cwd()
    while (runtime := _run(service, mode, folder)).restart_wanted:
        _execute_again(runtime, folder)
    return runtime.failure


def _run(service: Service, mode: Mode, folder: Path) -> Runtime:
    left = threading.Event()
    with _signals() as opened:

        def on_open(runtime: Runtime) -> None:
            opened(runtime)
            threading.Thread(target=_force, args=(runtime, left, folder), daemon=True).start()

        runtime = asyncio.run(serve(service, mode=mode, opened=on_open))
        left.set()
    return runtime


def _execute_again(runtime: Runtime, folder: Path) -> None:
    """Returns if it cannot be done, once the restart's command says so."""
    _log.info("starting again", action="neuron.restart")
    error = execute_again(folder)
    _log.error("the program cannot be executed", action="neuron.restart_failed", error=str(error))
    runtime.note_failed_restart(f"the program cannot be executed again: {error}")


@contextmanager
def _signals() -> Iterator[Callable[[Runtime], None]]:
    """SIGTERM and SIGINT: the first stops in order, the second at once. Plain signal handlers,
    because those of asyncio would wait for a loop that a handler may be blocking.
    """
    runtimes: list[Runtime] = []
    seen: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        seen.append(name)
        if not runtimes:
            raise SystemExit(128 + number)
        # Not on this thread: the handler may have interrupted code that holds a lock.
        act = (
            runtimes[0].hurry
            if len(seen) > 1
            else lambda: runtimes[0].request_stop(f"stopped by {name}")
        )
        threading.Thread(target=act, name="neuron-signal", daemon=True).start()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield runtimes.append
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


def _force(runtime: Runtime, left: threading.Event, folder: Path) -> None:
    """Once the neuron has closed its process must end, even if a handler blocks its loop."""
    runtime.closed.result()
    if not left.wait(_FORCE_AFTER_S):
        _log.error("the service does not end: it is cut off", action="neuron.forced")
        if runtime.restart_wanted:
            _execute_again(runtime, folder)
        os._exit(_EXIT_FORCED)


class Background:
    """A neuron beside a program: its work loop is in a thread of its own."""

    def __init__(self, service: Service) -> None:
        """Starts it; returns when it has started.

        Raises:
            ConfigError: a setting cannot be used.
            Exception: whatever an `on_start` hook raised.
        """
        refuse_isolated()
        self._runtime: Future[Runtime] = Future()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(service,), name="neuron-work", daemon=True
        )
        self._thread.start()
        self._started.result()

    def stop(self, timeout_s: float) -> None:
        """Stop in order and wait for it. Raises TimeoutError if it takes longer."""
        runtime = self._runtime.result()
        runtime.request_stop("stopped by the program")
        deadline = time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the neuron has not stopped within {timeout_s:g} s")
        runtime.closed.result(max(0.0, deadline - time.monotonic()))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def _work(self, service: Service) -> None:
        try:
            asyncio.run(
                serve(
                    service,
                    opened=self._runtime.set_result,
                    ready=lambda: self._started.set_result(None),
                )
            )
        except BaseException as error:  # noqa: BLE001 - logged, or told to who started it
            if not self._started.done():
                self._started.set_exception(error)
            else:
                _log.exception("the neuron ended", action="neuron.broken")
        else:
            if not self._started.done():
                self._started.set_exception(LifecycleError("it was stopped before it had started"))
