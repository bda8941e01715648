"""Many light neurons in one process, speaking the real protocol: the load of `fleet.py`.

    python -m benchmarks.swarm ADDRESS --first 0 --count 1000 --interval 1 [--tokens FILE]

It connects them all (each over a connection of its own), prints `ready`, and waits for a line on
standard input before the heartbeats begin, and for the end of standard input before it stops.
A command is answered at once with accepted, a first progress and its finish, in three messages as
the contract asks and as the SDK does, but nothing is written to a disk.
The last line is JSON: how many heartbeats were sent, and how many streams were lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import grpc.aio

from federation.v1 import command_pb2, heartbeat_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1 import session_service_pb2_grpc as pb_grpc

CONNECTING_AT_ONCE = 50

OPTIONS = (
    # A connection each: neurons are processes of their own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Neuron:
    """One simulated neuron."""

    def __init__(self, address: str, neuron_id: str, token: str) -> None:
        """Not connected yet. Each heartbeat is the same full one but for its counters."""
        self.neuron_id = neuron_id
        self.sent = 0
        self.lost = False
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._call: Any = None
        self._beat = full_heartbeat()
        self._sequence = 0
        self._one_write = asyncio.Lock()

    async def open(self) -> None:
        """Says Hello and waits for Welcome."""
        hello = pb.Hello(
            instance_id=str(uuid.uuid4()),
            spool_id=uuid.uuid4().hex,
            first_sequence=1,
            next_sequence=1,
        )
        # Not before: a server has only so many calls wait.
        self._call = pb_grpc.SessionServiceStub(self._channel).Connect(
            metadata=self._metadata, wait_for_ready=True
        )
        await self._call.write(pb.NeuronMessage(hello=hello))
        welcome = await self._call.read()
        if not isinstance(welcome, pb.FederationMessage) or not welcome.HasField("welcome"):
            raise RuntimeError(f"{self.neuron_id}: no Welcome but {welcome!r}")

    async def beat(self, interval_s: float, stop: asyncio.Event) -> None:
        """Sends heartbeats, the first after a random part of the interval, until `stop`."""
        loop = asyncio.get_running_loop()
        reader = asyncio.create_task(self._read())
        due = loop.time() + random.uniform(0, interval_s)
        try:
            while not stop.is_set():
                await asyncio.sleep(max(0.0, due - loop.time()))
                due += interval_s
                self._beat.application.requests += 1
                async with self._one_write:
                    await self._call.write(pb.NeuronMessage(heartbeat=self._beat))
                self.sent += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self.lost = True
        finally:
            reader.cancel()

    async def _read(self) -> None:
        while isinstance(message := await self._call.read(), pb.FederationMessage):
            if message.HasField("command"):
                await self._answer(message.command)
        self.lost = True

    async def _answer(self, command: pb.CommandDelivery) -> None:
        of = {"command_id": command.command_id, "attempt": command.attempt}
        finished = pb.CommandFinished(
            state=command_pb2.COMMAND_STATE_SUCCEEDED, response=command.data
        )
        finished.run_duration.FromMicroseconds(10)
        for update in (
            pb.CommandUpdate(**of, accepted=pb.CommandAccepted()),  # type: ignore[arg-type]
            pb.CommandUpdate(**of, progressed=pb.CommandProgressed()),  # type: ignore[arg-type]
            pb.CommandUpdate(**of, finished=finished),  # type: ignore[arg-type]
        ):
            async with self._one_write:
                self._sequence += 1
                message = pb.NeuronMessage(sequence=self._sequence, command_update=update)
                message.send_time.GetCurrentTime()
                await self._call.write(message)

    async def close(self) -> None:
        """Leaves without a Goodbye."""
        self._call.cancel()
        await self._channel.close()


def full_heartbeat() -> heartbeat_pb2.Heartbeat:
    """A heartbeat with every part that a real neuron sends."""
    beat = heartbeat_pb2.Heartbeat(
        health_score=97.0,
        activity=heartbeat_pb2.ACTIVITY_ACTIVE,
        system=heartbeat_pb2.SystemMetrics(
            cpu_percent=12.5,
            memory_percent=41.0,
            memory_used_bytes=7_000_000_000,
            disk_percent=63.0,
            disk_used_bytes=90_000_000_000,
            network_received_bytes=123_456_789,
            network_sent_bytes=98_765_432,
        ),
        application=heartbeat_pb2.ApplicationMetrics(
            requests_per_second=17.5,
            mean_response_ms=12.0,
            p50_response_ms=9.0,
            p95_response_ms=31.0,
            p99_response_ms=77.0,
            active_connections=4,
            queue_size=11,
            error_rate_percent=0.5,
            requests=1000,
            failed_requests=5,
            response_ms_sum=12_000.0,
        ),
        process=heartbeat_pb2.ProcessInfo(
            pid=4711, threads=9, rss_bytes=55_000_000, open_files=31, cpu_percent=8.0
        ),
        versions=heartbeat_pb2.Versions(service="1.2.3", sdk="0.1.0", runtime="CPython 3.11"),
        dependencies=[
            heartbeat_pb2.DependencyStatus(
                name="postgresql", state=heartbeat_pb2.DEPENDENCY_STATE_UP, latency_ms=1.5
            )
        ],
    )
    beat.heartbeat_time.GetCurrentTime()
    beat.uptime.FromSeconds(3600)
    return beat


async def connect(neurons: list[Neuron]) -> None:
    """Opens every stream, so many at a time."""
    gate = asyncio.Semaphore(CONNECTING_AT_ONCE)

    async def one(neuron: Neuron) -> None:
        async with gate:
            await neuron.open()

    async with asyncio.TaskGroup() as group:
        for neuron in neurons:
            group.create_task(one(neuron))


async def main(arguments: argparse.Namespace, tokens: dict[str, str]) -> None:
    """Runs one swarm."""
    names = [
        f"bench-{number:05d}"
        for number in range(arguments.first, arguments.first + arguments.count)
    ]
    neurons = [Neuron(arguments.address, name, tokens.get(name, "")) for name in names]
    await connect(neurons)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    stop = asyncio.Event()
    beating = [asyncio.create_task(neuron.beat(arguments.interval, stop)) for neuron in neurons]
    await asyncio.to_thread(sys.stdin.read)
    stop.set()
    lost = sum(neuron.lost for neuron in neurons)
    for task in beating:
        task.cancel()
    await asyncio.gather(*beating, return_exceptions=True)
    print(json.dumps({"sent": sum(neuron.sent for neuron in neurons), "lost": lost}), flush=True)
    await asyncio.gather(*(neuron.close() for neuron in neurons), return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds")
    parser.add_argument("--tokens", default="", help="a JSON file: neuron_id to token")
    arguments = parser.parse_args()
    known = json.loads(Path(arguments.tokens).read_text()) if arguments.tokens else {}
    asyncio.run(main(arguments, known))
