"""The store's ledger as the model's test drives it: one call for each step, with plain answers.

The spans are the model's; time passes by making everything that is stored older.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from federation_server.domain.command import CommandState, CommandUpdate
from federation_server.domain.neuron import Lifecycle, Presence
from federation_server.store import ingest
from federation_server.store.database import Connection, Database, driver
from federation_server.store.ingest import ClosedItem, DurableItem, Outcome
from federation_server.store.ledger import batches, changes, dispatch, leases, timers
from federation_server.store.ledger.batches import Candidate
from federation_server.store.ledger.commands import NewCommand
from federation_server.store.ledger.dispatch import ClaimedCancel, ClaimedCommand
from tests.support import ledger_model as model
from tests.support.ledger_model import AttemptId, Order, Standing
from tests.support.neurons import GENERATION, open_session, put_command, put_neuron

SERVER = "server-1"
ACTOR = "admin:tester"

_TIMES = {
    "commands": (
        "not_before_time expire_time progress_time next_attempt_time cancel_time create_time"
        " send_time accept_time start_time end_time"
    ),
    "command_batches": "create_time cancel_time",
    "neuron_states": (
        "presence_time session_open_time session_close_time lease_expire_time last_heartbeat_time"
    ),
}

_EMPTY = (b"DELETE FROM commands", b"DELETE FROM command_batches", b"DELETE FROM neurons")

_READ = b"""
SELECT c.command_id::text, c.state::text, c.attempt, c.session_epoch, c.held,
    c.next_attempt_time IS NOT NULL, c.cancel_attempt, c.cancel_epoch, c.revision, c.max_attempts,
    array_agg(t.revision ORDER BY t.revision), array_agg(t.state::text ORDER BY t.revision),
    array_agg(t.attempt ORDER BY t.revision)
FROM commands c JOIN command_transitions t USING (command_id)
GROUP BY c.command_id
"""


@dataclass(frozen=True, slots=True)
class Step:
    """A change of state, as the history has it."""

    revision: int
    state: CommandState
    attempt: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A command as the ledger has it."""

    standing: Standing
    revision: int
    max_attempts: int
    history: Sequence[Step]


class LedgerStore:
    """One database, and one connection for what servers do beside it."""

    def __init__(self, url: str) -> None:
        """Connects at the first `begin`."""
        self._database = Database(url, pool_size=1)
        self._opened: Connection | None = None

    @property
    def _connection(self) -> Connection:
        assert self._opened is not None
        return self._opened

    async def begin(self, neuron_ids: Sequence[str], *, places: int) -> None:
        """An empty ledger, and neurons that have registered and never came."""
        if self._opened is None:
            self._opened = await self._database.connect("test")
        for statement in _EMPTY:
            await self._connection.execute(statement)
        async with self._database.begin() as connection:
            for neuron_id in neuron_ids:
                await put_neuron(connection, neuron_id, max_concurrent_commands=places)

    async def close_all(self) -> None:
        """Lets go of the database."""
        if self._opened is not None:
            await self._opened.close()
        await self._database.close()

    async def read(self) -> dict[str, Stored]:
        """Every command."""
        cursor = await self._connection.execute(_READ)
        found = {}
        for (
            command_id,
            state,
            *rest,
            revision,
            most,
            revisions,
            states,
            attempts,
        ) in await cursor.fetchall():
            history = [
                Step(number, CommandState(name), attempt)
                for number, name, attempt in zip(revisions, states, attempts, strict=True)
            ]
            standing = Standing(CommandState(state), *rest)
            found[command_id] = Stored(standing, revision, most, history)
        return found

    # ---- operators

    async def issue(self, order: Order, now: int) -> str:
        made = await put_command(self._database, _new(order, now))
        assert made is not None
        return made.command_id

    async def issue_batch(
        self, template: Order, neuron_ids: Sequence[str], most: int, now: int
    ) -> tuple[str, list[tuple[str, str]]]:
        """The batch's id, and (neuron_id, command_id) of its commands."""
        async with self._database.begin() as connection:
            made = await batches.insert_batch(
                connection,
                _new(template, now),
                [Candidate(each, Lifecycle.ACTIVE, None) for each in neuron_ids],
                filter_text="",
                max_in_flight=most,
                skipped_count=0,
            )
        assert made is not None
        cursor = await self._connection.execute(
            b"SELECT neuron_id, command_id::text FROM commands WHERE batch_id = %s ORDER BY 1",
            (made.batch_id,),
        )
        return made.batch_id, await cursor.fetchall()

    async def cancel(self, command_id: str) -> None:
        async with self._connection.transaction():
            await changes.cancel_commands(self._connection, [command_id], actor=ACTOR, reason="")

    async def cancel_batch(self, batch_id: str) -> None:
        async with self._database.begin() as connection:
            await batches.cancel(connection, batch_id, actor=ACTOR, reason="")

    # ---- sessions

    async def open_session(
        self, neuron_id: str, spool: str, backlog: int, running: Sequence[AttemptId]
    ) -> tuple[int, int, Sequence[AttemptId]]:
        """The session's epoch, the spool's mark, and what nobody waits for."""
        opened = await open_session(
            self._database,
            neuron_id,
            server_id=SERVER,
            spool_id=spool,
            running=running,
            backlog=backlog,
        )
        return opened.epoch, opened.last_sequence, opened.astray

    async def close(self, neuron_id: str, epoch: int, *, offline: bool) -> None:
        presence = Presence.OFFLINE if offline else Presence.SUSPECT
        await self._ingest([], [ClosedItem(neuron_id, epoch, presence, "")])

    async def pull(
        self, neuron_id: str, process: str, epoch: int, running: Sequence[AttemptId], most: int
    ) -> tuple[int, list[AttemptId], list[AttemptId]] | None:
        """The epoch of the process's session, what it is to carry out, and what to give up. None
        if it is superseded.
        """
        lease_duration = timedelta(seconds=model.LEASE_S)
        async with self._database.begin() as connection:
            raw = await driver(connection)
            lease = await leases.open_lease(
                raw, neuron_id, GENERATION, process, lease_duration, epoch=epoch
            )
            if lease is None:
                return None
            pulled = await leases.pull(
                raw, SERVER, neuron_id, lease.epoch, running=running, most=most
            )
        return lease.epoch, _attempts(pulled.commands), _attempts(pulled.cancels)

    # ---- between server and neurons

    async def claim(
        self, wanted: Sequence[tuple[str, int]], doubtful: Collection[tuple[str, int]]
    ) -> dict[str, tuple[list[AttemptId], list[AttemptId]]]:
        """For each neuron: what it is to carry out, and what to give up."""
        claim = await dispatch.claim(self._connection, SERVER, wanted, doubtful=doubtful)
        epochs = dict(wanted)
        given: list[ClaimedCommand | ClaimedCancel] = [*claim.commands, *claim.cancels]
        assert all(each.session_epoch == epochs[each.neuron_id] for each in given)
        return {
            neuron_id: (
                _attempts(each for each in claim.commands if each.neuron_id == neuron_id),
                _attempts(each for each in claim.cancels if each.neuron_id == neuron_id),
            )
            for neuron_id in epochs
        }

    async def neurons_with_work(self) -> list[str]:
        return await dispatch.neurons_with_work(self._connection, SERVER)

    async def ingest(
        self, neuron_id: str, epoch: int, spool: str, said: Sequence[tuple[int, CommandUpdate]]
    ) -> tuple[bool, int]:
        """Whether it came too late, and how far the spool has been applied."""
        items = [DurableItem(neuron_id, epoch, spool, *each) for each in said]
        outcome = await self._ingest(items, [])
        return (neuron_id, epoch) in outcome.fenced, outcome.marks.get((neuron_id, spool), 0)

    async def _ingest(
        self, durables: Sequence[DurableItem], closed: Sequence[ClosedItem]
    ) -> Outcome:
        return await ingest.apply(
            self._connection, [], durables, closed, oldest_point=timedelta(days=1)
        )

    # ---- time, and those who act on it

    async def advance(self, steps: int) -> None:
        """Makes everything older."""
        span = timedelta(seconds=steps * model.STEP_S)
        for table, columns in _TIMES.items():
            changes = ", ".join(f"{name} = {name} - %(span)s" for name in columns.split())
            await self._connection.execute(
                f"UPDATE {table} SET {changes}".encode(),  # noqa: S608 - names of ours
                {"span": span},
            )

    async def expire(self) -> None:
        await timers.expire(self._connection, SERVER)

    async def time_out_late(self) -> None:
        await timers.time_out_late(self._connection, SERVER)

    async def give_up_lost(self) -> None:
        lost_after = timedelta(seconds=model.LOST_AFTER_S)
        await timers.give_up_lost(self._connection, SERVER, lost_after=lost_after)

    async def end_leases(self) -> None:
        await leases.end_expired(self._connection, SERVER)

    async def release(self) -> set[str]:
        """The neurons whose commands were let go."""
        released = await batches.release(self._connection)
        return {neuron_id for neuron_id, _ in released}


def _new(order: Order, now: int) -> NewCommand:
    time = datetime.now(UTC)
    limit = timedelta(seconds=model.TIMEOUT_S) if order.limited else None
    run_limit = timedelta(seconds=model.RUN_TIMEOUT_S) if order.limited else None
    return NewCommand(
        neuron_id=order.neuron_id,
        issuer="tester",
        request_id=None,
        request_hash=b"",
        type="run",
        data={},
        control=order.control,
        priority=order.priority,
        not_before_time=(
            time + timedelta(seconds=order.not_before - now) if order.not_before else None
        ),
        expire_time=time + timedelta(seconds=order.expire - now),
        accept_timeout=limit,
        run_timeout=run_limit,
        progress_timeout=limit,
        execution=order.execution,
        max_attempts=order.max_attempts,
        retry_backoff=timedelta(seconds=model.BACKOFF_S),
    )


def _attempts(claimed: Iterable[ClaimedCommand | ClaimedCancel]) -> list[AttemptId]:
    return [(each.command_id, each.attempt) for each in claimed]
