"""Handlers that the tests run in processes of their own: such a process has to import them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time

from neuron_sdk import CommandContext, CommandFailed, CommandInterrupted


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


def hang(ctx: CommandContext, marker: str) -> None:
    note(marker, str(os.getpid()))
    ctx.progress_sync(0.1)
    while True:
        time.sleep(0.01)


def note(marker: str, text: str) -> None:
    with open(marker, "w") as file:  # noqa: PTH123 - as plain as can be
        file.write(text)


async def wait_for_cancel(ctx: CommandContext, marker: str) -> None:
    ctx.log.info("running")
    try:
        note(marker, str(os.getpid()))
        await ctx.progress(0.1)
        await asyncio.sleep(60)
    finally:
        note(marker, f"cleaned up: {ctx.cancel_reason}")


def sleep_and_clean_up(ctx: CommandContext, marker: str) -> None:
    ctx.log.info("running")
    try:
        note(marker, str(os.getpid()))
        time.sleep(60)
    except CommandInterrupted:
        note(marker, f"interrupted: {ctx.cancel_reason}")


def deaf(ctx: CommandContext, marker: str) -> None:
    ctx.log.info("running")
    note(marker, str(os.getpid()))
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def go_on(ctx: CommandContext) -> dict[str, int]:
    begun = 0 if ctx.checkpoint is None else int(ctx.checkpoint["rows"])
    ctx.progress_sync(0.1, "read", checkpoint={"rows": begun + 10})
    if ctx.attempt < ctx.max_attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"begun": begun, "attempts": ctx.max_attempts}


async def go_on_async(ctx: CommandContext) -> dict[str, int]:
    begun = 0 if ctx.checkpoint is None else int(ctx.checkpoint["rows"])
    await ctx.progress(0.1, "read", checkpoint={"rows": begun + 10})
    if ctx.attempt < ctx.max_attempts:
        os._exit(3)
    return {"begun": begun, "attempts": ctx.max_attempts}
