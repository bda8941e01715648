"""`make bench`: start-up, resident memory, and the fleet's cost beside a bare echo.

python -m benchmarks [--neurons N] [--seconds S] [--rounds R]
"""

from __future__ import annotations

import platform
import statistics
import time

import psutil

from benchmarks import fleet
from benchmarks.processes import Served, federation

STARTS = 3
SETTLE_S = 5.0


def machine() -> str:
    """What the figures were taken on."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}"
        f" {platform.release().split('-')[0]}, CPython {platform.python_version()}"
    )


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
    print(f"machine: {machine()}\n")
    idle()
    print()
    fleet.main()
