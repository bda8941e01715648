"""PostgreSQL stands still under a fleet that reports, and goes on."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks import fleet
from benchmarks.machine import Others
from benchmarks.scale.apart import apart
from benchmarks.scale.descriptors import why_not
from benchmarks.scale.figures import published
from benchmarks.scale.idle import rss_kib
from benchmarks.scale.restart import books, print_columns
from benchmarks.scale.shown import shown
from benchmarks.scale.swarms import reporting, swarms


def run(arguments: argparse.Namespace) -> None:
    """One outage."""
    neurons = arguments.neurons or 2000
    if problem := why_not(neurons):
        print(f"outage is left out: {problem}")
        return
    print(
        f"outage: PostgreSQL stopped (SIGSTOP) for {arguments.outage:g} s under {neurons} neurons,"
        f" a heartbeat each {arguments.interval:g} s, a report each {arguments.report:g} s\n"
    )
    others = Others()
    with apart() as both, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        fleet.write_tokens(both.served, neurons, file)
        command = reporting(
            both.served.address, Path(file.name), arguments.interval, arguments.report
        )
        with (
            swarms(command, neurons=neurons, processes=arguments.processes) as running,
            shown(both.served) as asking,
        ):
            running.say("report")
            time.sleep(2 * arguments.report)
            before, before_kib = running.look(), rss_kib(both.served)
            with both.postgres_standing_still():
                time.sleep(arguments.outage)
                within, within_kib = running.look(), rss_kib(both.served)
            # The reports go on for a while, and nobody who was away may turn OFFLINE late.
            time.sleep(arguments.watch)
            result = books(both, running)
            after, last = running.look(), published(both.served)
            result |= {
                "reports in spools at the end of the outage": within["waiting"],
                "streams lost": after["lost"] + after["asked"] - before["lost"] - before["asked"],
                "streams open": last.streams,
                "messages refused": after["refused"],
                "most ever shown SUSPECT": asking.most.get("SUSPECT", 0),
                "most ever shown OFFLINE": asking.most.get("OFFLINE", 0),
                "overviews answered, and not": f"{asking.answers}, {asking.without_answer}",
                "RSS before, at its end, and at last, MiB": (
                    f"{before_kib / 1024:.0f}, {within_kib / 1024:.0f},"
                    f" {rss_kib(both.served) / 1024:.0f}"
                ),
                "others' CPU": f"{others.percent():.0f} %",
            }
            print_columns({"outage": result})
    print("\nTargets: no stream lost, the sum stored is the sum sent")
