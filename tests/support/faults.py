"""What the tests of faults share.

A PostgreSQL that can be stopped, frozen and killed; servers whose output is judged at their end;
neurons of the bare protocol under load; and what is asked about them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import psycopg
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status

from federation.v1 import command_pb2, command_service_pb2, neuron_pb2, report_pb2
from federation_server.store import migrate
from federation_server.store.embedded import SUPERUSER, EmbeddedPostgres
from tests.support.calls import ONLINE, shown
from tests.support.federation import ADMIN_KEY, Served
from tests.support.plain_neuron import PlainNeuron, now, plain_neuron
from tests.support.postgres import FAST_AND_LOOSE, passable_folder
from tests.support.processes import FederationProcess
from tests.support.waiting import eventually

SETTINGS = {
    "ADMIN_API_KEY": ADMIN_KEY,
    "FEDERATION_DRAIN_TIMEOUT": "PT4S",
    "FEDERATION_OFFLINE_AFTER": "PT2S",
    "FEDERATION_MASS_OFFLINE_AFTER": "PT12S",
    "FEDERATION_PRESENCE_PATIENCE": "PT3S",
    # The floods here are to reach what lies behind admission, and the next test its neuron.
    "FEDERATION_ADMISSION_RATE": "100000",
    "FEDERATION_ADMISSION_BURST": "100000",
}


class Postgres:
    """A PostgreSQL that can be stopped, frozen and killed."""

    def __init__(self, folder: Path) -> None:
        self.embedded = EmbeddedPostgres(folder / "data", settings=FAST_AND_LOOSE)
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
        with psycopg.connect(self._superuser, autocommit=True) as connection:
            found = connection.execute(query.encode()).fetchone()
            return None if found is None else found[0]

    def do(self, statement: str) -> None:
        with psycopg.connect(self._superuser, autocommit=True) as connection:
            connection.execute(statement.encode())

    @property
    def _superuser(self) -> str:
        return self.embedded.dsn(user=SUPERUSER)


@contextmanager
def doomed_postgres() -> Iterator[Postgres]:
    """One with the federation's schema in it, for the block."""
    with passable_folder() as folder:
        doomed = Postgres(folder)
        doomed.start()
        try:
            migrate.upgrade(doomed.url)
            yield doomed
        finally:
            doomed.embedded.stop()


@contextmanager
def serving(doomed: Postgres, folder: Path, **settings: str) -> Iterator[FederationProcess]:
    """A server; what it prints has no traceback and no incident in it."""
    server = FederationProcess(folder, "serve", DATABASE_URL=doomed.url, **SETTINGS | settings)
    try:
        server.start()
        yield server
    finally:
        server.kill()
    assert "Traceback" not in server.output, server.output[-5000:]
    assert "incident" not in server.output, server.output[-5000:]


@asynccontextmanager
async def calling(server: FederationProcess) -> AsyncIterator[Served]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Served(server.address, channel)


@dataclass(frozen=True)
class Peer:
    """A neuron's stream through a proxy that stands still after its Hello."""

    served: Served
    began: float
    """When it fell silent, by the monotonic clock."""


async def presence(served: Served, neuron_id: str) -> int:
    return (await shown(served, neuron_id)).presence


async def health(served: Served, service: str = "") -> int:
    stub: Any = HealthStub(served.channel)
    answer = await stub.Check(HealthCheckRequest(service=service), timeout=5)
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
    def acknowledged(self) -> int:
        """Reports that a server has acknowledged."""
        acknowledged = 0
        for neuron in self._neurons:
            with neuron._lock:
                acknowledged += neuron._next_sequence - 1 - len(neuron._spool)
        return acknowledged

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


async def is_health(served: Served, status: int, service: str = "") -> bool:
    return await health(served, service) == status


async def answers_again(served: Served, postgres: Postgres) -> None:
    """Waits until the server has noticed that PostgreSQL was away, if it was, and that it is back.

    Until then it refuses admins' calls, perhaps from some later moment on.
    """

    async def renewed() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'federation-lease'"
        return bool(await asyncio.to_thread(postgres.ask, query))

    await eventually(renewed, within=20, describe="the server renews its lease")
    await eventually(
        lambda: is_health(served, HealthCheckResponse.SERVING), within=20, describe="it serves"
    )


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, bool]:
    """How a call fails: its code, and whether it says when to try again."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status = rpc_status.from_call(raised.value)  # type: ignore[arg-type]  # it has what is needed
    retry = status is not None and any(
        detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details
    )
    return raised.value.code(), retry
