"""PostgreSQL stops, freezes, is killed, or takes no writes: no stream ends, and nothing is lost."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from federation.v1 import report_pb2
from tests.support.calls import shown
from tests.support.faults import (
    Postgres,
    answers_again,
    is_health,
    issue,
    load,
    refused,
    report,
    total,
)
from tests.support.federation import Served, connected, running
from tests.support.plain_neuron import now
from tests.support.processes import FederationProcess
from tests.support.waiting import eventually


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
            away_since = len(server.output)
            assert await refused(shown(served, names[0])) == (grpc.StatusCode.UNAVAILABLE, True)
            # At once, that is without another question to a PostgreSQL that is away.
            assert '"cause":"DatabaseAway"' in server.output[away_since:]
            assert under.waiting > 0
        finally:
            await asyncio.to_thread(back)
        await answers_again(served, doomed)
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


async def test_a_lease_whose_connection_alone_has_ended_takes_postgresql_for_there(
    server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    await answers_again(served, doomed)
    lease = "FROM pg_stat_activity WHERE application_name = 'federation-lease'"
    before, said = doomed.ask(f"SELECT pid {lease}"), len(server.output)
    doomed.do(f"SELECT pg_terminate_backend(pid) {lease}")

    async def renewed() -> bool:
        return doomed.ask(f"SELECT pid {lease} AND state = 'idle'") not in {None, before}

    await eventually(renewed, describe="the lease is renewed by another connection")
    assert "database_down" not in server.output[said:]


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
    await answers_again(served, doomed)


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
                # In a transaction pg_stat_activity stays as it was first read.
                await connection.execute(b"SELECT pg_stat_clear_snapshot()")
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
