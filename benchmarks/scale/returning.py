"""Many light neurons in one process that come back as the SDK's do, and lose no report.

    python -m benchmarks.scale.returning ADDRESS --tokens FILE --first 0 --count 1000 --interval 5

Each has a connection of its own, the SDK's backoff, obeys SessionSettings and Reconnect, and keeps
its reports (in memory) until they are acknowledged. A report is one counter that has grown by the
report's own sequence, so that what was lost and what was doubled cannot make up for each other.

It prints `ready` when each has had its first Welcome; then it answers each line of standard input:
`look` with its counts as JSON; `report`, `no-reports` and `silence` with `ok`. Silence is no
heartbeats either. It ends with standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import uuid
from collections import Counter, deque
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.swarm import CONNECTING_AT_ONCE, full_heartbeat
from federation.v1 import report_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import SessionServiceStub
from neuron_sdk.backoff import Backoff
from neuron_sdk.channel import RpcFailure, open_channel, read_failure
from neuron_sdk.recovery import gives_turn

METRIC = "bench.sent"
CONNECT_WITHIN_S = 20.0
"""The SDK's patience with a connection and with a Welcome."""
WINDOW = 256
JITTER = 0.1
"""How much longer than the interval that it was told to keep a neuron waits at the most."""

IN_ORDER = frozenset({"SERVER_DRAINING"})


class Said:
    """What the parent has told this process, for all its neurons."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Heartbeats from the first Welcome on, no reports yet."""
        self.address: str = arguments.address
        self.interval_s: float = arguments.interval
        self.report_s: float = arguments.report
        self.heedless: bool = arguments.heedless
        self.reporting = False
        self.beating = True
        self.counts: Counter[str] = Counter()
        self.gate = asyncio.Semaphore(CONNECTING_AT_ONCE)


class Leave(Exception):
    """The session is to be held anew, after so many seconds at the least."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class Neuron:
    """One neuron: its sessions, one after the other, and the reports that nobody acknowledged."""

    def __init__(self, said: Said, neuron_id: str, token: str) -> None:
        """Not connected yet."""
        self.connected = False
        self.welcomed = asyncio.Event()
        self.told_s = 0.0
        self.spool: deque[pb.NeuronMessage] = deque()
        self._said = said
        self._id = neuron_id
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._instance_id = str(uuid.uuid4())
        self._spool_id = uuid.uuid4().hex
        self._next_sequence = 1
        self._sent_sequence = 0
        self._news = asyncio.Event()
        self._backoff = Backoff()
        self._waiting: grpc.aio.Channel | None = None
        self._beat = full_heartbeat()
        self._one_write = asyncio.Lock()

    async def run(self) -> None:
        """Holds a session until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            at_least = 0.0
            try:
                await self._hold_one()
            except* Leave as group:
                at_least = max(each.after_s for each in _flat(group))
            except* RpcFailure as group:
                at_least = max(each.retry_after for each in _flat(group))
            except* (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                pass
            if self._waiting is None:
                wait_s = self._backoff.next_s(loop.time(), at_least=at_least)
            else:
                wait_s = self._backoff.turn_s(at_least)
            await asyncio.sleep(wait_s)

    async def report(self) -> None:
        """Puts a report into the spool each interval, connected or not."""
        await asyncio.sleep(random.uniform(0, self._said.report_s))
        while True:
            if self._said.reporting:
                self.spool.append(self._new_report())
                self._said.counts["reports"] += 1
                self._said.counts["sum"] += self._next_sequence
                self._next_sequence += 1
                self._news.set()
            await asyncio.sleep(self._said.report_s)

    def _new_report(self) -> pb.NeuronMessage:
        report = report_pb2.AnalyticsReport(
            points=[report_pb2.MetricPoint(name=METRIC, counter=self._next_sequence)]
        )
        report.start_time.GetCurrentTime()
        report.end_time.CopyFrom(report.start_time)
        return pb.NeuronMessage(sequence=self._next_sequence, analytics_report=report)

    async def _hold_one(self) -> None:
        counts, first = self._said.counts, not self.welcomed.is_set()
        channel, self._waiting = self._waiting or open_channel(self._said.address), None
        call: Any = None
        try:
            try:
                if first:
                    async with self._said.gate:
                        call = await self._open(channel)
                else:
                    call = await self._open(channel)
            except RpcFailure as failure:
                if gives_turn(failure.reason):
                    self._waiting = channel
                counts["turns" if self._waiting else "failed"] += 1
                raise
            except BaseException:
                counts["failed"] += 1
                raise
            self.connected = True
            self.welcomed.set()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read(call))
                    group.create_task(self._send(call))
                    group.create_task(self._beats(call))
            except* Leave:
                counts["asked"] += 1
                raise
            except* RpcFailure as failures:
                asked = any(each.reason in IN_ORDER for each in _flat(failures))
                counts["asked" if asked else "lost"] += 1
                raise
        finally:
            self.connected = False
            if call is not None:
                call.cancel()
            if self._waiting is None:
                await channel.close()

    async def _open(self, channel: grpc.aio.Channel) -> Any:
        async with asyncio.timeout(CONNECT_WITHIN_S):
            await channel.channel_ready()
        call: Any = SessionServiceStub(channel).Connect(metadata=self._metadata)
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                hello = pb.Hello(
                    instance_id=self._instance_id,
                    spool_id=self._spool_id,
                    first_sequence=self.spool[0].sequence if self.spool else self._next_sequence,
                    next_sequence=self._next_sequence,
                )
                await call.write(pb.NeuronMessage(hello=hello))
                message = await call.read()
            if not isinstance(message, pb.FederationMessage) or not message.HasField("welcome"):
                raise await _status(call)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await _status(call) from None
        except BaseException:
            call.cancel()
            raise
        self._acknowledge(message.welcome.last_sequence)
        self._sent_sequence = message.welcome.last_sequence
        self._obey(message.welcome.settings)
        self._backoff.opened(asyncio.get_running_loop().time())
        return call

    async def _read(self, call: Any) -> None:
        while isinstance(message := await self._next(call), pb.FederationMessage):
            self._acknowledge(message.ack_sequence)
            match message.WhichOneof("message"):
                case "settings":
                    self._obey(message.settings)
                case "refusal":
                    self._said.counts["refused"] += 1
                case "reconnect":
                    raise Leave(message.reconnect.after.ToMicroseconds() / 1e6)
        raise await _status(call)

    async def _next(self, call: Any) -> Any:
        try:
            return await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await _status(call) from None

    def _acknowledge(self, sequence: int) -> None:
        while self.spool and self.spool[0].sequence <= sequence:
            self.spool.popleft()
            self._news.set()

    def _obey(self, settings: pb.SessionSettings) -> None:
        if not self._said.heedless:
            self.told_s = settings.heartbeat_interval.ToMicroseconds() / 1e6

    async def _send(self, call: Any) -> None:
        """What the spool holds, in order, at most a window of it without an acknowledgement."""
        while True:
            self._news.clear()
            window = [self.spool[n] for n in range(min(WINDOW, len(self.spool)))]
            for message in window:
                if message.sequence > self._sent_sequence:
                    message.send_time.GetCurrentTime()
                    await self._write(call, message)
                    self._sent_sequence = message.sequence
            await self._news.wait()

    async def _beats(self, call: Any) -> None:
        """One at once, as the SDK does, and then at the interval."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if self._said.beating:
                self._beat.application.requests += 1
                await self._write(call, pb.NeuronMessage(heartbeat=self._beat))
                self._said.counts["heartbeats"] += 1
            if self.told_s:
                due = loop.time() + self.told_s * random.uniform(1.0, 1.0 + JITTER)
            else:
                due = max(due + self._said.interval_s, loop.time())
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _write(self, call: Any, message: pb.NeuronMessage) -> None:
        try:
            async with self._one_write:
                await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await _status(call) from None


def _flat(group: BaseExceptionGroup[Any]) -> list[Any]:
    """What is in a group, and in the groups in it."""
    found: list[Any] = []
    for each in group.exceptions:
        found += _flat(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


async def _status(call: Any) -> RpcFailure:
    """How a call has ended."""
    code, message = await call.code(), await call.details()
    trailers = await call.trailing_metadata()
    return read_failure(grpc.aio.AioRpcError(code, (), trailers, message))  # type: ignore[arg-type]


def look(said: Said, neurons: list[Neuron]) -> str:
    """The counts of all neurons, as JSON."""
    now = {
        "connected": sum(neuron.connected for neuron in neurons),
        "waiting": sum(len(neuron.spool) for neuron in neurons),
        "slowed": sum(neuron.told_s > said.interval_s for neuron in neurons),
    }
    return json.dumps(said.counts | now)


async def main(arguments: argparse.Namespace, tokens: dict[str, str]) -> None:
    """Runs one swarm."""
    said = Said(arguments)
    names = sorted(tokens)[arguments.first : arguments.first + arguments.count]
    neurons = [Neuron(said, name, tokens[name]) for name in names]
    async with asyncio.timeout(arguments.within):
        tasks = [asyncio.create_task(neuron.run()) for neuron in neurons]
        await asyncio.gather(*(neuron.welcomed.wait() for neuron in neurons))
    tasks += [asyncio.create_task(neuron.report()) for neuron in neurons]
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.strip():
            case "look":
                print(look(said, neurons), flush=True)
                continue
            case "report":
                said.reporting = True
            case "no-reports":
                said.reporting = False
            case "silence":
                said.reporting = said.beating = False
        print("ok", flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--tokens", required=True, help="a JSON file: neuron_id to token")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between heartbeats")
    parser.add_argument("--report", type=float, default=5.0, help="seconds between reports")
    parser.add_argument("--heedless", action="store_true", help="keep the interval in any case")
    parser.add_argument("--within", type=float, default=600.0, help="seconds to connect in")
    parsed = parser.parse_args()
    asyncio.run(main(parsed, json.loads(Path(parsed.tokens).read_text())))
