"""A whole neuron in ten lines.

Run it with `ENROLLMENT_TOKEN=fet_… python examples/ten_lines.py`. As a cron job, which carries out
what waits and ends: `ENROLLMENT_TOKEN=fet_… neuron run --once examples/ten_lines.py:neuron`.

NEURON_ID and NEURON_TYPE, if they are set, take the place of the names below.
"""

import os

from neuron_sdk import CommandContext, Neuron

neuron = Neuron(
    os.environ.get("NEURON_ID", "python-processor-001"),
    type=os.environ.get("NEURON_TYPE", "data-processor"),
    capabilities=["data_processing"],
)


@neuron.command("run_task")
async def run_task(ctx: CommandContext, input_source: str, limit: int = 100) -> dict[str, int]:
    """Pretend to read `limit` rows from `input_source`."""
    for done in range(limit):
        await ctx.progress(done / limit, f"{done} rows")
    return {"processed_records": limit}


if __name__ == "__main__":
    neuron.run()
