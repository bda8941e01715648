"""The disk under PostgreSQL is full: really so, on a small file system that the test fills.

Without room for its tables PostgreSQL refuses single statements. Without room for its WAL it
panics, and does not come back before there is room and somebody starts it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import psycopg
import pytest
from google.protobuf.struct_pb2 import Struct

from federation.v1 import command_service_pb2, report_pb2
from federation_server.store import migrate
from tests.support.calls import shown
from tests.support.disk import SmallDisk, mountable, move_tables, move_wal, small_disk
from tests.support.faults import (
    Postgres,
    answers_again,
    calling,
    issue,
    load,
    refused,
    serving,
    total,
)
from tests.support.federation import Served, connected
from tests.support.plain_neuron import now
from tests.support.waiting import eventually

EVENTS = 20
TRY_AGAIN = (grpc.StatusCode.UNAVAILABLE, True)

pytestmark = pytest.mark.skipif(
    not mountable(), reason="a small file system cannot be mounted here: it takes Linux and root"
)


@pytest.fixture
def postgres_on_small_disk(
    folder: Path,
) -> Iterator[Callable[[str], tuple[Postgres, SmallDisk]]]:
    """Starts a PostgreSQL and moves its "tables" or its "WAL" to a disk that can be filled."""
    postgres = Postgres(folder / "postgres")
    with small_disk(folder / "small", megabytes=128) as disk:

        def start(of: str) -> tuple[Postgres, SmallDisk]:
            postgres.start()
            migrate.upgrade(postgres.url)
            {"tables": move_tables, "WAL": move_wal}[of](postgres, disk)
            return postgres, disk

        try:
            yield start
        finally:
            postgres.embedded.stop()


def bulky_report() -> report_pb2.AnalyticsReport:
    """More than any page in use has room for."""
    bulky = report_pb2.AnalyticsReport(start_time=now(), end_time=now())
    for _ in range(EVENTS):
        bulky.events.add(
            event_time=now(),
            severity=report_pb2.SEVERITY_INFO,
            type="t",
            message=secrets.token_urlsafe(6000),
        )
    return bulky


def issue_bulky(served: Served, neuron_id: str) -> Awaitable[object]:
    data = Struct()
    data["bulk"] = secrets.token_urlsafe(100_000)
    spec = command_service_pb2.CommandSpec(neuron_id=neuron_id, type="run", data=data)
    request = command_service_pb2.IssueCommandRequest(command=spec)
    return served.command.IssueCommand(request, metadata=served.admin, timeout=10)


def use_up_wal(postgres: Postgres) -> None:
    """Begins one WAL file after the other, until there is no room for the next."""
    with suppress(psycopg.OperationalError):
        while True:
            postgres.do("SELECT pg_logical_emit_message(false, 'test', 'x'), pg_switch_wal()")
    assert postgres.embedded.wait(30) != 0


async def make_enrollment_tokens(served: Served) -> None:
    """Goes on until one cannot be made: the pages in use have room for some."""
    while True:
        await served.enrollment_token()


@pytest.mark.parametrize("of", ["tables", "WAL"])
async def test_a_full_disk_under_postgresql_ends_no_stream_and_costs_no_message(
    postgres_on_small_disk: Callable[[str], tuple[Postgres, SmallDisk]], folder: Path, of: str
) -> None:
    postgres, disk = await asyncio.to_thread(postgres_on_small_disk, of)
    with serving(postgres, folder) as server:

        def failures() -> int:
            return server.output.count("writer_retry")

        async with (
            calling(server) as served,
            load(served, "full") as (under, names),
            connected(served, "bulky") as bulky,
        ):
            epochs = [(await shown(served, each)).session.epoch for each in names]
            disk.fill()
            try:
                if of == "WAL":
                    await asyncio.to_thread(use_up_wal, postgres)
                await bulky.send(sequence=1, send_time=now(), analytics_report=bulky_report())
                before = failures()
                await eventually(lambda: failures() >= before + 3, describe="it is tried again")
                assert "No space left on device" in postgres.embedded.log_file.read_text()
                acknowledged, before = under.acknowledged, failures()
                assert await refused(issue_bulky(served, "bulky")) == TRY_AGAIN
                assert await refused(make_enrollment_tokens(served)) == TRY_AGAIN
                await eventually(
                    lambda: failures() >= before + 2, within=20, describe="it is tried yet again"
                )
                assert under.acknowledged == acknowledged
            finally:
                disk.free()
                await asyncio.to_thread(postgres.start)
            under.finish()
            await eventually(lambda: not under.waiting, within=20, describe="all is acknowledged")
            await bulky.acked(1)
            await answers_again(served, postgres)
            assert total(postgres, "full") == under.sent
            assert postgres.ask("SELECT count(*) FROM reported_events") == EVENTS
            states = [await shown(served, each) for each in names]
            assert [state.session.epoch for state in states] == epochs
            assert all(state.session.open for state in states)
            command = await issue(served, "bulky")
            assert (await bulky.receive()).command.command_id == command.command_id
