"""Faults that are made, and what holds over them: real processes, killed, frozen and cut off.

The server is a process of its own on a PostgreSQL of this module's own, which the tests stop,
freeze and kill. Neurons speak the bare protocol.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import psycopg
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status

from federation.v1 import (
    command_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
)
from federation.v1 import session_service_pb2 as pb
from federation_server.store import migrate
from federation_server.store.embedded import EmbeddedPostgres
from tests.support.federation import ADMIN_KEY, BareNeuron, Served, connected, running
from tests.support.plain_neuron import PlainNeuron, plain_neuron
from tests.support.postgres import FAST_AND_LOOSE, libpq, passable_folder
from tests.support.processes import FederationProcess
from tests.support.proxy import Proxy, proxy
from tests.support.waiting import eventually

FLOOD = 100_000
CUTS = 2_000
ONLINE = neuron_pb2.PRESENCE_ONLINE
SUSPECT = neuron_pb2.PRESENCE_SUSPECT
OFFLINE = neuron_pb2.PRESENCE_OFFLINE
SETTINGS = {
    "ADMIN_API_KEY": ADMIN_KEY,
    "FEDERATION_DRAIN_TIMEOUT": "PT4S",
    "FEDERATION_OFFLINE_AFTER": "PT2S",
    "FEDERATION_PRESENCE_PATIENCE": "PT3S",
}


class Postgres:
    """A PostgreSQL that can be stopped, frozen and killed."""

    def __init__(self, folder: Path) -> None:
        # It is killed here, and must keep what it has committed.
        settings = FAST_AND_LOOSE | {"synchronous_commit": "on"}
        self.embedded = EmbeddedPostgres(folder / "data", settings=settings)
        self.url = ""

    def start(self) -> None:
        self.url = self.embedded.start()

    def processes(self) -> list[psutil.Process]:
        assert self.embedded.pid is not None
        postmaster = psutil.Process(self.embedded.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def freeze(self) -> None:
        for process in self.processes():
            process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # a backend whose client has gone
                process.resume()

    def ask(self, query: str) -> Any:
        with psycopg.connect(libpq(self.url), autocommit=True) as connection:
            found = connection.execute(query.encode()).fetchone()
            return None if found is None else found[0]

    def do(self, statement: str) -> None:
        with psycopg.connect(libpq(self.url), autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def doomed() -> Iterator[Postgres]:
    with passable_folder() as folder:
        doomed = Postgres(folder)
        doomed.start()
        try:
            migrate.upgrade(doomed.url)
            yield doomed
        finally:
            doomed.embedded.stop()


@contextmanager
def serving(doomed: Postgres, folder: Path) -> Iterator[FederationProcess]:
    """A server; what it prints has no traceback and no incident in it."""
    server = FederationProcess(folder, "serve", DATABASE_URL=doomed.url, **SETTINGS)
    try:
        server.start()
        yield server
    finally:
        server.kill()
    assert "Traceback" not in server.output, server.output[-5000:]
    assert "incident" not in server.output, server.output[-5000:]


@pytest.fixture(scope="module")
def server(doomed: Postgres) -> Iterator[FederationProcess]:
    with passable_folder() as folder, serving(doomed, folder) as server:
        yield server


@pytest_asyncio.fixture
async def served(server: FederationProcess) -> AsyncIterator[Served]:
    async with calling(server) as served:
        yield served


@asynccontextmanager
async def calling(server: FederationProcess) -> AsyncIterator[Served]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Served(server.address, channel)


class Peer:
    """A neuron's stream through a proxy that stands still after its Hello."""

    def __init__(self, served: Served, through: Proxy, began: float) -> None:
        self.served = served
        self.through = through
        self.began = began


@pytest_asyncio.fixture(scope="module", autouse=True)
async def dead_peer(server: FederationProcess) -> AsyncIterator[Peer]:
    """Made first and looked at last: a dead peer takes half a minute to be found."""
    async with calling(server) as served, proxy(server.address) as through:
        token = await served.register("dead-peer")
        async with grpc.aio.insecure_channel(through.address) as channel:
            neuron = BareNeuron(Served(through.address, channel), token)
            await neuron.hello()
            through.stall()
            yield Peer(served, through, time.monotonic())
            neuron.call.cancel()


async def shown(served: Served, neuron_id: str) -> neuron_pb2.Neuron:
    answer = await served.fleet.GetNeuron(
        fleet_service_pb2.GetNeuronRequest(neuron_id=neuron_id), metadata=served.admin, timeout=10
    )
    return answer.neuron


async def presence(served: Served, neuron_id: str) -> int:
    return (await shown(served, neuron_id)).presence


async def health(served: Served) -> int:
    stub: Any = HealthStub(served.channel)
    answer = await stub.Check(HealthCheckRequest(), timeout=5)
    status: int = answer.status
    return status


async def issue(served: Served, neuron_id: str, **request: Any) -> command_pb2.Command:
    answer = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(
            command=command_service_pb2.CommandSpec(neuron_id=neuron_id, type="run"), **request
        ),
        metadata=served.admin,
        timeout=20,
    )
    return answer.command


def now() -> Timestamp:
    time = Timestamp()
    time.GetCurrentTime()
    return time


def report(name: str, value: float = 1.0) -> report_pb2.AnalyticsReport:
    return report_pb2.AnalyticsReport(
        start_time=now(), end_time=now(), points=[report_pb2.MetricPoint(name=name, counter=value)]
    )


def total(doomed: Postgres, name: str) -> float:
    return float(
        doomed.ask(
            "SELECT coalesce(sum(value), 0) FROM metric_points"  # noqa: S608 - a name of ours
            f" JOIN metric_series USING (series_id) WHERE name = '{name}'"
        )
    )


class Load:
    """Neurons of the bare protocol that send heartbeats and reports all the time."""

    def __init__(self, neurons: list[PlainNeuron], name: str) -> None:
        self.sent = 0
        self._neurons = neurons
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for neuron in self._neurons:
                neuron.heartbeat()
                neuron.report(analytics_report=report(self._name))
                self.sent += 1

    def finish(self) -> int:
        """Ends it, and says how much was reported."""
        self._stop.set()
        self._thread.join()
        return self.sent

    def goes_on(self, sent: int) -> bool:
        """More than that has been reported."""
        return self.sent > sent

    @property
    def waiting(self) -> int:
        """Reports that no server has acknowledged."""
        return sum(len(neuron._spool) for neuron in self._neurons)


@asynccontextmanager
async def load(served: Served, prefix: str) -> AsyncIterator[tuple[Load, list[str]]]:
    """Three neurons under load, which go SUSPECT after 2 s of silence."""
    token = await served.enrollment_token()
    thresholds = neuron_pb2.AlertThresholds()
    thresholds.heartbeat_timeout.FromSeconds(2)
    names = [f"{prefix}-{number}" for number in range(3)]
    contexts = [
        plain_neuron(
            served.address,
            token,
            neuron_pb2.NeuronDescription(
                neuron_id=name,
                type="worker",
                alert_thresholds=thresholds,
                command_types=[neuron_pb2.CommandType(type="run")],
            ),
            {},
        )
        for name in names
    ]
    neurons = [await asyncio.to_thread(context.__enter__) for context in contexts]
    under = Load(neurons, prefix.replace("-", "_"))
    try:
        for name in names:
            await eventually(partial(is_online, served, name), describe=f"{name} ONLINE")
        yield under, names
    finally:
        under.finish()
        for context in contexts:
            await asyncio.to_thread(context.__exit__, None, None, None)


async def is_online(served: Served, neuron_id: str) -> bool:
    try:
        return await presence(served, neuron_id) == ONLINE
    except grpc.aio.AioRpcError:
        return False


async def is_health(served: Served, status: int) -> bool:
    return await health(served) == status


async def refused(call: Any) -> tuple[grpc.StatusCode, bool, float]:
    """How a call fails: its code, whether it says when to try again, and after how long."""
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    took = time.monotonic() - began
    status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]  # it has what is needed
    retry = status is not None and any(
        detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details
    )
    return raised.value.code(), retry, took


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_an_outage_of_postgresql_ends_no_stream_loses_nothing_and_shows_at_once(
    server: FederationProcess, served: Served, doomed: Postgres, how: str
) -> None:
    away, back = {
        "stopped": (doomed.embedded.stop, doomed.start),
        "frozen": (doomed.freeze, doomed.thaw),
    }[how]
    name = f"outage_{how}"
    async with load(served, f"outage-{how}") as (under, names):
        epochs = [(await shown(served, each)).session.epoch for each in names]
        said = len(server.output)
        await asyncio.to_thread(away)
        try:
            await eventually(
                lambda: is_health(served, HealthCheckResponse.NOT_SERVING),
                within=6,
                describe="health says that the database is away",
            )
            code, retry, took = await refused(shown(served, names[0]))
            assert (code, retry) == (grpc.StatusCode.UNAVAILABLE, True)
            assert took < 1.0
            assert under.waiting > 0
        finally:
            await asyncio.to_thread(back)
        await eventually(
            lambda: is_health(served, HealthCheckResponse.SERVING), describe="it serves again"
        )
        under.finish()
        await eventually(lambda: not under.waiting, within=20, describe="all is acknowledged")
        assert total(doomed, name) == under.sent
        states = [await shown(served, each) for each in names]
        assert [state.session.epoch for state in states] == epochs
        assert all(state.session.open for state in states)
        down = [
            line
            for line in server.output[said:].splitlines()
            if "presence_down" in line and name.replace("_", "-") in line
        ]
        assert down == []


async def test_a_server_killed_under_load_loses_nothing_and_shows_nobody_offline(
    folder: Path, doomed: Postgres
) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, load(served, "killed") as (under, names):
            token = await served.register("journal")
            neuron = BareNeuron(served, token)
            await neuron.hello()
            command = await issue(served, "journal")
            first = (await neuron.receive()).command
            assert (first.command_id, first.attempt) == (command.command_id, 1)
            server.kill()
            await asyncio.to_thread(server.start)
            seen: set[int] = set()
            again = BareNeuron(served, token)
            await again.hello()
            second = (await again.receive()).command
            assert (second.command_id, second.attempt) == (command.command_id, 1)

            async def all_online() -> bool:
                found = [await presence(served, each) for each in names]
                seen.update(found)
                return set(found) == {ONLINE}

            await eventually(all_online, describe="all are back")
            under.finish()
            await eventually(lambda: not under.waiting, within=20, describe="all is acknowledged")
            assert total(doomed, "killed") == under.sent
            assert OFFLINE not in seen
            again.call.cancel()


async def test_of_two_processes_with_one_id_on_two_servers_the_older_is_told_and_changes_nothing(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    with serving(doomed, folder) as other:
        async with calling(other) as elsewhere:
            token = await served.register("twin")
            older = BareNeuron(served, token)
            assert (await older.hello(spool_id="older")).epoch == 1
            newer = BareNeuron(elsewhere, token)
            assert (await newer.hello(spool_id="newer")).epoch == 2
            await newer.send(sequence=1, send_time=now(), analytics_report=report("twin", 1.0))
            codes = {grpc.StatusCode.ABORTED}
            try:
                late = report("twin", 100.0)
                await older.send(sequence=1, send_time=now(), analytics_report=late)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The end came while it wrote: grpc's client puts INTERNAL in the status's place.
                codes.add(grpc.StatusCode.INTERNAL)
            await newer.acked(1)
            code, _ = await older.end()
            assert code in codes
            assert total(doomed, "twin") == 1.0
            state = await shown(served, "twin")
            assert (state.presence, state.session.epoch) == (ONLINE, 2)
            newer.call.cancel()


async def test_a_live_stream_whose_session_was_closed_elsewhere_is_opened_again(
    served: Served, doomed: Postgres
) -> None:
    async with connected(served, "given-up") as neuron:
        await asyncio.to_thread(
            doomed.do,
            "UPDATE neuron_states SET session_open = false, session_close_time = now(),"
            " presence = 'SUSPECT', presence_reason = 'server lost' WHERE neuron_id = 'given-up'",
        )
        await eventually(lambda: is_online(served, "given-up"), describe="it is ONLINE again")
        command = await issue(served, "given-up")
        assert (await neuron.receive()).command.command_id == command.command_id


async def test_a_stream_cut_in_the_middle_of_a_message_is_suspect_then_offline_and_leaves_nothing(
    database_url: str,
) -> None:
    options = {"offline_after": "PT1S", "presence_patience": "PT0S"}
    async with running(database_url, **options) as federation:
        token = await federation.register("cut")

        async def cut_once() -> None:
            async with (
                proxy(federation.address) as through,
                grpc.aio.insecure_channel(through.address) as channel,
            ):
                neuron = BareNeuron(Served(through.address, channel), token)
                await neuron.hello()
                through.cut_after(30_000)
                big = report_pb2.AnalyticsReport(start_time=now(), end_time=now())
                big.events.add(
                    event_time=now(),
                    severity=report_pb2.SEVERITY_INFO,
                    type="t",
                    message="x" * 8000,
                )
                for _ in range(9):
                    big.events.append(big.events[0])
                with suppress(grpc.aio.AioRpcError):
                    await neuron.send(sequence=1, send_time=now(), analytics_report=big)
                assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE

        await cut_once()
        await eventually(lambda: not len(federation.app.sessions), describe="its session ends")
        await federation.app.writer.settled()
        assert await presence(federation, "cut") == SUSPECT

        async def offline() -> bool:
            return await presence(federation, "cut") == OFFLINE

        await eventually(offline, describe="it is OFFLINE after offline_after")
        tasks = len(asyncio.all_tasks())
        for _ in range(10):
            await cut_once()
        await eventually(lambda: not len(federation.app.sessions), describe="all sessions end")
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 2, describe="no task is left")
        rows = "SELECT count(*) FROM reported_events"
        async with federation.app.database.begin() as connection:
            assert (await connection.exec_driver_sql(rows)).scalar() == 0


def deep(levels: int) -> Struct:
    """A Struct within a Struct within a Struct."""
    root = Struct()
    at = root
    for _ in range(levels):
        at = at.fields["a"].struct_value
    at.fields["a"].number_value = 1.0
    return root


def hostile_messages() -> dict[str, dict[str, Any]]:
    """Messages that a stream has to outlive: each is refused, or does no harm."""
    beat, application = heartbeat_pb2.Heartbeat, heartbeat_pb2.ApplicationMetrics
    update, finished = pb.CommandUpdate, pb.CommandFinished
    most = 2**64 - 1
    nan_histogram = report_pb2.HistogramValue(
        bounds=[math.nan], bucket_counts=[most, most], sum=math.inf, min=math.nan, max=math.nan
    )
    bad_point = report_pb2.MetricPoint(name="h", histogram=nan_histogram)
    labels = {f"l{number}": "x" for number in range(10_000)}
    old, far = Timestamp(seconds=-62_135_596_800), Timestamp(seconds=253_402_300_799)
    negative = heartbeat_pb2.Heartbeat()
    negative.uptime.FromSeconds(-5)
    broken_time = Timestamp(seconds=2**62, nanos=-5)
    some_id = "00000000-0000-0000-0000-000000000000"
    return {
        "nothing": {},
        "empty heartbeat": {"heartbeat": beat()},
        "NaN": {"heartbeat": beat(health_score=math.nan)},
        "infinite": {"heartbeat": beat(application=application(response_ms_sum=math.inf))},
        "unknown enum": {"heartbeat": beat(activity=77)},  # type: ignore[arg-type]
        "negative span": {"heartbeat": negative},
        "impossible time": {"heartbeat": beat(heartbeat_time=broken_time)},
        "uint64 max": {"heartbeat": beat(application=application(requests=most))},
        "int64 max": {"heartbeat": beat(application=application(requests=2**63 - 1))},
        "double max": {"heartbeat": beat(application=application(response_ms_sum=1.7e308))},
        "NUL": {"heartbeat": beat(versions=heartbeat_pb2.Versions(service="a\0b"))},
        "controls": {"heartbeat": beat(versions=heartbeat_pb2.Versions(service="\x01\x1b[2J"))},
        "sequence 2^64-1": {"sequence": most, "send_time": now(), "analytics_report": report("h")},
        "unknown, 2^64-1": {"sequence": most},
        "impossible send_time": {"send_time": broken_time, "analytics_report": report("h")},
        "no send_time": {"analytics_report": report("h")},
        "send_time of year 1": {"send_time": old, "analytics_report": report("h")},
        "send_time of year 9999": {"send_time": far, "analytics_report": report("h9999")},
        "event of year 9999": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=far,
                events=[
                    report_pb2.ReportedEvent(
                        event_time=far, severity=report_pb2.SEVERITY_INFO, type="t"
                    )
                ],
            ),
        },
        "NaN everywhere": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[bad_point],
                custom_metrics={"x": math.nan},
            ),
        },
        "10,000 labels": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[report_pb2.MetricPoint(name="h", counter=1, labels=labels)],
            ),
        },
        "labels that no index takes": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[
                    report_pb2.MetricPoint(
                        name="h",
                        counter=1,
                        labels={f"l{each}": chaos(each, 256) for each in range(16)},
                    )
                ],
            ),
        },
        "update of nothing": {"command_update": update(command_id="x", attempt=1)},
        "update of no attempt": {
            "command_update": update(command_id=some_id, accepted=pb.CommandAccepted())
        },
        "empty id": {"command_update": update(attempt=2**32 - 1, accepted=pb.CommandAccepted())},
        "NUL id": {
            "command_update": update(
                command_id="\0", attempt=2**32 - 1, accepted=pb.CommandAccepted()
            )
        },
        "deep response": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(
                    state=command_pb2.COMMAND_STATE_SUCCEEDED,
                    response=deep(30),
                ),
            )
        },
        "NUL in response": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(
                    state=command_pb2.COMMAND_STATE_SUCCEEDED,
                    response=Struct(fields={"a\0": deep(1).fields["a"]}),
                ),
            )
        },
        "unknown state": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(state=999),  # type: ignore[arg-type]
            )
        },
    }


def chaos(seed: int, length: int) -> str:
    """Text that does not compress."""
    return "".join(chr(33 + 7919 * (seed + 1) * (at + 1) ** 3 % 9001 % 90) for at in range(length))


async def test_no_hostile_message_ends_its_stream_or_disturbs_another(
    served: Served, server: FederationProcess
) -> None:
    async with connected(served, "victim") as victim, connected(served, "hostile") as hostile:
        sequence = 0
        for name, message in hostile_messages().items():
            durable = {"analytics_report", "command_update"}.intersection(message)
            if durable:
                sequence += 1
            await hostile.send(**({"sequence": sequence} if durable else {}) | message)
            # What comes after it is stored, for both.
            sequence += 1
            await hostile.send(sequence=sequence, send_time=now(), analytics_report=report("fine"))
            try:
                await hostile.acked(sequence)
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"{name}: {error}\n{server.output[-3000:]}") from error
        await victim.send(sequence=1, send_time=now(), analytics_report=report("fine"))
        await victim.acked(1)
        command = await issue(served, "victim")
        assert (await victim.receive()).command.command_id == command.command_id


def deep_on_the_wire(levels: int) -> bytes:
    """A Struct within a Struct, by hand: no library would write as many."""
    struct = b""
    for _ in range(levels):
        value = b"\x2a" + _varint(len(struct)) + struct
        entry = b"\x0a\x01a\x12" + _varint(len(value)) + value
        struct = b"\x0a" + _varint(len(entry)) + entry
    return struct


def raw_messages() -> dict[str, tuple[bytes, set[grpc.StatusCode]]]:
    """What no message of the contract is, and how a stream may end on it."""
    invalid, exhausted = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
    depth = deep_on_the_wire(200)
    finished = _tagged(pb.CommandFinished, "response", depth)
    update = _tagged(pb.CommandUpdate, "finished", finished)
    return {
        "garbage": (b"\xff\xff\xff\xff\x07garbage", {invalid}),
        "invalid UTF-8": (
            pb.NeuronMessage(goodbye=pb.Goodbye(reason="abcd"))
            .SerializeToString()
            .replace(b"abcd", b"\xff\xfe\xfd\xfc"),
            {invalid},
        ),
        "a Struct 200 deep": (
            pb.NeuronMessage(
                sequence=1, command_update=pb.CommandUpdate(command_id="x", attempt=1)
            ).SerializeToString()
            + _tagged(pb.NeuronMessage, "command_update", update),
            {invalid},
        ),
        "more than 4 MiB": (b"\x0a" + _varint(5 << 20) + bytes(5 << 20), {exhausted}),
    }


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _tagged(kind: type[Message], name: str, value: bytes) -> bytes:
    number = kind.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | 2) + _varint(len(value)) + value


@pytest.mark.parametrize("name", raw_messages())
async def test_bytes_that_are_no_message_end_their_stream_with_a_name_for_it(
    served: Served, name: str
) -> None:
    data, codes = raw_messages()[name]
    token = await served.register(f"raw-{abs(hash(name))}")
    connect = served.channel.stream_stream(
        "/federation.v1.SessionService/Connect",
        request_serializer=lambda message: message,
        response_deserializer=pb.FederationMessage.FromString,
    )
    for first in (True, False):
        call = connect(metadata=(("authorization", f"Bearer {token}"),))
        if not first:
            hello = pb.Hello(instance_id="i", spool_id="s", first_sequence=1, next_sequence=1)
            await call.write(pb.NeuronMessage(hello=hello).SerializeToString())
            await call.read()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(data)
        async with asyncio.timeout(10):
            assert await call.code() in codes, (first, await call.details())


async def test_a_hello_with_the_greatest_numbers_opens_a_session(served: Served) -> None:
    neuron = BareNeuron(served, await served.register("greatest"))
    command = pb.RunningCommand(
        command_id="00000000-0000-0000-0000-000000000000", attempt=2**32 - 1
    )
    await neuron.hello(running=[command])
    neuron.call.cancel()


async def test_unary_calls_refuse_the_impossible_by_name(served: Served) -> None:
    token = await served.register("unary")
    metadata = (("authorization", f"Bearer {token}"),)
    bad = [
        served.session.SendHeartbeat(pb.SendHeartbeatRequest(), metadata=metadata),
        served.session.ReportAnalytics(
            pb.ReportAnalyticsRequest(
                spool_id="s", sequence=2**64 - 1, send_time=now(), report=report("u")
            ),
            metadata=metadata,
        ),
        served.session.ReportAnalytics(
            pb.ReportAnalyticsRequest(
                spool_id="s", sequence=1, send_time=Timestamp(seconds=2**62), report=report("u")
            ),
            metadata=metadata,
        ),
        served.command.IssueCommand(
            command_service_pb2.IssueCommandRequest(
                command=command_service_pb2.CommandSpec(
                    neuron_id="un\0ary", type="run", not_before_time=Timestamp(seconds=-1)
                )
            ),
            metadata=served.admin,
        ),
    ]
    for call in bad:
        assert (await refused(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
    issuing: Any = served.channel.unary_unary(
        "/federation.v1.CommandService/IssueCommand", request_serializer=lambda message: message
    )
    depth = deep_on_the_wire(200)
    data = _tagged(command_service_pb2.CommandSpec, "data", depth)
    spec = _tagged(command_service_pb2.IssueCommandRequest, "command", data)
    for raw in (b"\xff\xff\xff\xff\x07garbage", spec):
        code, _, _ = await refused(issuing(raw, metadata=served.admin))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    too_large = issuing(bytes(5 << 20), metadata=served.admin)
    assert (await refused(too_large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    for unknown in ("\x01", "' OR 1=1", "ü" * 100):
        request = command_service_pb2.GetCommandRequest(command_id=unknown)
        call = served.command.GetCommand(request, metadata=served.admin)
        assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND


def flood(address: str, token: str) -> None:
    """Sends heartbeats as fast as it can."""

    async def send() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            neuron = BareNeuron(Served(address, channel), token)
            await neuron.hello()
            beat = pb.NeuronMessage(heartbeat=heartbeat_pb2.Heartbeat(health_score=50.0))
            for _ in range(FLOOD):
                await neuron.call.write(beat)

    asyncio.run(send())


async def test_100_000_heartbeats_at_once_keep_nobody_else_waiting(
    served: Served, server: FederationProcess
) -> None:
    token = await served.register("flood")
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    flooding = get_context("spawn").Process(target=flood, args=(served.address, token))
    async with connected(served, "calm") as calm:
        flooding.start()
        try:
            await eventually(lambda: is_online(served, "flood"), describe="the flood has begun")
            for sequence in range(1, 31):
                await calm.send(sequence=sequence, send_time=now(), analytics_report=report("calm"))
                await calm.acked(sequence)
                await asyncio.sleep(0.1)
        finally:
            flooding.kill()
            flooding.join()
    assert memory().rss - before < 64 * 1024 * 1024


async def test_a_neuron_that_never_reads_is_sent_home_all_the_same(database_url: str) -> None:
    async with running(database_url) as federation:
        token = await federation.register("deaf")
        async with grpc.aio.insecure_channel(
            federation.address,
            options=[("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)],
        ) as channel:
            deaf = BareNeuron(Served(federation.address, channel), token)
            await deaf.hello()
            bad = heartbeat_pb2.Heartbeat(
                dependencies=[heartbeat_pb2.DependencyStatus(name="x" * 500)] * 100
            )

            async def talk() -> None:
                for _ in range(2000):
                    await deaf.send(heartbeat=bad)

            talking = asyncio.create_task(talk())
            session = federation.app.sessions.get("deaf")
            assert session is not None
            await eventually(lambda: session.crowded, within=20, describe="nobody reads")
            await federation.fleet.DeactivateNeuron(
                fleet_service_pb2.DeactivateNeuronRequest(neuron_id="deaf"),
                metadata=federation.admin,
            )
            await eventually(
                lambda: not len(federation.app.sessions), within=8, describe="its stream has ended"
            )
            talking.cancel()
            deaf.call.cancel()
            await asyncio.gather(talking, return_exceptions=True)


async def test_streams_opened_and_cut_at_once_leave_no_session_behind(
    served: Served, server: FederationProcess, doomed: Postgres
) -> None:
    tokens = [await served.register(f"cut-{number}") for number in range(8)]

    async def open_and_cut(number: int) -> None:
        neuron = BareNeuron(served, tokens[number % len(tokens)])
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
            await neuron.send(
                hello=pb.Hello(instance_id="i", spool_id="s", next_sequence=1, first_sequence=1)
            )
            await asyncio.sleep(number % 50 / 1000)
        neuron.call.cancel()

    async with connected(served, "stays") as stays:
        for begin in range(0, CUTS, 500):
            await asyncio.gather(*(open_and_cut(number) for number in range(begin, begin + 500)))

        async def closed() -> bool:
            query = (
                "SELECT count(*) FROM neuron_states WHERE session_open AND neuron_id LIKE 'cut-%'"
            )
            return bool(await asyncio.to_thread(doomed.ask, query) == 0)

        await eventually(closed, within=20, describe="every session is closed")
        await stays.send(sequence=1, send_time=now(), analytics_report=report("stays"))
        await stays.acked(1)


async def test_a_stream_that_says_nothing_is_ended(served: Served) -> None:
    neuron = BareNeuron(served, await served.register("silent"))
    code, details = await neuron.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "10 s" in details


def execute(served: Served, neuron_id: str) -> Any:
    return served.command.ExecuteCommand(
        command_service_pb2.ExecuteCommandRequest(
            command=command_service_pb2.CommandSpec(neuron_id=neuron_id, type="run")
        ),
        metadata=served.admin,
    )


async def test_sigterm_drains_streams_and_executions_in_order_and_in_time(
    folder: Path, doomed: Postgres
) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, connected(served, "drained") as neuron:
            following = execute(served, "drained")
            await following.read()
            assert (await neuron.receive()).HasField("command")
            await neuron.send(sequence=1, send_time=now(), analytics_report=report("drained"))
            await neuron.acked(1)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert (await neuron.receive()).HasField("reconnect")
            assert (await neuron.end())[0] is grpc.StatusCode.UNAVAILABLE

            async def to_its_end() -> None:
                while await following.read():
                    pass

            code, retry, _ = await refused(to_its_end())
            assert (code, retry) == (grpc.StatusCode.UNAVAILABLE, True)
            assert await asyncio.to_thread(server.process.wait, 10) == 0
            assert time.monotonic() - began < 3.0
        found = doomed.ask("SELECT presence_reason FROM neuron_states WHERE neuron_id = 'drained'")
        assert found == "server stopped"


async def test_sigterm_ends_in_time_although_postgresql_hangs(
    folder: Path, doomed: Postgres
) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, connected(served, "hung") as neuron:
            await asyncio.to_thread(doomed.freeze)
            try:
                await neuron.send(sequence=1, send_time=now(), analytics_report=report("hung"))
                server.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(server.process.wait, 12) == 0
            finally:
                await asyncio.to_thread(doomed.thaw)


async def test_a_second_signal_ends_the_server_at_once(folder: Path, doomed: Postgres) -> None:
    with serving(doomed, folder) as server:
        async with calling(server) as served, connected(served, "twice"):
            await asyncio.to_thread(doomed.freeze)  # so that the drain takes its time
            try:
                server.process.send_signal(signal.SIGTERM)
                await eventually(lambda: "server_draining" in server.output, describe="it drains")
                server.process.send_signal(signal.SIGTERM)
                status = await asyncio.to_thread(server.process.wait, 2)
            finally:
                await asyncio.to_thread(doomed.thaw)
            assert status == -signal.SIGTERM


async def test_postgresql_killed_under_load_loses_and_doubles_nothing(
    server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    async with load(served, "pgkill") as (under, _):
        for _ in range(3):
            await eventually(partial(under.goes_on, under.sent + 10), describe="load")
            for process in doomed.processes():
                process.kill()
            await asyncio.to_thread(doomed.embedded.wait, 10)
            await asyncio.to_thread(doomed.start)
        under.finish()
        await eventually(lambda: not under.waiting, within=20, describe="all is acknowledged")
        assert total(doomed, "pgkill") == under.sent
    await eventually(
        lambda: is_health(served, HealthCheckResponse.SERVING), describe="it serves again"
    )


async def test_one_request_id_from_two_callers_at_once_issues_once(served: Served) -> None:
    await served.register("asked-twice")
    made = await asyncio.gather(
        *(issue(served, "asked-twice", request_id="the-same") for _ in range(10))
    )
    assert len({command.command_id for command in made}) == 1


async def test_whichever_comes_first_no_deactivated_neuron_keeps_a_stream(
    served: Served, doomed: Postgres
) -> None:
    token = await served.register("racer")
    for turn in range(15):
        neuron = BareNeuron(served, token)

        async def deactivate(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            await served.fleet.DeactivateNeuron(
                fleet_service_pb2.DeactivateNeuronRequest(neuron_id="racer"), metadata=served.admin
            )

        async def connect(neuron: BareNeuron) -> None:
            with suppress(grpc.aio.AioRpcError, AssertionError, asyncio.InvalidStateError):
                await neuron.hello()

        with suppress(grpc.aio.AioRpcError):
            await asyncio.gather(connect(neuron), deactivate(turn / 1000), issue(served, "racer"))
        ended = (await neuron.end())[0]  # UNAVAILABLE where the two met in the database
        assert ended in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE}
        assert not (await shown(served, "racer")).session.open
        await served.fleet.ActivateNeuron(
            fleet_service_pb2.ActivateNeuronRequest(neuron_id="racer"), metadata=served.admin
        )


async def test_when_a_claim_was_not_answered_what_it_may_have_taken_is_sent_on_the_same_stream(
    database_url: str,
) -> None:
    async with running(database_url) as federation, connected(federation, "n") as neuron:
        command = await issue(federation, "n")
        assert (await neuron.receive()).command.command_id == command.command_id
        async with await federation.app.database.connect("test") as connection:
            await connection.execute(b"BEGIN")
            await connection.execute(b"LOCK TABLE commands IN EXCLUSIVE MODE")
            federation.app.dispatcher.wake("n")

            async def cut() -> bool:
                ended = await connection.execute(
                    b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    b" WHERE application_name = 'federation-dispatcher'"
                    b" AND datname = current_database() AND wait_event_type = 'Lock'"
                )
                return ended.rowcount > 0

            await eventually(cut, describe="a claim is cut off")
            await connection.execute(b"COMMIT")
        again = (await neuron.receive()).command
        assert (again.command_id, again.attempt) == (command.command_id, 1)


async def test_a_database_that_takes_no_writes_costs_no_message(database_url: str) -> None:
    async with running(database_url) as federation, connected(federation, "n") as neuron:
        name = federation.app.database.url.database
        async with await federation.app.database.connect("test") as connection:
            await connection.execute(
                f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode()
            )
            await connection.execute(
                b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                b" WHERE application_name = 'federation-writer' AND datname = current_database()"
            )
            failures = "federation_flush_failures_total"
            sample = federation.app.metrics.registry.get_sample_value
            await neuron.send(sequence=1, send_time=now(), analytics_report=report("n"))
            await eventually(lambda: (sample(failures) or 0) >= 3, describe="it is tried again")
            await connection.execute(
                b"SET default_transaction_read_only = off;"
                + f"ALTER DATABASE {name} RESET default_transaction_read_only".encode()
            )
            await connection.execute(
                b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                b" WHERE application_name = 'federation-writer' AND datname = current_database()"
            )
        message = await neuron.receive()
        assert message.ack_sequence == 1
        assert not message.HasField("refusal")


async def test_a_long_backlog_is_written_in_bounded_transactions(database_url: str) -> None:
    async with running(database_url) as federation, connected(federation, "n") as neuron:
        async with await federation.app.database.connect("test") as connection:
            await connection.execute(b"BEGIN")
            await connection.execute(b"LOCK TABLE spools IN ACCESS EXCLUSIVE MODE")
            big = report_pb2.AnalyticsReport(start_time=now(), end_time=now())
            for _ in range(90):
                big.events.add(
                    event_time=now(),
                    severity=report_pb2.SEVERITY_INFO,
                    type="t",
                    message="x" * 8000,
                )
            for sequence in range(1, 13):
                await neuron.send(sequence=sequence, send_time=now(), analytics_report=big)
            await eventually(
                lambda: len(federation.app.writer._waiting.durables) >= 8, describe="they wait"
            )
            await connection.execute(b"COMMIT")
        await neuron.acked(12)
        items = federation.app.metrics.registry.get_sample_value
        assert items("federation_flush_items_bucket", {"le": "2.0"}) != 0
        assert items("federation_flush_items_bucket", {"le": "5.0"}) == items(
            "federation_flush_items_count"
        )


async def test_a_dead_peer_is_found_by_keepalive(dead_peer: Peer) -> None:
    async def lost() -> bool:
        return not (await shown(dead_peer.served, "dead-peer")).session.open

    left_s = 45 - (time.monotonic() - dead_peer.began)
    await eventually(lost, within=max(5.0, left_s), describe="the dead peer's session is closed")
