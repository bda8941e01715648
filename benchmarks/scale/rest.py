"""The same heartbeats by FastAPI, uvicorn and SQLAlchemy: a POST and a row for each."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from google.protobuf.json_format import MessageToDict

from benchmarks import fleet
from benchmarks.contenders import PYTHON, uvicorn, why_no_rest
from benchmarks.machine import Others
from benchmarks.processes import cpu_s, federation
from benchmarks.scale.figures import published
from benchmarks.scale.swarms import Swarms, returning, swarms
from benchmarks.swarm import full_heartbeat
from federation_server.store.embedded import SUPERUSER

SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A server with its neurons at work."""

    running: Swarms
    stored: Callable[[], int]
    cpu_s: Callable[[], float]
    database_cpu_s: Callable[[], float]


def heartbeat_json() -> dict[str, Any]:
    """The swarm's heartbeat as a JSON API would have it: numbers are numbers."""
    made: dict[str, Any] = _numbers(
        MessageToDict(full_heartbeat(), preserving_proto_field_name=True)
    )
    made["uptime_s"] = float(made.pop("uptime").removesuffix("s"))
    return made


def _numbers(value: Any) -> Any:
    """Protobuf's JSON writes 64-bit integers as strings."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.isdigit() else value


@contextmanager
def ours(arguments: argparse.Namespace, interval_s: float, neurons: int) -> Iterator[Loaded]:
    """The federation. Its neurons do not slow down when they are told to, or the load differed."""
    with federation() as served, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        fleet.write_tokens(served, neurons, file)
        options = ("--heedless", "--interval", str(interval_s))
        command = returning(served.address, Path(file.name), *options)
        with swarms(command, neurons=neurons, processes=arguments.processes) as running:
            yield Loaded(
                running,
                lambda: published(served).heartbeats,
                served.cpu_s,
                served.database_cpu_s,
            )


@contextmanager
def theirs(arguments: argparse.Namespace, interval_s: float, neurons: int) -> Iterator[Loaded]:
    """FastAPI. uvicorn would close connections that are idle for 5 s."""
    options = ("--timeout-keep-alive", "75")
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        uvicorn("rest_heartbeats", *options) as (url, server, postgres),
        psycopg.connect(postgres.dsn("postgres", user=SUPERUSER), autocommit=True) as connection,
    ):
        json.dump(heartbeat_json(), file)
        file.flush()
        database = psutil.Process(postgres.pid)

        def stored() -> int:
            row = connection.execute("SELECT count(*) FROM heartbeats").fetchone()
            return int(row[0]) if row else 0

        command = [str(PYTHON), "-m", "benchmarks.baselines.rest_neurons", url]
        command += ["--heartbeat", file.name, "--interval", str(interval_s)]
        with swarms(command, neurons=neurons, processes=arguments.processes) as running:
            yield Loaded(running, stored, lambda: cpu_s(server), lambda: cpu_s(database))


def measure(loaded: Loaded, seconds: float) -> str:
    """The cells of one row."""
    time.sleep(SETTLE_S)
    before, others, began = loaded.running.look(), Others(), time.monotonic()
    stored, used_s, database_s = loaded.stored(), loaded.cpu_s(), loaded.database_cpu_s()
    time.sleep(seconds)
    used_s, database_s = loaded.cpu_s() - used_s, loaded.database_cpu_s() - database_s
    stored, passed = loaded.stored() - stored, time.monotonic() - began
    sent, percent = loaded.running.look() - before, others.percent()
    each = 1e6 / max(stored, 1)
    return (
        f"{sent['heartbeats']} | {stored} | {stored / passed:.0f} | {used_s * each:.0f} |"
        f" {database_s * each:.0f} | {sent['lost'] + sent['failed']} | {percent:.0f} %"
    )


def run(arguments: argparse.Namespace) -> None:
    """Both, in turn, with the same load and at their limits."""
    neurons = arguments.neurons or 1000
    print(
        f"rest: {neurons} neurons, a connection each, {arguments.rest_seconds:g} s;"
        f" {arguments.rounds} rounds\n"
    )
    problem = why_no_rest()
    if problem:
        print(f"FastAPI is left out: {problem}\n")
    print(
        "| load | server | heartbeats | durable | durable/s | server CPU, µs a durable heartbeat"
        " | PostgreSQL's | lost or failed | others' CPU |\n|---|---|---|---|---|---|---|---|---|"
    )
    for _ in range(arguments.rounds):
        for load, interval_s in (
            (f"each {arguments.interval:g} s", arguments.interval),
            (f"at the limit, each {arguments.limit_interval:g} s", arguments.limit_interval),
        ):
            for name, serve in (("federation", ours), ("FastAPI, SQLAlchemy", theirs)):
                if problem and serve is theirs:
                    continue
                with serve(arguments, interval_s, neurons) as loaded:
                    cells = measure(loaded, arguments.rest_seconds)
                print(f"| {load} | {name} | {cells} |", flush=True)
