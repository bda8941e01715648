"""What a stream holds in the server while it says next to nothing, and how that grows."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import fleet
from benchmarks.machine import Others
from benchmarks.processes import Served, federation
from benchmarks.scale.descriptors import why_not
from benchmarks.scale.swarms import Swarms, returning, swarms

TARGET_KIB = 64


def rss_kib(served: Served) -> float:
    """The server's resident memory."""
    return served.process.memory_info().rss / 1024


def run(arguments: argparse.Namespace) -> None:
    """Adds streams to one server, and looks after each step."""
    steps = []
    for streams in sorted(arguments.idle_streams):
        if problem := why_not(streams):
            print(f"{streams} streams are left out: {problem}")
        else:
            steps.append(streams)
    if not steps:
        return
    others = Others()
    print(
        f"idle: a heartbeat each {arguments.idle_interval:g} s; RSS {arguments.settle:g} s after"
        " the last Welcome\n"
    )
    print(
        "| streams | server RSS, MiB | KiB a stream | KiB for each that was added | lost streams |"
        "\n|---|---|---|---|---|"
    )
    with (
        federation() as served,
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        ExitStack() as stack,
    ):
        fleet.write_tokens(served, steps[-1], file)
        empty = before = rss_kib(served)
        print(f"| 0 | {empty / 1024:.1f} | - | - | - |", flush=True)
        interval = ("--interval", str(arguments.idle_interval))
        command = returning(served.address, Path(file.name), *interval)
        running: list[Swarms] = []
        added, there = [], 0
        for streams in steps:
            new = swarms(
                command, first=there, neurons=streams - there, processes=arguments.processes
            )
            running.append(stack.enter_context(new))
            time.sleep(arguments.settle)
            now = rss_kib(served)
            added.append((now - before) / (streams - there))
            lost = sum(each.look()["lost"] for each in running)
            print(
                f"| {streams} | {now / 1024:.1f} | {(now - empty) / streams:.1f} |"
                f" {added[-1]:.1f} | {lost} |",
                flush=True,
            )
            before, there = now, streams
    print(
        f"\nlinear if what each costs that was added stays the same: from {min(added):.1f} to"
        f" {max(added):.1f} KiB, last by first {added[-1] / added[0]:.2f};"
        f" target {TARGET_KIB} KiB a stream; others' CPU meanwhile {others.percent():.0f} %"
    )
