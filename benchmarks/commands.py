"""How long a command takes from its issue to its result, and how many fit into a second; beside
Celery with Redis and a REST server that is polled.

    python -m benchmarks.commands --rounds 3

Each round runs every system in turn, so that they share whatever else the machine does; the table
gives the median of the rounds, and from where to where they went.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import fleet
from benchmarks.contenders import (
    Contender,
    celery,
    federation_contender,
    neuron_and_federation,
    rest,
    rest_server,
    why_no_celery,
    why_no_rest,
)
from benchmarks.machine import Others, machine
from benchmarks.processes import ROOT, cpu_s

QUIET_INTERVAL_S = 60.0
"""Between the heartbeats of a fleet that is there but says little: the SDK's default."""

POLLED_AT_ONCE = 20
"""Jobs under way at a time where each waits for a poll, or 500 of them would take minutes. Each is
another worker's, and no worker has two."""

POLLED_WORKERS = 50

IDLE, FLEET, LOAD = "one idle worker", "fleet in the background", "many at once"


@dataclass(frozen=True, slots=True)
class Run:
    """One system in one setting in one round."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    jobs_per_s: float
    server_ms: float
    """Processor time of server and database for each job, with all else that they did meanwhile."""
    worker_ms: float
    client_ms: float
    others_percent: float


Round = Iterator[tuple[str, str, Run]]
"""Setting, system, and what came out."""


def drive(contender: Contender, *, jobs: int, in_flight: int, options: tuple[str, ...] = ()) -> Run:
    """Runs a system's client."""
    command = [*contender.client, "--jobs", str(jobs), "--in-flight", str(in_flight), *options]
    client = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | contender.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    if client.stdout.readline().strip() != "go":
        raise RuntimeError(f"{command} ended with {client.wait()} while it warmed up")
    clocks = (contender.server_cpu_s, contender.worker_cpu_s, _cpu_of([client]))
    before, others = [clock() for clock in clocks], Others()
    line = client.stdout.readline()
    used_s = [clock() - began for clock, began in zip(clocks, before, strict=True)]
    others_percent = others.percent()
    if client.wait(60) or not line:
        raise RuntimeError(f"{command} ended with {client.returncode}")
    result = json.loads(line)
    done = result["jobs"]
    server_ms, worker_ms, client_ms = (seconds / done * 1000 for seconds in used_s)
    taken_ms = sorted(result["ms"]) or [float("nan")]
    return Run(
        p50_ms=statistics.median(taken_ms),
        p99_ms=taken_ms[min(len(taken_ms) - 1, int(0.99 * len(taken_ms)))],
        max_ms=taken_ms[-1],
        jobs_per_s=done / result["seconds"],
        server_ms=server_ms,
        worker_ms=worker_ms,
        client_ms=client_ms,
        others_percent=others_percent,
    )


def federation_round(arguments: argparse.Namespace) -> Round:
    """The federation: its real neuron alone and with the fleet, then the fleet under load."""
    with (
        neuron_and_federation() as (served, neuron),
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
    ):
        one = federation_contender(served, 0, lambda: cpu_s(neuron))
        yield IDLE, "federation", drive(one, jobs=arguments.jobs, in_flight=1)
        fleet.write_tokens(served, arguments.neurons, file)
        fast, quiet = arguments.interval, QUIET_INTERVAL_S
        for interval, system in (
            (fast, f"federation, heartbeats each {fast:g} s"),
            (quiet, f"federation, heartbeats each {quiet:g} s"),
        ):
            swarm = argparse.Namespace(**vars(arguments) | {"interval": interval})
            with fleet.swarms(served, swarm, Path(file.name)) as running:
                fleet.go(running)
                many = federation_contender(served, arguments.neurons, _cpu_of(running))
                if interval == fast:
                    yield FLEET, system, drive(one, jobs=arguments.jobs, in_flight=1)
                jobs, in_flight = arguments.load_jobs, arguments.in_flight
                yield LOAD, system, drive(many, jobs=jobs, in_flight=in_flight)
                batch = federation_contender(
                    served,
                    arguments.neurons,
                    _cpu_of(running),
                    client="federation_batch_client",
                )
                yield LOAD, f"{system}, in batches", drive(batch, jobs=jobs, in_flight=jobs)
                _, lost = fleet.end(running)
                if lost:
                    raise RuntimeError(f"{lost} streams were lost")


def celery_round(arguments: argparse.Namespace) -> Round:
    """Celery on its and Redis' defaults, and then with every write on the disk."""
    for system, durable in (
        ("Celery, Redis as it comes", False),
        ("Celery, late ack, Redis appendfsync always", True),
    ):
        with celery(durable=durable) as contender:
            yield IDLE, system, drive(contender, jobs=arguments.jobs, in_flight=1)
            jobs = arguments.load_jobs
            yield LOAD, system, drive(contender, jobs=jobs, in_flight=jobs)


def rest_round(arguments: argparse.Namespace) -> Round:
    """The REST server: with few workers, and with as many as the fleet has neurons."""
    with rest_server() as (url, server_cpu_s):
        for workers, setting in ((POLLED_WORKERS, IDLE), (arguments.neurons, FLEET)):
            with rest(url, server_cpu_s, workers) as contender:
                system = f"REST, {workers} workers poll each second"
                yield (
                    setting,
                    system,
                    drive(contender, jobs=arguments.jobs, in_flight=POLLED_AT_ONCE),
                )
                if setting == FLEET:
                    yield (
                        LOAD,
                        system,
                        drive(
                            contender,
                            jobs=arguments.load_jobs,
                            in_flight=workers,
                            options=("--look", "1"),
                        ),
                    )


def _cpu_of(running: list[subprocess.Popen[str]]) -> Callable[[], float]:
    processes = [psutil.Process(each.pid) for each in running]
    return lambda: sum(cpu_s(process) for process in processes)


def rounds(arguments: argparse.Namespace) -> dict[tuple[str, str], list[Run]]:
    """Every system in turn, that many times; what came out for each setting and system."""
    contenders: list[tuple[str, Callable[[argparse.Namespace], Round], str]] = [
        ("federation", federation_round, ""),
        ("Celery", celery_round, why_no_celery()),
        ("REST", rest_round, why_no_rest()),
    ]
    wanted = []
    for name, run_round, problem in contenders:
        if problem and name.lower() in arguments.only:
            print(f"{name} is left out: {problem}")
        elif name.lower() in arguments.only:
            wanted.append(run_round)
    came_out: dict[tuple[str, str], list[Run]] = {}
    for number in range(arguments.rounds):
        for run_round in wanted:
            for setting, system, run in run_round(arguments):
                came_out.setdefault((setting, system), []).append(run)
                print(
                    f"round {number + 1}, {setting}, {system}: p50 {run.p50_ms:.1f} ms,"
                    f" p99 {run.p99_ms:.1f} ms, {run.jobs_per_s:.0f}/s",
                    file=sys.stderr,
                )
    return came_out


def print_table(came_out: dict[tuple[str, str], list[Run]]) -> None:
    """The median of the rounds, and from where to where they went."""
    print(
        "| setting | system | p50 ms | p99 ms | max ms | jobs/s | server CPU, ms a job"
        " | workers' | client's | others' CPU |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for setting in (IDLE, FLEET, LOAD):
        for (where, system), runs in came_out.items():
            if where != setting:
                continue
            cells = [
                _cell([run.p50_ms for run in runs]),
                _cell([run.p99_ms for run in runs]),
                _cell([run.max_ms for run in runs]),
                _cell([run.jobs_per_s for run in runs], digits=0) if setting == LOAD else "-",
                _cell([run.server_ms for run in runs]),
                _cell([run.worker_ms for run in runs]),
                _cell([run.client_ms for run in runs]),
                _cell([run.others_percent for run in runs], digits=0) + " %",
            ]
            print(f"| {setting} | {system} | {' | '.join(cells)} |", flush=True)


def _cell(values: list[float], digits: int = 1) -> str:
    if math.isnan(values[0]):
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every fleet."""
    parser.add_argument("--jobs", type=int, default=500, help="where they come one by one")
    parser.add_argument("--load-jobs", type=int, default=3000, help="where many come at once")
    parser.add_argument("--in-flight", type=int, default=128, help="ExecuteCommand calls at a time")
    parser.add_argument(
        "--only",
        default="federation,celery,rest",
        type=lambda text: text.lower().split(","),
        help="which systems, with commas",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the rounds and prints the table."""
    print(
        f"{arguments.jobs} jobs one by one, {arguments.load_jobs} at once;"
        f" {arguments.neurons} neurons; {arguments.rounds} rounds, median (from to)\n"
    )
    print_table(rounds(arguments))
    print(
        "\nTargets of the federation: one idle worker p50 8 ms, p99 25 ms;"
        " fleet in the background p99 100 ms; many at once 500 jobs/s"
    )


def main() -> None:
    """Runs this alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    fleet.add_options(parser)
    add_options(parser)
    print(f"machine: {machine()}\n")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
