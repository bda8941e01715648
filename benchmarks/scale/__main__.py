"""`make bench-scale`: what streams hold, and what a fleet lives through.

    python -m benchmarks.scale --only idle,steady,restart,outage,rest

With all of it and its defaults some forty minutes.
"""

from __future__ import annotations

import argparse

from benchmarks.machine import machine
from benchmarks.scale import idle, outage, rest, restart, steady
from benchmarks.scale.descriptors import raise_limit

PARTS = {
    "idle": idle.run,
    "steady": steady.run,
    "restart": restart.run,
    "outage": outage.run,
    "rest": rest.run,
}


def names(text: str) -> list[str]:
    """Names of parts, with commas."""
    asked = text.lower().split(",")
    if unknown := set(asked) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there is {', '.join(PARTS)}")
    return asked


def options() -> argparse.ArgumentParser:
    """All options of all parts."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", type=names, default=list(PARTS), help="which parts, with commas")
    add("--neurons", type=int, help="steady, restart: 5000; outage: 2000; rest: 1000")
    add("--processes", type=int, default=2, help="processes of neurons (idle: at each step)")
    add("--interval", type=float, default=5.0, help="steady, outage, rest: s between heartbeats")
    add("--report", type=float, default=5.0, help="outage: seconds between reports")
    add("--pace", type=float, default=30.0, help="restart: s between heartbeats, and reports")
    add("--watch", type=float, default=75.0, help="restart, outage: seconds to look on after it")
    add("--seconds", type=float, default=300.0, help="steady: its length")
    add("--outage", type=float, default=30.0, help="outage: its length in seconds")
    add(
        "--idle-streams",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1000, 5000, 9000],
        help="idle: how many, with commas",
    )
    add("--idle-interval", type=float, default=60.0, help="idle: seconds between heartbeats")
    add("--settle", type=float, default=65.0, help="idle: seconds from the last Welcome to a look")
    add("--rest-seconds", type=float, default=30.0, help="rest: length of each run")
    add(
        "--limit-interval",
        type=float,
        default=0.25,
        help="rest: seconds between heartbeats where there are more than a server can take",
    )
    add("--rounds", type=int, default=3, help="rest: how often each server has its turn")
    return parser


if __name__ == "__main__":
    arguments = options().parse_args()
    limit = raise_limit()
    print(f"machine: {machine()}; {limit} open files")
    for part in arguments.only:
        print(flush=True)
        PARTS[part](arguments)
