"""What every client of `commands.py` does alike, whatever it talks to. The standard library alone:
clients run in two environments.

It warms up, prints `go`, and then keeps so many jobs under way, each issued when an earlier one's
result has been seen. The last line is JSON: how many jobs were done, the seconds of them all, and
the milliseconds of each, from just before it is issued to its result.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence

Job = Callable[[int], Awaitable[None]]
"""Does the job of that number: returns when its result has been seen, and raises if it is wrong."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every client has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--jobs", type=int, default=500)
    made.add_argument("--warm-up", type=int, default=50, help="jobs before the first that counts")
    made.add_argument("--in-flight", type=int, default=1, help="jobs under way at a time")
    return made


async def closed_loop(job: Job, arguments: argparse.Namespace) -> None:
    """Warms up, does the jobs, and prints what came out."""
    await _do(job, arguments.warm_up, arguments.in_flight)
    print("go", flush=True)
    began = time.perf_counter()
    taken_ms = await _do(job, arguments.jobs, arguments.in_flight)
    report(arguments.jobs, time.perf_counter() - began, taken_ms)


async def _do(job: Job, jobs: int, in_flight: int) -> list[float]:
    numbers = itertools.count()
    taken_ms: list[float] = []

    async def one_after_the_other() -> None:
        while (number := next(numbers)) < jobs:
            began = time.perf_counter()
            await job(number)
            taken_ms.append((time.perf_counter() - began) * 1000)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(in_flight, jobs)):
            group.create_task(one_after_the_other())
    return taken_ms


def report(jobs: int, seconds: float, taken_ms: Sequence[float] = ()) -> None:
    """Prints the last line."""
    print(json.dumps({"jobs": jobs, "seconds": seconds, "ms": list(taken_ms)}), flush=True)
