"""A neuron that writes down each run of each handler: what the tests of faults judge the ledger by.

    python -m tests.support.witness

WITNESS_FOLDER is where its files are: `runs` gets a line when a run begins and one when it is
through; once `release` is there, what is held ends. CLOCK_OFFSET is how many seconds its clock is
wrong, WITNESS_PLACES how many commands it takes at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc.aio  # noqa: F401 - before anybody's clock is wrong: it reckons its deadlines by it

FOLDER = Path(os.environ.get("WITNESS_FOLDER", "."))
OFFSET_S = float(os.environ.get("CLOCK_OFFSET", "0"))


class WrongTime(ModuleType):
    """The module `time` on a machine whose clock is wrong."""

    def time(self) -> float:
        return time.time() + OFFSET_S

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


sys.modules["time"] = WrongTime("time")
from neuron_sdk import CommandContext, Neuron  # noqa: E402
from neuron_sdk import session as sdk_session  # noqa: E402
from neuron_sdk.backoff import Backoff  # noqa: E402

sys.modules["time"] = time

neuron = Neuron(
    os.environ.get("NEURON_ID", "witness"),
    type="witness",
    max_concurrent_commands=int(os.environ.get("WITNESS_PLACES", "4")),
)


def note(ctx: CommandContext, event: str) -> None:
    """One line, in one write: whole or not there, whoever is killed when."""
    line = json.dumps(
        {"command_id": ctx.command_id, "attempt": ctx.attempt, "event": event, "type": ctx.type}
    )
    file = os.open(FOLDER / "runs", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def through(ctx: CommandContext) -> dict[str, Any]:
    """The answer of every run that comes to its end."""
    note(ctx, "ended")
    return {"attempt": ctx.attempt}


@neuron.command()
async def work(ctx: CommandContext, seconds: float = 0.0) -> dict[str, Any]:
    note(ctx, "began")
    await asyncio.sleep(seconds)
    return through(ctx)


@neuron.command()
async def hold(ctx: CommandContext) -> dict[str, Any]:
    """Runs until it is released."""
    note(ctx, "began")
    while not (FOLDER / "release").exists():  # noqa: ASYNC110 - told by another process
        await asyncio.sleep(0.02)
    return through(ctx)


@neuron.command()
def steps(ctx: CommandContext, count: int) -> dict[str, Any] | None:
    """Goes on where the attempt before was."""
    note(ctx, "began")
    first = int((ctx.checkpoint or {"next": 0})["next"])
    for step in range(first, count):
        if ctx.cancelled:
            return None
        time.sleep(0.02)
        ctx.progress_sync(step / count, checkpoint={"next": step + 1})
    return through(ctx) | {"first": first}


@neuron.command()
def flaky(ctx: CommandContext, failures: int) -> dict[str, Any]:
    """Fails so many times before it succeeds."""
    note(ctx, "began")
    if ctx.attempt <= failures:
        raise RuntimeError("not yet")
    return through(ctx)


@neuron.command(isolation="process")
def apart(ctx: CommandContext, seconds: float = 0.0) -> dict[str, Any]:
    note(ctx, "began")
    time.sleep(seconds)
    return through(ctx)


@neuron.command(isolation="process")
def apart_ending(ctx: CommandContext) -> None:
    note(ctx, "began")
    os._exit(3)


@neuron.command()
def ending(ctx: CommandContext) -> dict[str, Any]:
    """Takes the whole neuron with it, the first time."""
    note(ctx, "began")
    if ctx.attempt == 1:
        ctx.progress_sync(0.5, checkpoint={"died": True})
        os._exit(3)
    return through(ctx) | {"checkpoint": ctx.checkpoint}


@neuron.command()
def stubborn(ctx: CommandContext, seconds: float) -> dict[str, Any]:
    """Ignores whatever it is told."""
    note(ctx, "began")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)
    return through(ctx)


@neuron.command()
def huge(ctx: CommandContext) -> dict[str, Any]:
    note(ctx, "began")
    return {"blob": "x" * 2**20}


def quick_backoff() -> Backoff:
    """The same behaviour at a pace that tests can wait for."""
    return Backoff(first_s=0.05, most_s=1.0)


if __name__ == "__main__":
    sdk_session.Backoff = quick_backoff  # type: ignore[attr-defined,assignment]
    neuron.run()
