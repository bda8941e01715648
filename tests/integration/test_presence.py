"""When neurons go down: the SQL says what the domain's rule says, and who sweeps waits first."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import pytest
import pytest_asyncio
from sqlalchemy import text

from federation_server.domain.doubt import MASS_LEAST, Cause, Loss
from federation_server.domain.neuron import Presence
from federation_server.domain.presence import Signs, judge
from federation_server.live.doubt import SelfDoubt
from federation_server.live.metrics import Metrics
from federation_server.live.sweeper import Sweeper
from federation_server.live.watchers import CommandWatchers
from federation_server.store import presence, servers
from federation_server.store.database import Connection, Database
from tests.support.neurons import open_session, put_neuron
from tests.support.waiting import eventually

TIMEOUT = timedelta(seconds=100)
OFFLINE_AFTER = timedelta(seconds=30)
AGES: tuple[int | None, ...] = (None, 10, 120, 250)
TOLD: dict[str, timedelta | None] = {
    "": None,
    "tells nothing": None,
    "tells a short one": timedelta(seconds=20),
    "tells a long one": timedelta(seconds=45),
}
"""What each server has told its streams; the first one is not in the register."""


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        yield connection


async def rows(database: Database, query: str) -> list[Any]:
    async with database.begin() as connection:
        return list((await connection.execute(text(query))).mappings())


async def age(database: Database, neuron_id: str, **seconds: int) -> None:
    """Moves times of a neuron's state into the past."""
    changes = ", ".join(f"{name} = now() - interval '{s} s'" for name, s in seconds.items())
    async with database.begin() as connection:
        await connection.execute(
            text(f"UPDATE neuron_states SET {changes} WHERE neuron_id = :n"),  # noqa: S608
            {"n": neuron_id},
        )


async def test_the_sweep_judges_as_the_domain_does(
    database: Database, connection: Connection
) -> None:
    cases = list(
        itertools.product(
            (Presence.ONLINE, Presence.SUSPECT, Presence.OFFLINE),
            (10, 40),
            ((True, None), (False, 10), (False, 120), (False, None)),
            AGES,
            TOLD,
        )
    )
    for server_id, interval in TOLD.items():
        if server_id:
            await servers.renew(connection, server_id, "0", heartbeat_interval=interval)
    async with database.begin() as writing:
        for number, (was, since, (is_open, closed), beat, server_id) in enumerate(cases):
            neuron_id = f"n{number}"
            await put_neuron(writing, neuron_id, heartbeat_timeout=TIMEOUT)
            await writing.execute(
                text(
                    "UPDATE neuron_states SET presence = cast(:p AS presence),"
                    " presence_time = now() - make_interval(secs => :since),"
                    " server_id = :server, session_open = :o,"
                    " session_open_time = now() - interval '150 s',"
                    " session_close_time = now() - make_interval(secs => :closed),"
                    " last_heartbeat_time = now() - make_interval(secs => :beat)"
                    " WHERE neuron_id = :n"
                ),
                {
                    "n": neuron_id,
                    "p": was.value,
                    "since": since,
                    "o": is_open,
                    "server": server_id,
                    "closed": closed,
                    "beat": beat,
                },
            )
    before = await rows(database, "SELECT *, now() AS now FROM neuron_states")
    expected = {
        row["neuron_id"]: judge(
            Signs(
                presence=Presence(row["presence"]),
                presence_time=row["presence_time"],
                session_open=row["session_open"],
                session_open_time=row["session_open_time"],
                session_close_time=row["session_close_time"],
                last_heartbeat_time=row["last_heartbeat_time"],
                heartbeat_timeout=row["heartbeat_timeout"],
                told_interval=TOLD[row["server_id"]],
            ),
            row["now"],
            offline_after=OFFLINE_AFTER,
        )
        for row in before
    }
    await presence.sweep(connection, offline_after=OFFLINE_AFTER)
    after = await rows(database, "SELECT neuron_id, presence FROM neuron_states")
    assert {row["neuron_id"]: row["presence"] for row in after} == expected
    assert len(set(expected.values())) == 3


async def test_a_lost_stream_is_suspect_and_then_offline(
    database: Database, connection: Connection
) -> None:
    async with database.begin() as writing:
        await put_neuron(writing, "n")
    await open_session(database, "n")
    async with database.begin() as writing:
        await writing.execute(
            text(
                "UPDATE neuron_states SET session_open = false, session_close_time = now(),"
                " presence = 'SUSPECT', presence_time = now(), presence_reason = 'stream lost'"
            )
        )
    assert await presence.sweep(connection, offline_after=OFFLINE_AFTER) == []
    await age(database, "n", presence_time=31, session_close_time=31)
    assert await presence.sweep(connection, offline_after=OFFLINE_AFTER) == [
        ("n", Presence.OFFLINE, "stream lost")
    ]


async def test_the_sessions_of_a_dead_server_are_closed_and_a_living_ones_are_not(
    database: Database, connection: Connection
) -> None:
    await servers.renew(connection, "alive", "0")
    async with database.begin() as writing:
        for neuron_id in ("a", "b"):
            await put_neuron(writing, neuron_id)
    await open_session(database, "a", server_id="alive")
    await open_session(database, "b", server_id="dead")
    assert await presence.close_lost_sessions(connection) == 1
    found = await rows(
        database, "SELECT neuron_id, presence, session_open FROM neuron_states ORDER BY 1"
    )
    assert [tuple(row.values()) for row in found] == [
        ("a", "ONLINE", True),
        ("b", "SUSPECT", False),
    ]


async def offline(database: Database) -> set[str]:
    found = await rows(database, "SELECT neuron_id FROM neuron_states WHERE presence = 'OFFLINE'")
    return {row["neuron_id"] for row in found}


async def lost_long_ago(database: Database, neuron_id: str, server_id: str) -> None:
    """A neuron whose stream on that server was lost 40 s ago."""
    async with database.begin() as writing:
        await put_neuron(writing, neuron_id)
    await open_session(database, neuron_id, server_id=server_id)
    await age(database, neuron_id, session_open_time=600, presence_time=40, session_close_time=40)
    async with database.begin() as writing:
        await writing.execute(
            text(
                "UPDATE neuron_states SET session_open = false, presence = 'SUSPECT'"
                " WHERE neuron_id = :n"
            ),
            {"n": neuron_id},
        )


@pytest.mark.parametrize("cause", sorted({*Cause} - {Cause.MASS_DISCONNECT}))
async def test_the_neurons_of_another_server_that_is_in_doubt_are_left_alone(
    database: Database, connection: Connection, cause: Cause
) -> None:
    await servers.renew(connection, "ill", "0", doubt={cause: 3.0})
    await servers.renew(connection, "well", "0")
    for server_id in ("ill", "well"):
        await lost_long_ago(database, f"of-{server_id}", server_id)
    spared = await servers.doubtful(connection, "well")
    await presence.sweep(connection, offline_after=OFFLINE_AFTER, spared=spared)
    assert await offline(database) == {"of-well"}
    # Its own doubt is what a server knows itself, and not what it has published.
    assert await servers.doubtful(connection, "ill") == []


async def test_a_server_that_is_late_with_its_lease_is_in_doubt_until_it_is_dead(
    database: Database, connection: Connection
) -> None:
    for server_id, left in (("quiet", 4), ("prompt", 8), ("dead", -1)):
        await servers.renew(connection, server_id, "0")
        await connection.execute(
            b"UPDATE servers SET lease_expire_time = now() + make_interval(secs => %s)"
            b" WHERE server_id = %s",
            (left, server_id),
        )
    assert await servers.doubtful(connection, "another") == ["quiet"]


async def test_what_a_sweeper_says_of_lost_streams_spares_no_server(connection: Connection) -> None:
    await servers.renew(connection, "s", "0", doubt={Cause.MASS_DISCONNECT: 1.0}, sweeping=True)
    assert await servers.doubtful(connection, "another") == []


async def test_a_doubt_that_is_over_is_published_as_well(
    database: Database, connection: Connection
) -> None:
    doubt = {Cause.LOOP_LAG: 7.0, Cause.FLUSH_LAG: 3.0}
    await servers.renew(connection, "s", "0", doubt=doubt, sweeping=True)
    async with database.begin() as reading:
        (seen,) = await servers.in_doubt(reading)
    now = await presence.clock(connection)
    assert (seen.server_id, seen.causes, seen.sweeping) == ("s", list(doubt), True)
    assert now - seen.since >= timedelta(seconds=7)
    await servers.renew(connection, "s", "0")
    async with database.begin() as reading:
        assert await servers.in_doubt(reading) == []


async def test_streams_that_were_lost_together_have_more_time_and_others_have_not(
    database: Database, connection: Connection
) -> None:
    together = {f"n{number}" for number in range(MASS_LEAST)}
    for neuron_id in together:
        await lost_long_ago(database, neuron_id, "s")
    for neuron_id, closed in (("before", 60), ("elsewhere", 40)):
        await lost_long_ago(database, neuron_id, "s" if neuron_id == "before" else "t")
        await age(database, neuron_id, session_close_time=closed)
    async with database.begin() as writing:
        await put_neuron(writing, "there")
    await open_session(database, "there", server_id="s")

    (loss,) = await presence.losses(connection, newer_than=timedelta(minutes=3))
    assert (loss.server_id, loss.lost, loss.open) == ("s", MASS_LEAST, 1)
    assert loss.is_mass

    async def sweep(after: timedelta) -> None:
        await presence.sweep(
            connection, offline_after=OFFLINE_AFTER, losses=[loss], mass_offline_after=after
        )

    await sweep(timedelta(minutes=3))
    assert await offline(database) == {"before", "elsewhere"}
    await sweep(timedelta(seconds=39))
    assert await offline(database) == {"before", "elsewhere", *together}


async def test_streams_that_were_lost_one_after_another_are_not_lost_together(
    database: Database, connection: Connection
) -> None:
    for number in range(2 * MASS_LEAST):
        await lost_long_ago(database, f"n{number}", "s")
        await age(database, f"n{number}", session_close_time=40 + number * 4)
    assert await presence.losses(connection, newer_than=timedelta(minutes=3)) == []


async def test_what_was_lost_too_long_ago_is_no_loss_any_more(
    database: Database, connection: Connection
) -> None:
    for number in range(MASS_LEAST):
        await lost_long_ago(database, f"n{number}", "s")
    found: list[Loss] = await presence.losses(connection, newer_than=timedelta(seconds=39))
    assert found == []


def sweeper(database: Database, server_id: str, *, patience: timedelta) -> Sweeper:
    metrics = Metrics()
    return Sweeper(
        database,
        server_id,
        metrics,
        CommandWatchers(database),
        doubt=SelfDoubt(metrics, patience=patience, flush_lag=lambda: 0.0, on_change=AsyncMock()),
        changed=lambda _: None,
        offline_after=OFFLINE_AFTER,
        mass_offline_after=timedelta(minutes=3),
        patience=patience,
        lost_after=timedelta(minutes=15),
    )


async def test_a_neuron_that_is_heard_at_this_moment_is_not_marked_down(
    database: Database, connection: Connection
) -> None:
    async with database.begin() as writing:
        await put_neuron(writing, "n", heartbeat_timeout=timedelta(seconds=1))
    await open_session(database, "n")
    await age(database, "n", session_open_time=3600, last_heartbeat_time=300)
    async with await database.connect("writer") as writer, writer.transaction():
        await writer.execute("UPDATE neuron_states SET last_heartbeat_time = now()")
        sweeping = asyncio.create_task(presence.sweep(connection, offline_after=OFFLINE_AFTER))

        async def waits() -> bool:
            query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            return bool(await rows(database, query))

        await eventually(waits, describe="the sweep waits for the heartbeat")
    assert await sweeping == []


async def test_a_sweeper_that_has_just_begun_marks_nobody_down(database: Database) -> None:
    async with database.begin() as writing:
        await put_neuron(writing, "n", heartbeat_timeout=timedelta(seconds=1))
    await open_session(database, "n", server_id="dead")
    await age(database, "n", session_open_time=3600)
    patient = sweeper(database, "s", patience=timedelta(days=1))
    sweeping = asyncio.create_task(patient.run())
    counted = ("federation_neurons", {"presence": "ONLINE"})
    registry = patient._metrics.registry
    await eventually(lambda: registry.get_sample_value(*counted), describe="a sweep has counted")
    found = await rows(database, "SELECT presence FROM neuron_states")
    assert found[0]["presence"] == "ONLINE"
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)


async def test_one_sweeper_sweeps_and_the_next_takes_over_when_it_ends(
    database: Database,
) -> None:
    first = sweeper(database, "first", patience=timedelta())
    second = sweeper(database, "second", patience=timedelta())
    running = asyncio.create_task(first.run())

    async def active(one: Sweeper) -> bool:
        return one._metrics.registry.get_sample_value("federation_sweeper_active") == 1

    await eventually(lambda: active(first), describe="the first one sweeps")
    waiting = asyncio.create_task(second.run())
    assert not await active(second)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await eventually(lambda: active(second), describe="the second one took over")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
