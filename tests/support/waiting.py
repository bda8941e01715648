"""Waiting for a fact instead of sleeping and hoping.

A check is asked again and again until it answers something true, and that answer is returned. A
check may also assert: an AssertionError means "not yet". Any other exception is a broken test and
comes through at once. When the time is over the failure says what was awaited and what was seen.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, overload

T = TypeVar("T")

_FIRST_PAUSE = 0.005  # seconds: most facts are there almost at once
_LONGEST_PAUSE = 0.1  # seconds: the slow ones need not be asked for more often


@overload
async def eventually(
    check: Callable[[], Coroutine[Any, Any, T | None]], *, within: float = ..., describe: str = ...
) -> T: ...


@overload
async def eventually(
    check: Callable[[], T | None], *, within: float = ..., describe: str = ...
) -> T: ...


async def eventually(
    check: Callable[[], Any], *, within: float = 10.0, describe: str = "the awaited fact"
) -> Any:
    """Return the first true answer of `check`, a function or a coroutine function.

    Args:
        check: takes nothing; its answer is awaited if it can be. One that hangs is "not yet".
        within: seconds until it must have answered.
        describe: what is awaited, for the failure's message.

    Raises:
        AssertionError: the time is over.
    """
    deadline = time.monotonic() + within
    seen: Any = "no answer at all"
    for pause in _pauses(deadline):
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), _LONGEST_PAUSE)):
                seen = check()
                if inspect.isawaitable(seen):
                    awaited, seen = seen, "no answer at all"
                    seen = await awaited
            if seen:
                return seen
        except TimeoutError:
            if time.monotonic() < deadline:
                raise  # the check's own
        except AssertionError as error:
            seen = error
        await asyncio.sleep(pause)
    raise _too_late(describe, within, seen)


def eventually_sync(
    check: Callable[[], T | None], *, within: float = 10.0, describe: str = "the awaited fact"
) -> T:
    """Return the first true answer of `check`; the twin of `eventually` without a loop."""
    deadline = time.monotonic() + within
    seen: object = "no answer at all"
    for pause in _pauses(deadline):
        try:
            answer = seen = check()
            if answer:
                return answer
        except AssertionError as error:
            seen = error
        time.sleep(pause)
    raise _too_late(describe, within, seen)


def _pauses(deadline: float) -> Iterator[float]:
    """How long to wait after each asking; the last one ends at the deadline, not before it."""
    pause = _FIRST_PAUSE
    while True:
        left = deadline - time.monotonic()
        yield min(pause, max(left, 0.0))
        if left <= 0:
            return
        pause = min(pause * 2, _LONGEST_PAUSE)


def _too_late(describe: str, within: float, seen: object) -> AssertionError:
    failure = AssertionError(f"{describe}: not within {within:g} s; last seen: {seen!r}")
    if isinstance(seen, AssertionError):
        failure.__cause__ = seen
    return failure
