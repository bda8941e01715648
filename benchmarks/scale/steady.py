"""A fleet at its usual pace for minutes: is anything lost, late, or piling up?"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import fleet
from benchmarks.machine import Others
from benchmarks.processes import Served, federation
from benchmarks.scale.descriptors import why_not
from benchmarks.scale.figures import Published, published, slope
from benchmarks.scale.idle import rss_kib
from benchmarks.scale.swarms import Swarms, returning, swarms

LOOK_EACH_S = 10.0
FLAT_S = 240.0
"""The end of the run in which memory is to be flat."""
STORED_WITHIN_S = 10.0
FLUSH_TARGET_S = 0.1


def watch(served: Served, seconds: float) -> list[tuple[float, float]]:
    """The server's RSS in KiB at the beginning, each ten seconds, and at the end."""
    began = time.monotonic()
    points = []
    while (passed := time.monotonic() - began) < seconds:
        points.append((passed, rss_kib(served)))
        time.sleep(max(0.0, min(LOOK_EACH_S, seconds - passed)))
    return [*points, (seconds, rss_kib(served))]


def all_stored(served: Served, sent: int) -> Published:
    """Waits until so many heartbeats are stored, or no longer."""
    deadline = time.monotonic() + STORED_WITHIN_S
    while (now := published(served)).heartbeats < sent and time.monotonic() < deadline:
        time.sleep(0.25)
    return now


def measure(served: Served, running: Swarms, arguments: argparse.Namespace) -> None:
    """Looks on, and prints the table."""
    seconds = arguments.seconds
    others, first, seen = Others(), published(served), running.look()
    cpu_s, database_cpu_s = served.cpu_s(), served.database_cpu_s()
    points = watch(served, seconds)
    cpu_s, database_cpu_s = served.cpu_s() - cpu_s, served.database_cpu_s() - database_cpu_s
    last = published(served)
    percent = others.percent()
    beats = running.look()["heartbeats"] - seen["heartbeats"]
    running.say("silence")
    counts = running.look()
    stored = all_stored(served, counts["heartbeats"])
    print("RSS, MiB: " + ", ".join(f"{at:.0f} s {kib / 1024:.1f}" for at, kib in points) + "\n")
    flat = [point for point in points if point[0] >= seconds - FLAT_S]
    rows = {
        "heartbeats sent": counts["heartbeats"],
        "heartbeats stored": stored.heartbeats,
        "streams lost": counts["lost"],
        "messages refused": stored.refused,
        "neurons told to slow down": counts["slowed"],
        "heartbeats/s": f"{beats / seconds:.0f}",
        "server CPU, µs a heartbeat": f"{cpu_s / max(beats, 1) * 1e6:.0f}",
        "PostgreSQL's CPU, µs a heartbeat": f"{database_cpu_s / max(beats, 1) * 1e6:.0f}",
        "flush p99, ms": f"≤ {last.flush_p99_ms(first):g}",
        "flushes over 100 ms": last.slow_flushes(first, FLUSH_TARGET_S),
        f"RSS in the last {flat[-1][0] - flat[0][0]:.0f} s, slope": (
            f"{slope(flat) * 60:+.0f} KiB a minute"
        ),
        "RSS in that time, from and to": (
            f"{min(kib for _, kib in flat) / 1024:.1f} to"
            f" {max(kib for _, kib in flat) / 1024:.1f} MiB"
        ),
        "others' CPU": f"{percent:.0f} %",
    }
    print("| figure | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """One run."""
    neurons = arguments.neurons or 5000
    if problem := why_not(neurons):
        print(f"steady is left out: {problem}")
        return
    print(
        f"steady: {neurons} neurons, a heartbeat each {arguments.interval:g} s,"
        f" {arguments.seconds:g} s\n"
    )
    with federation() as served, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        fleet.write_tokens(served, neurons, file)
        interval = ("--interval", str(arguments.interval))
        command = returning(served.address, Path(file.name), *interval)
        with swarms(command, neurons=neurons, processes=arguments.processes) as running:
            measure(served, running, arguments)
    print("\nTargets: stored = sent, none lost, flush p99 100 ms, RSS flat in the last 4 minutes")
