"""FleetService over real gRPC and PostgreSQL: what admins do to neurons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import ParseDict
from sqlalchemy import func, insert, select, text

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import neuron_pb2
from federation_server.domain.neuron import Presence
from federation_server.live.notifier import Notifier
from federation_server.live.session import SessionEnd, Sessions
from federation_server.rpc.convert import from_timestamp
from federation_server.rpc.convert_neuron import description_from_proto
from federation_server.store import registration
from federation_server.store.database import Connection, Database
from federation_server.store.schema import (
    audit_entries,
    metadata,
    metric_points,
    metric_series,
    neuron_states,
    reported_events,
)
from tests.support.fleet import (
    ELSEWHERE,
    HERE,
    Fleet,
    beat,
    get,
    live,
    migrated,
    put,
    serving_fleet,
)
from tests.support.neurons import new_session, open_or_not
from tests.support.servers import refusal
from tests.support.waiting import eventually

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with migrated(database_url) as database:
        yield database


@pytest_asyncio.fixture
async def writer(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test-writer") as connection:
        yield connection


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest_asyncio.fixture
async def fleet(database: Database, sessions: Sessions) -> AsyncIterator[Fleet]:
    async with serving_fleet(database, sessions) as fleet:
        yield fleet


async def change(
    fleet: Fleet,
    neuron_id: str,
    set_fields: list[str],
    release: list[str] | None = None,
    **description: Any,
) -> neuron_pb2.Neuron:
    response = await fleet.UpdateNeuron(
        pb.UpdateNeuronRequest(
            neuron_id=neuron_id,
            description=ParseDict(description, neuron_pb2.NeuronDescription()),
            update_mask=FieldMask(paths=set_fields),
            release_mask=FieldMask(paths=release or []),
        )
    )
    return response.neuron


async def register(database: Database, **fields: Any) -> None:
    """The neuron says again what it is, as Register does."""
    description = ParseDict(fields, neuron_pb2.NeuronDescription())
    async with database.begin() as connection:
        await registration.lock_neuron(connection, description.neuron_id)
        await registration.update_description(connection, description_from_proto(description))


# --- UpdateNeuron ---


async def test_what_an_admin_sets_is_shown_and_kept_over_the_next_register(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    shown = await change(fleet, "n1", ["name", "labels"], name="Ours", labels={"zone": "eu"})
    assert (shown.description.name, dict(shown.description.labels)) == ("Ours", {"zone": "eu"})
    assert list(shown.overridden_fields) == ["labels", "name"]
    await register(database, neuron_id="n1", type="other", name="Theirs", labels={"zone": "us"})
    after = await get(fleet, "n1")
    assert (after.description.name, dict(after.description.labels)) == ("Ours", {"zone": "eu"})
    assert after.description.type == "other"


async def test_a_released_field_keeps_its_value_until_the_next_register(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    await change(fleet, "n1", ["name", "labels"], name="Ours", labels={"zone": "eu"})
    shown = await change(fleet, "n1", [], ["name"])
    assert shown.description.name == "Ours"
    assert list(shown.overridden_fields) == ["labels"]
    await register(database, neuron_id="n1", type="worker", name="Theirs")
    after = await get(fleet, "n1")
    assert (after.description.name, dict(after.description.labels)) == ("Theirs", {"zone": "eu"})


async def test_a_masked_field_that_is_not_set_gets_its_default(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1", metadata={"a": 1}, max_concurrent_commands=9)
    masked = ["name", "metadata", "max_concurrent_commands", "alert_thresholds", "deployment"]
    description = (await change(fleet, "n1", masked)).description
    assert (description.name, description.max_concurrent_commands) == ("n1", 4)
    assert description.alert_thresholds.cpu_percent == 80
    assert not description.HasField("metadata")


async def test_a_field_that_is_not_masked_stays_whatever_the_description_says(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    description = neuron_pb2.NeuronDescription(name="Ours", type="ANY THING", base_url="not a url")
    description.alert_thresholds.heartbeat_timeout.seconds = 10**18
    request = pb.UpdateNeuronRequest(
        neuron_id="n1", description=description, update_mask=FieldMask(paths=["name"])
    )
    shown = (await fleet.UpdateNeuron(request)).neuron.description
    assert (shown.name, shown.type, shown.base_url) == ("Ours", "worker", "")
    assert shown.alert_thresholds.heartbeat_timeout == Duration(seconds=120)


async def test_a_heartbeat_timeout_that_an_admin_sets_is_the_one_that_counts(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    shown = await change(
        fleet, "n1", ["alert_thresholds"], alert_thresholds={"heartbeat_timeout": "7.5s"}
    )
    assert shown.description.alert_thresholds.heartbeat_timeout == Duration(
        seconds=7, nanos=500_000_000
    )
    async with database.begin() as connection:
        query = select(neuron_states.c.heartbeat_timeout)
        assert (await connection.execute(query)).scalar_one() == timedelta(seconds=7.5)


async def test_an_update_that_changes_nothing_leaves_the_update_time(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1", update_time=LONG_AGO)
    first = await change(fleet, "n1", ["name"], name="Ours")
    again = await change(fleet, "n1", ["name"], name="Ours")
    assert from_timestamp(first.update_time) > LONG_AGO
    assert again == first


async def test_updates_at_the_same_time_all_take_effect(fleet: Fleet, database: Database) -> None:
    await put(database, "n1")
    await asyncio.gather(
        change(fleet, "n1", ["name"], name="Ours"),
        change(fleet, "n1", ["labels"], labels={"zone": "eu"}),
        change(fleet, "n1", ["metadata"], metadata={"a": 1}),
    )
    shown = await get(fleet, "n1")
    assert list(shown.overridden_fields) == ["labels", "metadata", "name"]


@pytest.mark.parametrize(
    ("set_fields", "release"),
    [
        ([], []),
        (["type"], []),
        (["description.name"], []),
        ([], ["neuron_id"]),
        (["name"], ["name"]),
    ],
)
async def test_masks_that_name_no_field_or_a_wrong_one_are_refused(
    fleet: Fleet, database: Database, set_fields: list[str], release: list[str]
) -> None:
    await put(database, "n1")
    code, reason, violations = await refusal(change(fleet, "n1", set_fields, release))
    assert (code, reason) == (INVALID, "INVALID_FIELD")
    assert any("_mask" in field for field in violations)


async def test_a_masked_value_that_breaks_its_limit_is_refused_by_field(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    code, _, violations = await refusal(change(fleet, "n1", ["base_url"], base_url="ftp://x"))
    assert (code, set(violations)) == (INVALID, {"description.base_url"})


# --- DeactivateNeuron, ActivateNeuron ---


async def deactivate(fleet: Fleet, neuron_id: str, reason: str = "") -> neuron_pb2.Neuron:
    request = pb.DeactivateNeuronRequest(neuron_id=neuron_id, reason=reason)
    return (await fleet.DeactivateNeuron(request)).neuron


async def activate(fleet: Fleet, neuron_id: str, reason: str = "") -> neuron_pb2.Neuron:
    request = pb.ActivateNeuronRequest(neuron_id=neuron_id, reason=reason)
    return (await fleet.ActivateNeuron(request)).neuron


async def test_deactivating_ends_the_stream_on_this_server_and_fences_its_session(
    fleet: Fleet, database: Database, writer: Connection, sessions: Sessions
) -> None:
    await put(database, "n1")
    session = await live(database, sessions, "n1")
    shown = await deactivate(fleet, "n1", "it misbehaves")
    assert (shown.lifecycle, shown.lifecycle_reason) == (
        neuron_pb2.LIFECYCLE_DEACTIVATED,
        "it misbehaves",
    )
    assert (shown.presence, shown.presence_reason) == (neuron_pb2.PRESENCE_OFFLINE, "it misbehaves")
    assert not shown.session.open
    assert shown.session.HasField("close_time")
    assert session.end is SessionEnd.DEACTIVATED
    await beat(writer, "n1", session.epoch)
    assert (await get(fleet, "n1")).presence == neuron_pb2.PRESENCE_OFFLINE


async def test_deactivating_ends_the_stream_on_another_server_by_a_hint(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    theirs = Sessions()
    session = await live(database, theirs, "n1", ELSEWHERE)
    listening = asyncio.Event()
    notifier = Notifier(database, ELSEWHERE, theirs, dispatch=lambda _: None, missed=listening.set)
    task = asyncio.create_task(notifier.run())
    try:
        await listening.wait()
        await deactivate(fleet, "n1")
        await eventually(lambda: session.end is SessionEnd.DEACTIVATED)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_deactivated_neuron_may_not_come_back_until_it_is_activated(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")

    async def opens() -> bool:
        return await open_or_not(database, new_session("n1"), server_id=HERE) is not None

    await deactivate(fleet, "n1")
    assert not await opens()
    shown = await activate(fleet, "n1", "mended")
    assert (shown.lifecycle, shown.lifecycle_reason) == (neuron_pb2.LIFECYCLE_ACTIVE, "mended")
    assert await opens()


async def test_deactivating_twice_is_deactivating_once(fleet: Fleet, database: Database) -> None:
    await put(database, "n1")
    await live(database, None, "n1")
    first = await deactivate(fleet, "n1", "once")
    assert await deactivate(fleet, "n1", "once") == first
    assert await deactivate(fleet, "n1") == first


async def test_activating_a_neuron_that_takes_part_leaves_it_and_its_session_alone(
    fleet: Fleet, database: Database, sessions: Sessions
) -> None:
    await put(database, "n1")
    session = await live(database, sessions, "n1")
    before = await get(fleet, "n1")
    assert await activate(fleet, "n1") == before
    assert session.end is None


# --- DeleteNeuron ---


async def delete(fleet: Fleet, neuron_id: str, *, force: bool = False) -> None:
    await fleet.DeleteNeuron(pb.DeleteNeuronRequest(neuron_id=neuron_id, force=force))


@pytest.mark.parametrize("presence", [Presence.ONLINE, Presence.SUSPECT])
async def test_a_neuron_that_is_not_offline_is_not_deleted(
    fleet: Fleet, database: Database, presence: Presence
) -> None:
    await put(database, "n1", presence=presence)
    code, reason, _ = await refusal(delete(fleet, "n1"))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NEURON_NOT_OFFLINE")
    await get(fleet, "n1")


async def test_forced_deletion_ends_the_stream(
    fleet: Fleet, database: Database, writer: Connection, sessions: Sessions
) -> None:
    await put(database, "n1")
    session = await live(database, sessions, "n1")
    await delete(fleet, "n1", force=True)
    assert session.end is SessionEnd.REVOKED
    await beat(writer, "n1", session.epoch)
    assert await rows_of(database, "n1") == {}


async def test_deletion_forgets_everything_of_this_neuron_and_nothing_of_others(
    fleet: Fleet, database: Database, writer: Connection
) -> None:
    for neuron_id in ("n1", "n2"):
        await put(database, neuron_id)
        await fill(database, writer, neuron_id)
    others = await rows_of(database, "n2")
    assert await rows_of(database, "n1") == others
    assert set(others) == {
        "neurons",
        "neuron_states",
        "heartbeats",
        "spools",
        "commands",
        "command_transitions",
        "metric_series",
        "metric_points",
        "reported_events",
    }
    await delete(fleet, "n1", force=True)
    assert await rows_of(database, "n1") == {}
    assert await rows_of(database, "n2") == others
    code, reason, _ = await refusal(delete(fleet, "n1"))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "NEURON_NOT_FOUND")


async def test_the_writer_writes_for_a_neuron_while_its_long_history_is_being_deleted(
    fleet: Fleet, database: Database, writer: Connection
) -> None:
    """Heartbeats of all neurons are written in one transaction: it must not wait."""
    await put(database, "n1")
    opened = await live(database, None, "n1")
    await beat(writer, "n1", opened.epoch)
    async with await database.connect("blocker") as blocker, blocker.transaction():
        # The deletion gets stuck in the history, as if that were long.
        await blocker.execute(b"SELECT FROM heartbeats WHERE neuron_id = 'n1' FOR UPDATE")
        deletion = asyncio.create_task(delete(fleet, "n1", force=True))
        await eventually(lambda: waiting_for_a_lock(writer))
        async with asyncio.timeout(5):
            await beat(writer, "n1", opened.epoch)
    await deletion
    assert await rows_of(database, "n1") == {}


async def waiting_for_a_lock(connection: Connection) -> bool:
    cursor = await connection.execute(
        b"SELECT count(*) FROM pg_stat_activity"
        b" WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    row = await cursor.fetchone()
    return row is not None and row[0] > 0


async def fill(database: Database, writer: Connection, neuron_id: str) -> None:
    """A row of the neuron in every table that may hold one."""
    await beat(writer, neuron_id)
    async with database.begin() as connection:
        await connection.execute(
            text("INSERT INTO spools VALUES (:n, 'spool', 1, now())"), {"n": neuron_id}
        )
        await connection.execute(
            text(
                "WITH issued AS (INSERT INTO commands (command_id, neuron_id, issuer, type, data,"
                " control, priority, expire_time, state, create_time) VALUES (gen_random_uuid(),"
                " :n, 'i', 'run', '{}', false, 5, now(), 'QUEUED', now()) RETURNING command_id)"
                " INSERT INTO command_transitions SELECT command_id, 1, 'QUEUED', now(), 0, '', ''"
                " FROM issued"
            ),
            {"n": neuron_id},
        )
        series = await connection.execute(
            insert(metric_series)
            .values(
                neuron_id=neuron_id,
                name="m",
                kind="GAUGE",
                labels={},
                unit="",
                last_report_time=func.now(),
                bounds=[],
            )
            .returning(metric_series.c.series_id)
        )
        await connection.execute(
            insert(metric_points).values(
                series_id=series.scalar_one(), point_time=func.now(), value=1.0
            )
        )
        await connection.execute(
            insert(reported_events).values(
                event_id=func.nextval("reported_event_ids"),
                event_time=func.now(),
                neuron_id=neuron_id,
                receive_time=func.now(),
                severity="INFO",
                type="t",
                message="",
                attributes={},
            )
        )


async def rows_of(database: Database, neuron_id: str) -> dict[str, int]:
    """How many rows there are of a neuron, by table; tables without one are left out, and the
    audit log, which forgets nothing. A point whose series is gone counts as this neuron's.
    """
    statements = {
        table.name: f"SELECT count(*) FROM {table.name} WHERE neuron_id = :n"  # noqa: S608 - our own names
        for table in metadata.sorted_tables
        if "neuron_id" in table.c and table is not audit_entries
    }
    statements["metric_points"] = (
        "SELECT count(*) FROM metric_points LEFT JOIN metric_series USING (series_id)"
        " WHERE coalesce(neuron_id, :n) = :n"
    )
    statements["command_transitions"] = (
        "SELECT count(*) FROM command_transitions JOIN commands USING (command_id)"
        " WHERE neuron_id = :n"
    )
    counts = {}
    async with database.begin() as connection:
        for name, statement in statements.items():
            counts[name] = (
                await connection.execute(text(statement), {"n": neuron_id})
            ).scalar_one()
    return {name: count for name, count in counts.items() if count}
