"""The fleet simulator: what N neurons cost a server, beside what they cost a bare echo.

    python -m benchmarks.fleet --neurons 2000 --interval 1 --seconds 30

Both servers get the same neurons and the same heartbeats in the same run, `--rounds` times in
turn; ratios mean something on a noisy machine, absolute times do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Served, echo, federation
from federation.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    neuron_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)
from neuron_sdk.channel import read_failure

REGISTERING_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one server."""

    heartbeats: int
    lost: int
    cpu_us: float
    """Processor time of the server for each heartbeat."""
    database_cpu_us: float
    stored: int
    rss_kib_per_stream: float
    flush_p99_ms: float


async def enrollment_token(served: Served) -> str:
    """An enrollment token's secret."""
    admin = (("x-admin-key", served.admin_key),)
    async with grpc.aio.insecure_channel(served.address) as channel:
        made = await access_service_pb2_grpc.AccessServiceStub(channel).CreateEnrollmentToken(
            access_service_pb2.CreateEnrollmentTokenRequest(description="bench"), metadata=admin
        )
    return made.secret


async def register(served: Served, names: list[str]) -> dict[str, str]:
    """Registers the neurons; gives each one's token."""
    secret = await enrollment_token(served)
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = session_service_pb2_grpc.SessionServiceStub(channel)
        gate = asyncio.Semaphore(REGISTERING_AT_ONCE)

        async def one(name: str) -> tuple[str, str]:
            request = session_service_pb2.RegisterRequest(
                description=neuron_pb2.NeuronDescription(
                    neuron_id=name,
                    type="bench",
                    command_types=[neuron_pb2.CommandType(type="bench")],
                ),
                enrollment_token=secret,
                request_id=str(uuid.uuid4()),
            )
            async with gate:
                while True:
                    try:
                        return name, (await stub.Register(request)).token.token
                    except grpc.aio.AioRpcError as error:
                        # A server may let in only so many each second: it says when to come back.
                        if not (wait_s := read_failure(error).retry_after):
                            raise
                        await asyncio.sleep(wait_s)

        return dict(await asyncio.gather(*(one(name) for name in names)))


def write_tokens(served: Served, neurons: int, file: IO[str]) -> None:
    """Registers so many neurons, and writes their tokens for the swarms."""
    names = [f"bench-{number:05d}" for number in range(neurons)]
    json.dump(asyncio.run(register(served, names)), file)
    file.flush()


@contextmanager
def swarms(
    served: Served, arguments: argparse.Namespace, tokens: Path | None
) -> Iterator[list[subprocess.Popen[str]]]:
    """The neurons, connected, in a few processes."""
    each = -(-arguments.neurons // arguments.processes)
    running = []
    for number in range(arguments.processes):
        first = number * each
        command = [
            sys.executable, "-m", "benchmarks.swarm", served.address,
            "--first", str(first),
            "--count", str(min(each, arguments.neurons - first)),
            "--interval", str(arguments.interval),
        ]  # fmt: skip
        if tokens is not None:
            command += ["--tokens", str(tokens)]
        running.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    try:
        for process in running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a swarm did not connect")
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def go(running: list[subprocess.Popen[str]]) -> None:
    """Begins the heartbeats of connected swarms."""
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def end(running: list[subprocess.Popen[str]]) -> tuple[int, int]:
    """Stops the swarms; says how many heartbeats they have sent and how many streams they lost."""
    results = [json.loads(process.communicate()[0]) for process in running]
    return sum(each["sent"] for each in results), sum(each["lost"] for each in results)


def measure(served: Served, arguments: argparse.Namespace, tokens: Path | None) -> Measured:
    """Loads one server and says what it cost."""
    empty_mb = served.rss_mb()
    with swarms(served, arguments, tokens) as running:
        time.sleep(2.0)
        streams_kib = (served.rss_mb() - empty_mb) * 1e6 / 1024 / arguments.neurons
        before = scrape(served)
        cpu, database_cpu = served.cpu_s(), served.database_cpu_s()
        go(running)
        time.sleep(arguments.seconds)
        cpu, database_cpu = served.cpu_s() - cpu, served.database_cpu_s() - database_cpu
        sent, lost = end(running)
        time.sleep(0.5)
        after = scrape(served)
    return Measured(
        heartbeats=sent,
        lost=lost,
        cpu_us=cpu / max(sent, 1) * 1e6,
        database_cpu_us=database_cpu / max(sent, 1) * 1e6,
        stored=int(after.get("heartbeats", 0) - before.get("heartbeats", 0)),
        rss_kib_per_stream=streams_kib,
        flush_p99_ms=after.get("flush_p99_ms", 0.0),
    )


def scrape(served: Served) -> dict[str, float]:
    """The server's own numbers, where it has any."""
    if not served.metrics_port:
        return {}
    url = f"http://127.0.0.1:{served.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = {
            family.name: family for family in text_string_to_metric_families(answer.read().decode())
        }
    buckets = [
        (float(sample.labels["le"]), sample.value)
        for sample in families["federation_flush_seconds"].samples
        if sample.name.endswith("_bucket")
    ]
    total = buckets[-1][1]
    p99 = next((bound for bound, count in buckets if total and count >= 0.99 * total), 0.0)
    return {
        "heartbeats": families["federation_heartbeats"].samples[0].value,
        "flush_p99_ms": p99 * 1000,
    }


def run_round(arguments: argparse.Namespace) -> tuple[Measured, Measured]:
    """The federation and the echo, one after the other."""
    with federation() as served, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        write_tokens(served, arguments.neurons, file)
        ours = measure(served, arguments, Path(file.name))
    with echo() as served:
        bare = measure(served, arguments, None)
    return ours, bare


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a fleet and of every benchmark that has one."""
    parser.add_argument("--neurons", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between heartbeats")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a fleet's run")
    parser.add_argument("--processes", type=int, default=2, help="processes of neurons")
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Runs the rounds and prints the table."""
    ratios = []
    print(
        f"{arguments.neurons} neurons, a heartbeat each {arguments.interval} s,"
        f" {arguments.seconds} s, {arguments.rounds} rounds"
    )
    print(
        "| server | heartbeats | stored | lost streams | CPU µs each | PostgreSQL µs"
        " | KiB a stream | flush p99 ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for _ in range(arguments.rounds):
        ours, bare = run_round(arguments)
        ratios.append(ours.cpu_us / bare.cpu_us)
        for name, m in (("federation", ours), ("bare echo", bare)):
            stored = str(m.stored) if m.stored else "-"
            flush = f"≤ {m.flush_p99_ms:.0f}" if m.flush_p99_ms else "-"
            print(
                f"| {name} | {m.heartbeats} | {stored} | {m.lost} | {m.cpu_us:.0f} |"
                f" {m.database_cpu_us:.0f} | {m.rss_kib_per_stream:.0f} | {flush} |",
                flush=True,
            )
    print(
        f"\nserver CPU per durable heartbeat, federation / bare echo:"
        f" median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
    )


def main() -> None:
    """Runs the fleet alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
