"""What the dispatcher takes from the ledger: order, places, redelivery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from federation_server.domain.command import Accepted, CommandState, CommandUpdate, Finished
from federation_server.store import ingest
from federation_server.store.database import Connection, Database
from federation_server.store.ingest import DurableItem
from federation_server.store.ledger import changes, commands, dispatch, issuing, leases, timers
from federation_server.store.ledger.commands import NewCommand
from federation_server.store.ledger.dispatch import Claim, ClaimedCommand
from federation_server.store.ledger.issuing import Known
from federation_server.store.pipeline import pipeline
from tests.support.neurons import GENERATION, open_session, put_command, put_neuron

NEURON = "worker-1"
SERVER = "server-1"


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    async with database.begin() as connection:
        await put_neuron(connection, NEURON, max_concurrent_commands=2)
    yield database
    await database.close()


@pytest_asyncio.fixture
async def connection(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test") as connection:
        yield connection


async def issue(
    database: Database,
    *,
    priority: int = 5,
    control: bool = False,
    not_before: timedelta | None = None,
    expire: timedelta = timedelta(hours=1),
    max_attempts: int = 1,
) -> str:
    now = datetime.now(UTC)
    record = await put_command(
        database,
        NewCommand(
            neuron_id=NEURON,
            issuer="admin",
            request_id=None,
            request_hash=b"",
            type="stop" if control else "run",
            data={},
            control=control,
            priority=priority,
            not_before_time=now + not_before if not_before else None,
            expire_time=now + expire,
            run_timeout=None,
            max_attempts=max_attempts,
        ),
    )
    assert record is not None
    return record.command_id


async def claim(connection: Connection, epoch: int) -> list[ClaimedCommand]:
    return (await dispatch.claim(connection, SERVER, [(NEURON, epoch)])).commands


async def update(
    connection: Connection, epoch: int, sequence: int, change: CommandUpdate
) -> ingest.Outcome:
    item = DurableItem(NEURON, epoch, "spool-1", sequence, change)
    return await ingest.apply(connection, (), (item,), (), oldest_point=timedelta(days=1))


async def test_higher_priority_goes_first_and_then_the_older(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    older = await issue(database)
    await issue(database)
    urgent = await issue(database, priority=9)
    assert [c.command_id for c in await claim(connection, epoch)] == [urgent, older]


async def test_a_neuron_gets_no_more_than_it_has_places_for_and_control_needs_none(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    for _ in range(3):
        await issue(database)
    stop = await issue(database, control=True)
    taken = [c.command_id for c in await claim(connection, epoch)]
    assert (len(taken), taken[0]) == (3, stop)
    assert await claim(connection, epoch) == []


async def test_a_finished_command_frees_its_place(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    waiting = [await issue(database) for _ in range(3)]
    first, _ = await claim(connection, epoch)
    done = Finished(CommandState.SUCCEEDED, {}, None, None, "")
    await update(connection, epoch, 1, CommandUpdate(first.command_id, 1, done))
    assert [c.command_id for c in await claim(connection, epoch)] == [waiting[2]]


async def test_a_command_waits_for_its_time(database: Database, connection: Connection) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    await issue(database, not_before=timedelta(minutes=1))
    assert await claim(connection, epoch) == []
    assert await dispatch.neurons_with_work(connection, SERVER) == []


async def test_a_superseded_session_claims_nothing(
    database: Database, connection: Connection
) -> None:
    old = (await open_session(database, NEURON)).epoch
    new = (await open_session(database, NEURON)).epoch
    await issue(database)
    assert await claim(connection, old) == []
    assert len(await claim(connection, new)) == 1


async def test_what_was_in_flight_is_sent_again_to_the_next_session_with_the_same_attempt(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await issue(database)
    await claim(connection, epoch)
    await update(connection, epoch, 1, CommandUpdate(command_id, 1, Accepted()))
    epoch = (await open_session(database, NEURON)).epoch
    assert await dispatch.neurons_with_work(connection, SERVER) == [NEURON]
    (again,) = await claim(connection, epoch)
    assert (again.command_id, again.attempt) == (command_id, 1)
    async with database.begin() as reading:
        record = await commands.get(reading, command_id)
        assert record is not None
        history = await commands.transitions(reading, record)
    assert record.state is CommandState.ACCEPTED
    assert record.state_reason == "sent again to a new session"
    assert [t.state.value for t in history] == ["QUEUED", "SENT", "ACCEPTED"]


async def test_what_the_neuron_says_is_running_is_not_sent_again(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await issue(database)
    await claim(connection, epoch)
    epoch = (await open_session(database, NEURON, running=[(command_id, 1)])).epoch
    assert await claim(connection, epoch) == []
    assert await dispatch.neurons_with_work(connection, SERVER) == []


async def test_a_queued_command_expires_and_a_running_one_does_not(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    running = await issue(database)
    await claim(connection, epoch)
    queued = await issue(database, not_before=timedelta(seconds=-2), expire=timedelta(seconds=-1))
    assert await timers.expire(connection, SERVER) == [queued]
    async with database.begin() as reading:
        ended = await commands.get(reading, queued)
        going = await commands.get(reading, running)
        assert ended is not None
        history = await commands.transitions(reading, ended)
    assert going is not None
    assert (ended.state, going.state) == (CommandState.EXPIRED, CommandState.SENT)
    assert [t.state for t in history] == [CommandState.QUEUED, CommandState.EXPIRED]


async def test_the_same_request_id_issues_once_and_has_one_entry_in_the_audit_log(
    database: Database, connection: Connection
) -> None:
    now = datetime.now(UTC)
    new = NewCommand(
        neuron_id=NEURON,
        issuer="admin",
        request_id="r-1",
        request_hash=b"h",
        type="run",
        data={},
        control=False,
        priority=5,
        not_before_time=None,
        expire_time=now + timedelta(hours=1),
        run_timeout=None,
    )
    made = await put_command(database, new)
    assert made is not None
    assert await put_command(database, new) is None
    async with pipeline(connection) as send:
        known = await issuing.known_later(send, [("admin", "r-1")])()
    assert known == {("admin", "r-1"): Known(made, b"h")}
    cursor = await connection.execute(b"SELECT object_id FROM audit_entries")
    assert await cursor.fetchall() == [(made.command_id,)]


async def test_a_cancel_is_claimed_again_if_the_answer_to_its_claim_was_lost(
    database: Database, connection: Connection
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await issue(database)
    await claim(connection, epoch)
    async with connection.transaction():
        await changes.cancel_commands(connection, [command_id], actor="admin:a", reason="")
    session = (NEURON, epoch)
    for doubtful in ([], [session]):  # the first answer reaches nobody
        (told,) = (await dispatch.claim(connection, SERVER, [session], doubtful=doubtful)).cancels
        assert (told.command_id, told.attempt) == (command_id, 1)
    assert await dispatch.claim(connection, SERVER, [session]) == Claim()


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_cancel_of_an_attempt_that_was_timed_out_is_claimed_again_until_it_is_answered(
    database: Database, connection: Connection, attempts: int
) -> None:
    epoch = (await open_session(database, NEURON)).epoch
    command_id = await issue(database, max_attempts=attempts)
    await claim(connection, epoch)
    await connection.execute(
        b"UPDATE commands SET accept_timeout = '1 s', send_time = now() - interval '2 s'"
    )
    (late,) = await timers.time_out_late(connection, SERVER)
    assert late.state is (CommandState.TIMED_OUT if attempts == 1 else CommandState.QUEUED)
    await connection.execute(b"UPDATE commands SET next_attempt_time = now()")
    session = (NEURON, epoch)
    for doubtful in ([], [session], [session]):  # the first two answers reach nobody
        claimed = await dispatch.claim(connection, SERVER, [session], doubtful=doubtful)
        assert [(each.command_id, each.attempt) for each in claimed.cancels] == [(command_id, 1)]
    end = Finished(CommandState.CANCELLED, None, None, None, "")
    outcome = await update(connection, epoch, 1, CommandUpdate(command_id, 1, end))
    assert outcome.changed == []
    answered = await dispatch.claim(connection, SERVER, [session], doubtful=[session])
    assert answered.cancels == []


async def test_a_process_that_keeps_its_lease_is_not_away_whatever_its_heartbeats_say(
    database: Database, connection: Connection
) -> None:
    span = timedelta(minutes=1)
    command_id = await issue(database)
    async with connection.transaction():
        lease = await leases.open_lease(connection, NEURON, GENERATION, "process-1", span)
        assert lease is not None
        await leases.pull(connection, SERVER, NEURON, lease.epoch, running=[], most=1)
    age = b"UPDATE neuron_states SET presence_time = now() - interval '1 day'"
    await connection.execute(age)
    await connection.execute(b"UPDATE commands SET expire_time = now() - interval '1 hour'")
    assert await timers.give_up_lost(connection, SERVER, lost_after=span) == []
    await connection.execute(b"UPDATE neuron_states SET lease_expire_time = now()")
    (lost,) = await timers.give_up_lost(connection, SERVER, lost_after=span)
    assert (lost.command_id, lost.state) == (command_id, CommandState.OUTCOME_UNKNOWN)


async def test_of_two_attempts_that_a_neuron_has_the_one_that_is_over_is_to_be_given_up(
    database: Database, connection: Connection
) -> None:
    await open_session(database, NEURON)
    command_id = await issue(database)
    await connection.execute(b"UPDATE commands SET state = 'RUNNING', attempt = 2")
    both = [(command_id, 1), (command_id, 2)]
    assert (await open_session(database, NEURON, running=both)).astray == [(command_id, 1)]
    async with connection.transaction():
        span = timedelta(minutes=1)
        lease = await leases.open_lease(connection, NEURON, GENERATION, "process-1", span)
        assert lease is not None
        pulled = await leases.pull(connection, SERVER, NEURON, lease.epoch, running=both, most=1)
    assert [(each.command_id, each.attempt) for each in pulled.cancels] == [(command_id, 1)]
    assert pulled.commands == []
