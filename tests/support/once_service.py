"""The neuron that the tests of `neuron run --once` run: it does what tests tell it by files.

    neuron run --once tests.support.once_service:neuron

ONCE_FOLDER is where its files are: `release` lets held commands end; `runs` gets a line for each
held command that starts. ONCE_LEASE and ONCE_PATIENCE are seconds, so that a test need not wait
for a minute.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from neuron_sdk import CommandContext, Neuron, pull_session

FOLDER = Path(os.environ["ONCE_FOLDER"])
pull_session.LEASE_S = float(os.environ.get("ONCE_LEASE", "60"))
pull_session.PATIENCE_S = float(os.environ.get("ONCE_PATIENCE", "60"))

neuron = Neuron(
    os.environ["NEURON_ID"],
    type="cron",
    max_concurrent_commands=int(os.environ.get("ONCE_PLACES", "2")),
)
runs = neuron.counter("runs")


def note(name: str, line: object) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{line}\n")


@neuron.on_start
def start() -> None:
    note("hooks", "start")


@neuron.on_stop
def stop() -> None:
    note("hooks", "stop")


@neuron.command()
async def add(ctx: CommandContext, a: int, b: int = 0) -> dict[str, int]:
    """Adds, and says so halfway."""
    runs.add()
    await ctx.progress(0.5, "halfway", checkpoint={"a": a})
    return {"sum": a + b}


@neuron.command()
async def hold(ctx: CommandContext) -> dict[str, int]:
    """Runs until it is released."""
    runs.add()
    note("runs", f"{ctx.command_id} {ctx.attempt}")
    while not (FOLDER / "release").exists():  # noqa: ASYNC110 - told by another process
        await asyncio.sleep(0.02)
    return {"attempt": ctx.attempt}
