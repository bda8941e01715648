"""Handlers that the tests run in processes of their own: such a process has to import them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from neuron_sdk import CommandContext, CommandFailed


def add(ctx: CommandContext, a: int, b: int) -> dict[str, int]:
    ctx.progress_sync(0.5, "adding")
    ctx.log.info("added", by=os.getpid())
    return {"sum": a + b, "pid": os.getpid()}


async def add_async(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


def fail_as_said() -> None:
    raise CommandFailed("NO_LUCK", "not today", {"day": 5})


def fail_by_surprise() -> None:
    raise RuntimeError("boom")


def exit_early() -> None:
    sys.exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(marker: str) -> None:
    with open(marker, "w") as file:  # noqa: PTH123 - as plain as can be
        file.write(str(os.getpid()))
    while True:
        time.sleep(0.01)


async def wait_for_cancel(marker: str) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        with open(marker, "w") as file:  # noqa: PTH123, ASYNC230 - as plain as can be
            file.write("cleaned up")
