"""The service that the end-to-end tests run as a neuron: it does what tests tell it by files.

    python -m tests.support.neuron_service

SERVICE_FOLDER is where its files are: `release` lets held commands end, `storage-down` makes a
dependency fail; `runs` gets a line for each held command that starts, `ticks` the final count.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from neuron_sdk import CommandContext, Neuron

FOLDER = Path(os.environ.get("SERVICE_FOLDER", "."))

neuron = Neuron(os.environ.get("NEURON_ID", "service"), type="tested", version="7")
ticks = neuron.counter("ticks")
ticked = 0


def note(name: str, line: object) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{line}\n")


@neuron.command()
async def hold(ctx: CommandContext) -> dict[str, int]:
    """Runs until it is released."""
    note("runs", ctx.command_id)
    while not (FOLDER / "release").exists():  # noqa: ASYNC110 - told by another process
        await asyncio.sleep(0.02)
    return {"held": 1}


@neuron.command()
def raising(ctx: CommandContext) -> None:
    ctx.log.info("looking for the row", password="hunter2-in-a-log")
    raise ValueError("no such row in postgresql://app:hunter3@db/rows")


@neuron.command()
def not_json() -> Any:
    return {"lock": object()}


@neuron.command()
def too_large() -> dict[str, str]:
    return {"blob": "x" * 2**20}


@neuron.command()
async def endless() -> None:
    await asyncio.Event().wait()


@neuron.command()
def block_thread(seconds: float) -> dict[str, bool]:
    time.sleep(seconds)
    return {"blocked": True}


@neuron.command()
async def block_loop(seconds: float) -> dict[str, bool]:
    time.sleep(seconds)  # noqa: ASYNC251 - what a neuron must survive
    return {"blocked": True}


@neuron.command(isolation="process")
def isolated(a: int) -> dict[str, int]:
    return {"pid": os.getpid(), "twice": 2 * a}


@neuron.command(isolation="process")
def isolated_endless() -> None:
    note("isolated", os.getpid())
    while True:
        try:
            time.sleep(3600)
        except BaseException as error:  # noqa: BLE001 - only a SIGKILL ends it
            note("isolated", error)


@neuron.dependency("storage", interval=0.1)
def storage() -> None:
    if (FOLDER / "storage-down").exists():
        raise OSError("the disk is out")


@neuron.worker
async def tick() -> None:
    """Counts, and keeps a count of its own to compare with."""
    global ticked  # noqa: PLW0603 - the process is this neuron
    note("workers", "started")
    while True:
        ticks.add()
        ticked += 1
        await asyncio.sleep(0.01)


@neuron.on_stop
def tell() -> None:
    note("ticks", ticked)


if __name__ == "__main__":
    neuron.run()
