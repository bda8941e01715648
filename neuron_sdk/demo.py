"""The neuron that `federation up` runs, so that there is something to see and to order at once.

It pretends to serve some requests a second, and has two commands: `greet` answers, `count` takes
its time and says how far it is.
"""

from __future__ import annotations

import asyncio
import random

from neuron_sdk import CommandContext, Neuron

neuron = Neuron("demo-neuron", type="demo", name="Demo", capabilities=["greeting", "counting"])


@neuron.command("greet")
async def greet(ctx: CommandContext, name: str = "World") -> dict[str, str]:
    """Answers with a greeting."""
    ctx.log.info("greeting", name=name)
    return {"greeting": f"Hello, {name}!"}


@neuron.command("count")
async def count(ctx: CommandContext, upto: int = 10, seconds: float = 5.0) -> dict[str, int]:
    """Counts, with progress, in that many seconds."""
    for number in range(upto):
        await ctx.progress(number / upto, f"{number} of {upto} counted")
        await asyncio.sleep(seconds / upto)
    return {"counted": upto}


@neuron.worker
async def pretend_to_work() -> None:
    """Makes the numbers that a busy service would report."""
    while True:
        took_ms = random.lognormvariate(2.5, 0.6)
        neuron.track_request(took_ms, ok=took_ms < 60.0)
        await asyncio.sleep(took_ms / 100)
