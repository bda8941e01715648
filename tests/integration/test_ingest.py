"""What neurons send, applied to a real PostgreSQL: fences, marks, totals, the ledger."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import text

from federation_server.domain.analytics import (
    AnalyticsReport,
    Histogram,
    MetricKind,
    MetricPoint,
    ReportedEvent,
    Severity,
)
from federation_server.domain.command import (
    Accepted,
    CommandState,
    CommandUpdate,
    Finished,
    Progressed,
)
from federation_server.domain.neuron import Presence
from federation_server.store import ingest, partitions
from federation_server.store.database import Connection, Database
from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem, Outcome
from federation_server.store.ledger import commands, dispatch
from federation_server.store.ledger.commands import CommandRecord, NewCommand
from tests.support.neurons import heartbeat, open_session, put_command, put_neuron

NEURON = "worker-1"
WEEK = timedelta(days=7)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    async with database.begin() as connection:
        await put_neuron(connection, NEURON)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        await partitions.ensure_ahead(connection)
        yield connection


async def one(database: Database, query: str, **parameters: Any) -> Any:
    async with database.begin() as connection:
        return (await connection.execute(text(query), parameters)).mappings().one()


async def state(database: Database) -> Any:
    return await one(database, "SELECT * FROM neuron_states WHERE neuron_id = :n", n=NEURON)


async def apply(
    connection: Connection,
    *,
    heartbeats: tuple[HeartbeatItem, ...] = (),
    durables: tuple[DurableItem, ...] = (),
    closed: tuple[ClosedItem, ...] = (),
) -> Outcome:
    return await ingest.apply(connection, heartbeats, durables, closed, oldest_point=WEEK)


def counter_report(value: float, *, age: timedelta = timedelta()) -> AnalyticsReport:
    point = MetricPoint("rows", MetricKind.COUNTER, "rows", {"table": "a"}, value)
    return AnalyticsReport(age, [point], [])


def durable(epoch: int, sequence: int, payload: ingest.DurablePayload) -> DurableItem:
    return DurableItem(NEURON, epoch, "spool-1", sequence, payload)


async def issue(database: Database) -> CommandRecord:
    record = await put_command(
        database,
        NewCommand(
            neuron_id=NEURON,
            issuer="admin",
            request_id=None,
            request_hash=b"",
            type="run",
            data={},
            control=False,
            priority=5,
            not_before_time=None,
            expire_time=datetime.now(UTC) + timedelta(hours=1),
            run_timeout=None,
        ),
    )
    assert record is not None
    return record


async def sent(database: Database, connection: Connection, epoch: int) -> str:
    record = await issue(database)
    claimed = await dispatch.claim(connection, "server-1", [(NEURON, epoch)])
    assert [command.command_id for command in claimed.commands] == [record.command_id]
    return record.command_id


async def test_a_heartbeat_becomes_history_and_current_state(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    outcome = await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, "i", heartbeat()),))
    row = await one(database, "SELECT * FROM heartbeats")
    assert (row["receive_time"], row["epoch"]) == (outcome.time, epoch)
    assert {name: row[name] for name in ("pid", "queue_size", "p99_response_ms")} == {
        "pid": 42,
        "queue_size": 7,
        "p99_response_ms": 30.0,
    }
    now = await state(database)
    assert now["last_heartbeat_time"] == outcome.time
    assert (now["health_score"], now["cpu_percent"]) == (90.0, 12.5)


async def test_a_superseded_sessions_heartbeat_changes_nothing(
    database: Database, connection: Connection
) -> None:
    old = (await open_session(database, NEURON)).epoch
    await open_session(database, NEURON)
    outcome = await apply(connection, heartbeats=(HeartbeatItem(NEURON, old, "i", heartbeat()),))
    assert outcome.fenced == {(NEURON, old)}
    assert (await state(database))["last_heartbeat_time"] is None
    assert (await one(database, "SELECT count(*) AS n FROM heartbeats"))["n"] == 0


async def test_a_superseded_sessions_report_and_mark_change_nothing(
    database: Database, connection: Connection
) -> None:
    old = (await open_session(database, NEURON)).epoch
    await open_session(database, NEURON)
    outcome = await apply(connection, durables=(durable(old, 1, counter_report(1.0)),))
    assert outcome.fenced == {(NEURON, old)}
    assert (await one(database, "SELECT count(*) AS n FROM metric_points"))["n"] == 0
    assert (await one(database, "SELECT count(*) AS n FROM spools"))["n"] == 0


async def test_a_replayed_report_counts_once(database: Database, connection: Connection) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    items = (durable(epoch, 1, counter_report(2.0)), durable(epoch, 2, counter_report(3.0)))
    await apply(connection, durables=items)
    again = await apply(connection, durables=(*items, durable(epoch, 3, counter_report(4.0))))
    assert again.marks == {(NEURON, "spool-1"): 3}
    assert (await one(database, "SELECT sum(value) AS s FROM metric_points"))["s"] == 9.0


async def test_labels_of_the_largest_size_are_stored_and_found_again(
    database: Database, connection: Connection
) -> None:
    # As random as labels can be: PostgreSQL packs what repeats.
    labels = {f"{secrets.token_hex(32)[:63]}": secrets.token_hex(128) for _ in range(16)}
    point = MetricPoint("rows", MetricKind.COUNTER, "rows", labels, 1.0)
    epoch = (await open_session(database, NEURON)).epoch
    for sequence in (1, 2):
        report = AnalyticsReport(timedelta(), [point], [])
        await apply(connection, durables=(durable(epoch, sequence, report),))
    stored = await one(
        database, "SELECT count(DISTINCT series_id) AS series, sum(value) AS sum FROM metric_points"
    )
    assert (stored["series"], stored["sum"]) == (1, 2.0)


async def test_a_report_is_placed_in_time_by_its_age(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    report = counter_report(1.0, age=timedelta(minutes=90))
    outcome = await apply(connection, durables=(durable(epoch, 1, report),))
    point = await one(database, "SELECT point_time FROM metric_points")
    assert outcome.time - point["point_time"] == timedelta(minutes=90)


async def test_histograms_and_events_are_stored_whole(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    histogram = Histogram([1.0, 2.0], [1, 0, 2], 9.0, 0.5, 5.0)
    report = AnalyticsReport(
        timedelta(),
        [MetricPoint("ms", MetricKind.HISTOGRAM, "ms", {}, histogram)],
        [ReportedEvent(timedelta(), Severity.ERROR, "disk_full", "no room", {"free": 0})],
    )
    await apply(connection, durables=(durable(epoch, 1, report),))
    point = await one(database, "SELECT * FROM metric_points JOIN metric_series USING (series_id)")
    assert (point["count"], point["bounds"], point["bucket_counts"]) == (3, [1.0, 2.0], [1, 0, 2])
    event = await one(database, "SELECT * FROM reported_events")
    assert (event["severity"], event["type"], event["attributes"]) == (
        "ERROR",
        "disk_full",
        {"free": 0},
    )


async def test_histograms_of_equal_bounds_are_one_series_and_of_others_another(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    wide, narrow = [1.0, 2.5, 1e300], [0.1]
    for sequence, reported in enumerate([(wide,), (narrow,), (narrow, wide)], 1):
        points = [
            MetricPoint(
                "ms",
                MetricKind.HISTOGRAM,
                "ms",
                {},
                Histogram(bounds, [1] * (len(bounds) + 1), 9.0),
            )
            for bounds in reported
        ]
        report = AnalyticsReport(timedelta(), points, [])
        await apply(connection, durables=(durable(epoch, sequence, report),))
    query = "SELECT bounds, count(*) FROM metric_points JOIN metric_series USING (series_id)"
    async with database.begin() as reading:
        found = await reading.execute(text(f"{query} GROUP BY series_id, bounds ORDER BY bounds"))
        assert [tuple(row) for row in found] == [(narrow, 2), (wide, 2)]


async def test_totals_go_on_over_a_restart_of_the_process(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for instance, requests, uptime in (("a", 10, 5.0), ("a", 25, 9.0), ("b", 4, 1.0)):
        beat = heartbeat(requests=requests, uptime_s=uptime, response_ms_sum=requests * 10.0)
        await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, instance, beat),))
    now = await state(database)
    assert (now["requests_total"], now["uptime_s_total"]) == (29, 10.0)
    assert now["response_ms_total"] == 290.0


async def test_processes_that_take_turns_are_counted_once_each(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for turn in range(3):
        for instance in "abcd":
            sent = 1000 + turn
            beat = heartbeat(
                requests=sent, failed_requests=turn, response_ms_sum=sent / 8, uptime_s=0.1 * turn
            )
            await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, instance, beat),))
    now = await state(database)
    assert (now["requests_total"], now["failed_requests_total"]) == (4008, 8)
    assert (now["response_ms_total"], now["uptime_s_total"]) == (501.0, pytest.approx(0.8))


async def test_only_the_last_few_processes_are_kept_in_mind(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for number in range(9):
        beat = heartbeat(requests=number)
        await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, f"i{number}", beat),))
    before = (await state(database))["counted_before"]
    assert [entry[:2] for entry in before] == [[f"i{n}", n] for n in (7, 6, 5, 4)]


async def test_an_absurd_counter_fills_the_total_and_no_heartbeat_after_it_is_lost(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for instance in "abc":
        beat = heartbeat(
            requests=2**63 - 1, failed_requests=2**63 - 1, response_ms_sum=1.7e308, uptime_s=1.7e308
        )
        await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, instance, beat),))
    now = await state(database)
    assert (now["requests_total"], now["failed_requests_total"]) == (2**63 - 1, 2**63 - 1)
    assert (now["response_ms_total"], now["uptime_s_total"]) == (1e300, 1e300)
    assert now["counted_instance_id"] == "c"


async def test_a_heartbeat_that_says_nothing_of_requests_leaves_the_totals_alone(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    silent = heartbeat(requests=None, failed_requests=None, response_ms_sum=None)
    for beat in (heartbeat(requests=10), silent, heartbeat(requests=12)):
        await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, "a", beat),))
    assert (await state(database))["requests_total"] == 12


async def test_a_neuron_without_a_stream_becomes_online_by_its_heartbeat(
    database: Database, connection: Connection
) -> None:
    await apply(connection, heartbeats=(HeartbeatItem(NEURON, 0, "i", heartbeat()),))
    assert (await state(database))["presence"] == "ONLINE"


async def test_a_heartbeat_written_after_goodbye_does_not_make_the_neuron_online(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    await apply(connection, closed=(ClosedItem(NEURON, epoch, Presence.OFFLINE, "bye"),))
    await apply(connection, heartbeats=(HeartbeatItem(NEURON, epoch, "i", heartbeat()),))
    now = await state(database)
    assert (now["presence"], now["presence_reason"]) == ("OFFLINE", "bye")


async def test_closing_a_superseded_session_leaves_the_new_one_open(
    database: Database, connection: Connection
) -> None:
    old = (await open_session(database, NEURON)).epoch
    await open_session(database, NEURON)
    await apply(connection, closed=(ClosedItem(NEURON, old, Presence.SUSPECT, "stream lost"),))
    now = await state(database)
    assert (now["session_open"], now["presence"]) == (True, "ONLINE")


async def test_all_updates_of_a_command_in_one_batch_leave_each_transition(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await sent(database, connection, epoch)
    done = Finished(CommandState.SUCCEEDED, {"rows": 3}, None, timedelta(seconds=2), "log")
    changes: tuple[Accepted | Progressed | Finished, ...] = (
        Accepted(),
        Progressed(0.5, "half"),
        done,
    )
    outcome = await apply(
        connection,
        durables=tuple(
            durable(epoch, number, CommandUpdate(command_id, 1, change))
            for number, change in enumerate(changes, start=1)
        ),
    )
    assert [(c.command_id, c.state) for c in outcome.changed] == [
        (command_id, CommandState.SUCCEEDED)
    ]
    async with database.begin() as reading:
        record = await commands.get(reading, command_id)
        assert record is not None
        transitions = await commands.transitions(reading, record)
    assert (record.response, record.progress_fraction, record.log_tail) == (
        {"rows": 3},
        0.5,
        "log",
    )
    assert [transition.state.value for transition in transitions] == [
        "QUEUED",
        "SENT",
        "ACCEPTED",
        "RUNNING",
        "SUCCEEDED",
    ]


async def test_an_update_of_another_neurons_command_changes_nothing(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await sent(database, connection, epoch)
    async with database.begin() as writing:
        await put_neuron(writing, "thief")
    thief = (await open_session(database, "thief")).epoch
    update = CommandUpdate(command_id, 1, Accepted())
    outcome = await apply(connection, durables=(DurableItem("thief", thief, "s", 1, update),))
    assert outcome.changed == []
    async with database.begin() as reading:
        record = await commands.get(reading, command_id)
    assert record is not None
    assert record.state is CommandState.SENT


async def test_an_update_of_an_older_attempt_changes_nothing_and_is_acknowledged(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await sent(database, connection, epoch)
    done = Finished(CommandState.SUCCEEDED, {}, None, None, "")
    outcome = await apply(
        connection, durables=(durable(epoch, 1, CommandUpdate(command_id, 0, done)),)
    )
    assert (outcome.changed, outcome.marks) == ([], {(NEURON, "spool-1"): 1})


async def test_a_batch_with_a_value_that_does_not_fit_writes_nothing(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    bad = MetricPoint("bad\0name", MetricKind.GAUGE, "", {}, 1.0)
    items = (
        durable(epoch, 1, counter_report(1.0)),
        durable(epoch, 2, AnalyticsReport(timedelta(), [bad], [])),
    )
    with pytest.raises(psycopg.DataError):
        await apply(connection, durables=items)
    assert (await one(database, "SELECT count(*) AS n FROM spools"))["n"] == 0
