"""Whether what a service needs is there: checks that run on intervals of their own.

A check that fails, hangs or blocks harms nobody: it runs in a task (a plain function in a daemon
thread), has a timeout, and is not started again before it has returned. `run` belongs in one
event loop; `status` may be called by any thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Final, cast

from neuron_sdk.checks import http, tcp
from neuron_sdk.redaction import redact_text

__all__ = [
    "DEFAULT_INTERVAL",
    "DEFAULT_TIMEOUT",
    "Answer",
    "Check",
    "DependencyChecks",
    "DependencyResult",
    "DependencyState",
    "http",
    "tcp",
]

DEFAULT_INTERVAL: Final = 30.0
"""Seconds between two runs of a check."""
DEFAULT_TIMEOUT: Final = 5.0
"""Seconds that a check may take."""

_JITTER = 0.1
_SECONDS_TO_END = 1.0

# The contract's limits.
_MAX_CHECKS = 128
_MAX_NAME = 128
_MAX_MESSAGE = 1_024


class DependencyState(Enum):
    """How a dependency is; named as in the contract."""

    UP = "UP"
    """It works."""
    DEGRADED = "DEGRADED"
    """It works badly."""
    DOWN = "DOWN"
    """It does not work, or did not answer in time."""
    UNKNOWN = "UNKNOWN"
    """It was not checked yet, or the check's answer means nothing."""


Answer = bool | DependencyState | None
"""What a check may return; None means UP. To say why something is DOWN, it raises."""

Check = Callable[[], Answer] | Callable[[], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class DependencyResult:
    """How one dependency was when it was last checked: a DependencyStatus of the contract."""

    name: str
    state: DependencyState
    latency_ms: float = 0.0
    """How long the check took."""
    message: str = ""
    """What is wrong, for people; without secrets."""
    check_time: datetime | None = None
    """When it was checked, in UTC; None before the first time."""
    required: bool = True
    """Whether the service is unhealthy without it."""


class DependencyChecks:
    """The checks of one neuron. Register first, then run."""

    def __init__(self) -> None:
        self._checks: dict[str, _RegisteredCheck] = {}
        self._running = False

    def register(
        self,
        name: str,
        check: Check,
        *,
        interval: float = DEFAULT_INTERVAL,
        timeout: float = DEFAULT_TIMEOUT,
        required: bool = True,
    ) -> None:
        """Add a check: a function or a coroutine function that takes nothing.

        Args:
            name: the dependency's name, 1 to 128 characters, not used yet.
            check: returns True, None or UP if all is well, False or another state if not, or
                raises with the reason.
            interval: seconds from one run to the next, give or take a tenth.
            timeout: seconds after which a run counts as DOWN.
            required: whether the service is unhealthy without the dependency.

        Raises:
            ValueError: an argument cannot be used.
            RuntimeError: the checks are running.
        """
        if self._running:
            raise RuntimeError(f"dependency {name!r} comes too late: register before the start")
        if not 1 <= len(name) <= _MAX_NAME or not name.isprintable():
            raise ValueError(f"dependency name {name!r}: use 1 to {_MAX_NAME} printable characters")
        if name in self._checks:
            raise ValueError(f"dependency {name!r} is registered already: choose another name")
        if len(self._checks) >= _MAX_CHECKS:
            raise ValueError(f"dependency {name!r} is one too many: use at most {_MAX_CHECKS}")
        for argument, seconds in (("interval", interval), ("timeout", timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{argument} of dependency {name!r}: use seconds above 0")
        if not _takes_nothing(check):
            raise ValueError(f"check of dependency {name!r}: use a function without parameters")
        self._checks[name] = _RegisteredCheck(name, check, interval, timeout, required=required)

    def names(self) -> tuple[str, ...]:
        """The dependencies' names, in the order of their registration."""
        return tuple(self._checks)

    def status(self) -> tuple[DependencyResult, ...]:
        """How each dependency was when it was last checked."""
        return tuple(check.result for check in self._checks.values())

    async def run(self, stop: asyncio.Event) -> None:
        """Check each dependency at once, then on its interval, until `stop` is set."""
        self._running = True
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(check.keep_checking(), name=f"dependency:{name}")
                    for name, check in self._checks.items()
                ]
                await stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            self._running = False


class _RegisteredCheck:
    """One check, its newest result and its run under way."""

    def __init__(
        self, name: str, check: Check, interval: float, timeout: float, *, required: bool
    ) -> None:
        self.result = DependencyResult(
            name, DependencyState.UNKNOWN, message="not checked yet", required=required
        )
        self._check = check
        self._interval = interval
        self._timeout = timeout
        self._run: asyncio.Task[Answer] | None = None
        self._call: concurrent.futures.Future[Answer | Awaitable[Answer]] | None = None
        self._started = 0.0

    async def keep_checking(self) -> None:
        try:
            while True:
                await self.check_once()
                jitter = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - not a secret
                await asyncio.sleep(self._interval * jitter)
        finally:
            await self._abandon()

    async def check_once(self) -> None:
        """One run, or a look at the one that still hangs."""
        if not self._is_hanging():
            self._started = time.monotonic()
            self._run = asyncio.create_task(self._ask(), name=f"check:{self.result.name}")
            self._run.add_done_callback(_retrieve)
            await asyncio.wait({self._run}, timeout=self._timeout)
        elapsed = time.monotonic() - self._started
        state, message = self._judge(elapsed)
        self.result = replace(
            self.result,
            state=state,
            latency_ms=elapsed * 1_000,
            message=redact_text(message)[:_MAX_MESSAGE],
            check_time=datetime.now(UTC),
        )

    def _is_hanging(self) -> bool:
        return any(work is not None and not work.done() for work in (self._run, self._call))

    def _judge(self, elapsed: float) -> tuple[DependencyState, str]:
        run = self._run
        if run is None or self._is_hanging():
            if run is not None:
                run.cancel()  # a thread goes on: nothing can end it
            return DependencyState.DOWN, f"no answer for {elapsed:.3g} s"
        if run.cancelled():
            return DependencyState.UNKNOWN, "the check was cancelled"
        error = run.exception()
        if error is not None:
            return DependencyState.DOWN, f"{type(error).__name__}: {error}".removesuffix(": ")
        return _meaning(run.result())

    async def _ask(self) -> Answer:
        if inspect.iscoroutinefunction(self._check):
            try:
                return cast(Answer, await self._check())
            except (SystemExit, KeyboardInterrupt) as error:
                raise _harmless(error) from None
        answer = await self._in_thread()
        return await answer if inspect.isawaitable(answer) else answer

    async def _in_thread(self) -> Answer | Awaitable[Answer]:
        """Run a plain function in a daemon thread, which cannot keep the process from ending."""
        call: concurrent.futures.Future[Answer | Awaitable[Answer]] = concurrent.futures.Future()
        call.set_running_or_notify_cancel()  # from here on a cancelled task cannot cancel it

        def work() -> None:
            try:
                call.set_result(self._check())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                call.set_exception(_harmless(error))

        self._call = call
        threading.Thread(target=work, name=f"check:{self.result.name}", daemon=True).start()
        return await asyncio.wrap_future(call)

    async def _abandon(self) -> None:
        if self._run is not None and not self._run.done():
            self._run.cancel()
            await asyncio.wait({self._run}, timeout=_SECONDS_TO_END)


def _takes_nothing(check: object) -> bool:
    if not callable(check):
        return False
    try:
        inspect.signature(check).bind()
    except TypeError:
        return False
    except ValueError:  # some built-in functions do not tell
        return True
    return True


def _meaning(answer: object) -> tuple[DependencyState, str]:
    match answer:
        case None | True:
            return DependencyState.UP, ""
        case False:
            return DependencyState.DOWN, "the check answered False"
        case DependencyState():
            return answer, ""
        case _:
            return DependencyState.UNKNOWN, (
                f"the check answered {type(answer).__name__}: "
                "it must answer a bool, a DependencyState or None"
            )


def _harmless(error: BaseException) -> Exception:
    """The error, or one in its place that does not end the event loop or confuse a future."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"the check raised {type(error).__name__}")


def _retrieve(run: asyncio.Task[Answer]) -> None:
    """Look at a late run's exception, so that asyncio does not complain that nobody did."""
    if not run.cancelled():
        run.exception()
