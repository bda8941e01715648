"""The neuron that `commands.py` measures: the real SDK with a handler that does nothing."""

from __future__ import annotations

from neuron_sdk import CommandContext, Neuron

neuron = Neuron("bench", type="real")


@neuron.command("bench")
async def bench(ctx: CommandContext, n: int) -> dict[str, int]:
    """Gives back its number."""
    return {"n": n}


if __name__ == "__main__":
    neuron.run()
