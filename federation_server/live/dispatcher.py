"""From the ledger to the streams.

A command that is issued on this server is claimed in the transaction that issues it (`claiming`).
For all else the dispatcher is told that a neuron may have something to receive (`wake`): by a
hint from another server, by a new session, by a command that has ended and freed a place. Its one
task claims for all such neurons in one statement. Either way what was got goes into the outboxes
of the sessions once that is committed. A slow scan finds what nobody told of, and what had to wait
for its time. Before it claims, the task lets the commands of batches go whose turn it is
(`wake_batch`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import psycopg
import structlog

from federation_server.domain.command import Execution
from federation_server.domain.retry import Backoff
from federation_server.live.metrics import Metrics
from federation_server.live.notifier import send_hints
from federation_server.live.session import Cancel, Delivery, Session, Sessions
from federation_server.store.database import (
    Database,
    OwnConnection,
    bounded,
    first_line,
)
from federation_server.store.ledger import batches, dispatch
from federation_server.store.ledger.dispatch import Claim, ClaimedCancel, ClaimedCommand
from federation_server.store.pipeline import Pipeline, pipeline

log = structlog.get_logger(__name__)

SCAN_INTERVAL_S = 1.0
"""How long a command can wait that no hint was heard of."""

OPENED_PAUSE_S = 0.02
"""How long a neuron whose stream has just been opened waits for others, so that a herd is asked for
together."""

CLAIM_TIMEOUT_S = 10.0
"""How long one claim may take before its connection is given up."""


class Dispatcher:
    """Sends commands to the neurons whose streams this server holds."""

    def __init__(
        self, database: Database, server_id: str, sessions: Sessions, metrics: Metrics
    ) -> None:
        """Sends nothing before `run`."""
        self._server_id = server_id
        self._sessions = sessions
        self._metrics = metrics
        self._woken: set[str] = set()
        self._one_claim = asyncio.Lock()  # two at a time could fill the same place twice
        self._asked: set[str] = set()
        self._full: set[str] = set()
        self._doubtful: set[tuple[str, int]] = set()
        self._batches: set[str] = set()
        self._soon: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._connection = OwnConnection(database, "dispatcher")

    def wake(self, neuron_id: str) -> None:
        """Something may wait for that neuron."""
        self._woken.add(neuron_id)
        self._wake.set()

    def opened(self, neuron_id: str) -> None:
        """That neuron's stream has been opened: something may have waited for it."""
        self._woken.add(neuron_id)
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(OPENED_PAUSE_S, self._look)

    def _look(self) -> None:
        self._soon = None
        self._wake.set()

    def freed(self, neuron_id: str) -> None:
        """A command of that neuron has ended, or waits for another attempt: its place is free."""
        if neuron_id in self._full or neuron_id in self._asked:
            self.wake(neuron_id)

    def wake_all(self) -> None:
        """Something may wait for any neuron here."""
        self._woken.update(session.neuron_id for session in self._sessions)
        self._wake.set()

    def wake_batch(self, batch_id: str) -> None:
        """Something of that batch has ended, or may begin."""
        self._batches.add(batch_id)
        self._wake.set()

    async def run(self) -> None:
        """Dispatches until it is cancelled, through every outage of PostgreSQL."""
        backoff = Backoff(first_s=0.1, most_s=2.0)
        try:
            while True:
                try:
                    await self._round()
                    backoff.reset()
                except psycopg.Error as error:
                    await self._connection.close()
                    log.warning(
                        "dispatch failed, will be repeated",
                        action="dispatcher_retry",
                        reason=first_line(error),
                    )
                    await asyncio.sleep(backoff.next_s())
                    self._doubtful &= {(each.neuron_id, each.epoch) for each in self._sessions}
                    self.wake_all()
        finally:
            await self._connection.close()

    async def _round(self) -> None:
        """Waits for a wake-up or for the next scan, and sends what there is."""
        try:
            async with asyncio.timeout(SCAN_INTERVAL_S):
                await self._wake.wait()
        except TimeoutError:
            if len(self._sessions):
                await self._scan()
        self._wake.clear()
        if self._batches:
            ended_in, self._batches = self._batches, set()
            await self._release(ended_in)
        woken, self._woken = self._woken, set()
        if any(self._sessions.get(neuron_id) is not None for neuron_id in woken):
            connection = await self._connection.get()
            with bounded(connection, CLAIM_TIMEOUT_S):
                async with AsyncExitStack() as sent, pipeline(connection) as send:
                    await sent.enter_async_context(self.claiming(send, woken))

    @asynccontextmanager
    async def claiming(self, send: Pipeline, neuron_ids: Iterable[str]) -> AsyncIterator[None]:
        """Claims for those of the neurons whose streams are here. When the block ends the pipeline
        must have been committed: then what was got is sent.
        """
        sessions = [
            (session.neuron_id, session.epoch)
            for neuron_id in sorted(set(neuron_ids))
            if (session := self._sessions.get(neuron_id)) is not None
        ]
        if not sessions:
            yield
            return
        asked = {neuron_id for neuron_id, _ in sessions}
        async with self._one_claim:
            doubtful = self._doubtful.intersection(sessions)
            # Until the answer is here nobody knows whether PostgreSQL has marked commands SENT that
            # this server never saw.
            self._doubtful.update(sessions)
            self._asked = asked
            try:
                claimed = dispatch.claim_later(send, self._server_id, sessions, doubtful=doubtful)
                yield
                claim = await claimed()
            except BaseException:
                self._woken |= asked
                self._wake.set()
                raise
            finally:
                self._asked = set()
            self._doubtful.difference_update(sessions)
            self._full = self._full - asked | claim.full
            self._deliver(claim)

    async def _scan(self) -> None:
        """Finds what nobody told of."""
        self._full = {each for each in self._full if self._sessions.get(each) is not None}
        connection = await self._connection.get()
        with bounded(connection, CLAIM_TIMEOUT_S):
            found = await dispatch.neurons_with_work(connection, self._server_id)
        self._woken.update(found)
        await self._release(None)

    async def _release(self, batch_ids: Collection[str] | None) -> None:
        """Lets more commands of batches go, wherever their neurons are."""
        connection = await self._connection.get()
        with bounded(connection, CLAIM_TIMEOUT_S):
            released = await batches.release(connection, batch_ids)
            elsewhere = [each for each in released if each[1] not in {"", self._server_id}]
            if elsewhere:
                async with pipeline(connection) as send:
                    send_hints(send, elsewhere)
        self._woken.update(neuron_id for neuron_id, server_id in released)

    def _deliver(self, claim: Claim) -> None:
        for cancelled in claim.cancels:
            if (session := self._of(cancelled)) is not None:
                session.send(cancel(cancelled))
                self.wake(cancelled.neuron_id)  # its next attempt had to wait for this
        for command in claim.commands:
            if (session := self._of(command)) is not None and (
                command.execution is not Execution.AT_MOST_ONCE or session.first(command.command_id)
            ):
                self._metrics.commands_sent.inc()
                session.send(delivery(command))

    def _of(self, claimed: ClaimedCommand | ClaimedCancel) -> Session | None:
        """The session that it was claimed for; None if that was superseded since: then the next one
        finds it in flight.
        """
        session = self._sessions.get(claimed.neuron_id)
        return session if session is not None and session.epoch == claimed.session_epoch else None


def delivery(command: ClaimedCommand) -> Delivery:
    """A claimed command on its way to the neuron."""
    return Delivery(
        command_id=command.command_id,
        attempt=command.attempt,
        type=command.type,
        data=command.data,
        priority=command.priority,
        run_timeout=command.run_timeout,
        expire_after=command.expire_after,
        checkpoint=command.checkpoint,
        max_attempts=command.max_attempts,
        execution=command.execution,
    )


def cancel(claimed: ClaimedCancel) -> Cancel:
    """A claimed cancel on its way to the neuron."""
    return Cancel(claimed.command_id, claimed.attempt, claimed.reason)
