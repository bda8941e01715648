"""A server that goes and comes back under its fleet: SIGTERM, and then SIGKILL."""

from __future__ import annotations

import argparse
import math
import signal
import tempfile
import time
from pathlib import Path
from urllib.error import URLError

from benchmarks import fleet
from benchmarks.machine import Others
from benchmarks.scale.apart import Apart, apart
from benchmarks.scale.descriptors import why_not
from benchmarks.scale.figures import published
from benchmarks.scale.shown import Shown, shown
from benchmarks.scale.swarms import LOOK_EACH_S, Swarms, reporting, swarms

ONLINE_WITHIN_S = 180.0
DRAINED_WITHIN_S = 120.0


def all_back(both: Apart, asking: Shown, neurons: int) -> float:
    """Waits until the server holds every stream and the overview has shown them all ONLINE since;
    gives the moment, or infinity if that takes too long. What was shown before counts for nothing:
    a killed server's neurons are still in the database as they were.
    """
    deadline = time.monotonic() + ONLINE_WITHIN_S
    held = 0.0
    while time.monotonic() < deadline:
        if not held and _streams(both) == neurons:
            held = time.monotonic()
        if held and asking.all_online(neurons, held):
            return asking.last_asked
        time.sleep(LOOK_EACH_S)
    return math.inf


def _streams(both: Apart) -> int:
    try:
        return published(both.served).streams
    except (URLError, ConnectionError, TimeoutError):
        return 0


def restart(
    both: Apart, running: Swarms, how: signal.Signals, arguments: argparse.Namespace
) -> dict[str, object]:
    """One restart; what came out."""
    neurons, before, others = running.neurons, running.look(), Others()
    with shown(both.served) as asking:
        all_back(both, asking, neurons)  # and so they are before
        began = time.monotonic()
        both.end(how)
        gone = time.monotonic()
        both.start()
        serving, swarm_s = time.monotonic(), running.cpu_s()
        online = all_back(both, asking, neurons)
        # Both share the cores: a fleet on hosts of its own would not wait for itself.
        server_s, swarm_s = both.served.cpu_s(), running.cpu_s() - swarm_s
        # Somebody who did not come back would be OFFLINE only after a while.
        time.sleep(arguments.watch)
    after = running.look()
    return {
        "server gone after, s": f"{gone - began:.1f}",
        "server serves again after, s": f"{serving - began:.1f}",
        "all ONLINE again after, s": f"{online - began:.1f}",
        "… of which since it serves, s": f"{online - serving:.1f}",
        "server's CPU from its start to then, s": f"{server_s:.1f}",
        "neurons' CPU since it serves, s": f"{swarm_s:.1f}",
        "most ever shown SUSPECT": asking.most.get("SUSPECT", 0),
        "most ever shown OFFLINE": asking.most.get("OFFLINE", 0),
        "overviews answered, and not": f"{asking.answers}, {asking.without_answer}",
        "streams asked to come back": after["asked"] - before["asked"],
        "streams that broke": after["lost"] - before["lost"],
        "turns given": after["turns"] - before["turns"],
        "connections that failed": after["failed"] - before["failed"],
        "others' CPU": f"{others.percent():.0f} %",
    }


def print_columns(columns: dict[str, dict[str, object]]) -> None:
    """A table with a column for each run."""
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in next(iter(columns.values())):
        values = " | ".join(str(column[name]) for column in columns.values())
        print(f"| {name} | {values} |", flush=True)


def books(both: Apart, running: Swarms) -> dict[str, object]:
    """Ends the reports, waits for the last acknowledgement, and compares."""
    running.say("no-reports")
    drained_s = running.drained(DRAINED_WITHIN_S)
    counts = running.look()
    took = "not in time" if drained_s is None else f"{drained_s:.1f}"
    drained = {"last acknowledgement after, s": took, "still in spools": counts["waiting"]}
    return drained | both.books().compared(counts["reports"], counts["sum"])


def run(arguments: argparse.Namespace) -> None:
    """Both restarts of one fleet."""
    neurons = arguments.neurons or 5000
    if problem := why_not(neurons):
        print(f"restart is left out: {problem}")
        return
    print(
        f"restart: {neurons} neurons, a heartbeat each {arguments.pace:g} s, a report each"
        f" {arguments.pace:g} s\n"
    )
    with apart() as both, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        fleet.write_tokens(both.served, neurons, file)
        command = reporting(both.served.address, Path(file.name), arguments.pace, arguments.pace)
        with swarms(command, neurons=neurons, processes=arguments.processes) as running:
            running.say("report")
            time.sleep(arguments.pace)
            columns = {}
            for how in (signal.SIGTERM, signal.SIGKILL):
                columns[how.name] = restart(both, running, how, arguments)
            print_columns(columns)
            print()
            print_columns({"after both": books(both, running)})
    print(
        "\nTargets: all ONLINE again within 20 s, none ever shown OFFLINE, no report lost or"
        " doubled"
    )
