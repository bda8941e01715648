"""`make bench`: start-up, resident memory, the fleet's cost beside a bare echo, commands, queries.

python -m benchmarks [--neurons N] [--seconds S] [--rounds R] …
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks import commands, fleet, queries
from benchmarks.machine import machine
from benchmarks.processes import Served, federation

STARTS = 3
SETTLE_S = 5.0


def idle() -> None:
    """From the start of `federation up` to its banner, on no data; and what idle processes hold."""
    starts, servers, neurons = [], [], []
    for _ in range(STARTS):
        with federation(demo=True) as served:
            starts.append(served.started_s)
            time.sleep(SETTLE_S)
            servers.append(served.rss_mb())
            neurons.append(_neuron_rss_mb(served))
    print("| figure | median | from | to | target |\n|---|---|---|---|---|")
    for name, values, unit, target in (
        ("cold start to serving", starts, "s", "5"),
        ("idle server, RSS", servers, "MB", "120"),
        ("idle neuron, RSS", neurons, "MB", "60"),
    ):
        print(
            f"| {name} | {statistics.median(values):.1f} {unit} | {min(values):.1f} |"
            f" {max(values):.1f} | {target} {unit} |",
            flush=True,
        )


def _neuron_rss_mb(served: Served) -> float:
    for child in served.process.children(recursive=True):
        if any("neuron_sdk" in word for word in child.cmdline()):
            return float(child.memory_info().rss / 1e6)
    raise RuntimeError("the demo neuron is not there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    fleet.add_options(parser)
    commands.add_options(parser)
    queries.add_options(parser)
    arguments = parser.parse_args()
    print(f"machine: {machine()}\n")
    idle()
    print()
    fleet.run(arguments)
    print()
    commands.run(arguments)
    print()
    queries.run(arguments)
