"""A second, smaller ledger in plain Python, to hold the real one against.

It says in the contract's words what each call of the store changes, and knows no SQL, no lock and
no transaction. Times are seconds of a clock that only `advance` moves, in steps of STEP_S. Every
span below lies at least a quarter of a step beside all multiples of it, so that the seconds which
pass while a test runs decide nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from federation_server.domain.command import (
    EXPIRED,
    Accepted,
    CommandUpdate,
    Execution,
    Finished,
)
from federation_server.domain.command import CommandState as S

STEP_S = 400
BACKOFF_S = 100  # and 200 after the second attempt
TIMEOUT_S = 200
RUN_TIMEOUT_S = 190  # and 10 s of grace
CANCEL_PATIENCE_S = 300  # the server's own
LOST_AFTER_S = 600
LEASE_S = 200
NOT_BEFORE_S = 200
EXPIRY_S = 300  # and any number of steps

PLACES = 2
MOST_CONTROL = 16

WITH_NEURON = {S.SENT, S.ACCEPTED, S.RUNNING, S.CANCELLING}
WORKED_ON = WITH_NEURON - {S.CANCELLING}
RETRIED = {S.FAILED, S.TIMED_OUT}

AttemptId = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a command stands: what the model and the ledger are compared by."""

    state: S
    attempt: int
    epoch: int | None
    held: bool
    waits_for_retry: bool
    cancel_attempt: int | None
    cancel_epoch: int | None


@dataclass(slots=True)
class Order:
    """A command as the model has it. None and 0: nothing, never."""

    command_id: str
    neuron_id: str
    priority: int
    control: bool
    execution: Execution
    max_attempts: int
    expire: int
    not_before: int = 0
    limited: bool = False
    """It has an accept, a run and a progress timeout."""
    batch_id: str | None = None
    held: bool = False
    state: S = S.QUEUED
    attempt: int = 0
    epoch: int | None = None
    """The session that has it."""
    next_attempt: int | None = None
    cancel_attempt: int | None = None
    cancel_epoch: int | None = None
    cancel_time: int = 0
    send_time: int = 0
    start_time: int | None = None
    progress_time: int | None = None

    @property
    def once(self) -> bool:
        return self.execution is Execution.AT_MOST_ONCE

    @property
    def with_neuron(self) -> bool:
        return self.state in WITH_NEURON

    @property
    def to_give_up(self) -> bool:
        """A session that was not told yet is to be told to give an attempt up."""
        return self.cancel_attempt is not None and (
            self.state is S.CANCELLING or self.cancel_epoch is None
        )

    def told_in(self, epoch: int) -> bool:
        """That session was told so, if the answer of the claim arrived, and has not answered."""
        return self.cancel_attempt is not None and self.cancel_epoch == epoch

    def end(self, state: S) -> None:
        self.state = state
        self.next_attempt = None

    def standing(self) -> Standing:
        return Standing(
            self.state,
            self.attempt,
            self.epoch,
            self.held,
            self.next_attempt is not None,
            self.cancel_attempt,
            self.cancel_epoch,
        )


@dataclass(slots=True)
class Station:
    """A neuron as the model has it."""

    neuron_id: str
    epoch: int = 0
    open: bool = False
    open_time: int = 0
    offline_since: int | None = 0
    process: str | None = None
    """Who pulls; None: it holds, or held, a stream."""
    lease_until: int = 0
    spool: str = ""
    backlog: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    """How far each of its spools has been applied."""


@dataclass(slots=True)
class Batch:
    """A batch as the model has it."""

    batch_id: str
    max_in_flight: int
    holding: bool


class Model:
    """What the ledger should hold."""

    def __init__(self, neuron_ids: Iterable[str]) -> None:
        """Neurons that have registered and never came."""
        self.now = 0
        self.orders: dict[str, Order] = {}  # in the order of their issue
        self.stations = {neuron_id: Station(neuron_id) for neuron_id in neuron_ids}
        self.batches: dict[str, Batch] = {}

    def of(self, neuron_id: str) -> list[Order]:
        """A neuron's commands."""
        return [order for order in self.orders.values() if order.neuron_id == neuron_id]

    def connected(self, neuron_id: str) -> bool:
        """Whether it can be given commands."""
        station = self.stations[neuron_id]
        return station.open or (station.process is not None and station.lease_until > self.now)

    def order(
        self,
        neuron_id: str,
        *,
        priority: int = 5,
        control: bool = False,
        attempts: int = 1,
        later: bool = False,
        limited: bool = False,
        lives: int = 1,
    ) -> Order:
        """A command without an id that is not issued yet. No `attempts`: AT_MOST_ONCE; `later`: it
        has to wait a step; `limited`: it has timeouts; `lives`: for that many steps and a half.
        """
        return Order(
            "",
            neuron_id,
            priority,
            control,
            Execution.AT_LEAST_ONCE if attempts else Execution.AT_MOST_ONCE,
            max_attempts=attempts or 1,
            expire=self.now + lives * STEP_S + EXPIRY_S,
            not_before=self.now + NOT_BEFORE_S if later else 0,
            limited=limited,
        )

    # ---- sessions

    def open_session(
        self, neuron_id: str, spool: str, backlog: int, running: Collection[AttemptId]
    ) -> set[AttemptId]:
        """Begins a stream; gives what the neuron has and nobody waits for."""
        station = self.stations[neuron_id]
        station.epoch += 1
        station.open, station.open_time, station.offline_since = True, self.now, None
        station.process, station.lease_until = None, 0
        station.spool, station.backlog = spool, backlog
        return set(running) - self._take_over(station, running)

    def close_session(self, neuron_id: str, *, offline: bool) -> None:
        """Ends a stream, with a Goodbye or without."""
        station = self.stations[neuron_id]
        station.open = False
        station.offline_since = self.now if offline else None

    def open_lease(self, neuron_id: str, process: str, known_epoch: int) -> bool:
        """A process calls for work: it begins a session, or goes on with its own. False if another
        one began since the epoch that it knows; it knows none when it begins.
        """
        station = self.stations[neuron_id]
        if station.open or station.process != process:
            if 0 < known_epoch <= station.epoch:
                return False
            station.epoch += 1
        station.open, station.process = False, process
        station.lease_until = self.now + LEASE_S
        return True

    def _take_over(self, station: Station, running: Collection[AttemptId]) -> set[AttemptId]:
        known = {
            (order.command_id, order.attempt): order
            for order in self.of(station.neuron_id)
            if order.with_neuron
        }
        taken = known.keys() & set(running)
        for of in taken:
            known[of].epoch = station.epoch
        return taken

    # ---- to the neuron

    def due(self, neuron_id: str) -> list[Order]:
        """What could be sent if there were places enough, in the order of its turn."""
        waiting = [
            order
            for order in self.of(neuron_id)
            if order.state is S.QUEUED
            and order.expire > self.now
            and order.not_before <= self.now
            and (order.next_attempt is None or order.next_attempt <= self.now)
            and (order.cancel_attempt is None or order.cancel_epoch is not None)
            and not order.held
        ]
        return sorted(waiting, key=lambda order: -order.priority)  # stable: then by age

    def claim(
        self, neuron_id: str, epoch: int, *, doubtful: bool, most: int = 10**6
    ) -> tuple[list[AttemptId], list[AttemptId]]:
        """What a session is given now: commands to carry out, and attempts to give up."""
        station = self.stations[neuron_id]
        if epoch != station.epoch or not self.connected(neuron_id):
            return [], []
        busy = sum(order.with_neuron and not order.control for order in self.of(neuron_id))
        due = self.due(neuron_id)
        normal = [order for order in due if not order.control][: max(min(most, PLACES - busy), 0)]
        fresh = [order for order in due if order.control][:MOST_CONTROL] + normal
        again = [
            order
            for order in self.of(neuron_id)
            if order.state in WORKED_ON and _sent_again(order, epoch, doubtful=doubtful)
        ]
        again.sort(key=lambda order: (not order.control, -order.priority))
        to_give_up = [
            order
            for order in self.of(neuron_id)
            if (doubtful and order.told_in(epoch))
            or (order.to_give_up and not order.told_in(epoch))
        ]
        for order in to_give_up:
            order.cancel_epoch = epoch
        told = [(order.command_id, order.cancel_attempt or 0) for order in to_give_up]
        for order in fresh:
            order.attempt += 1
            order.state = S.SENT
            order.next_attempt = order.start_time = order.progress_time = None
        for order in again + fresh:
            order.epoch, order.send_time = epoch, self.now
        return [(order.command_id, order.attempt) for order in again + fresh], told

    def pull(
        self, neuron_id: str, running: Collection[AttemptId], most: int
    ) -> tuple[list[AttemptId], list[AttemptId]]:
        """What a process is given after `open_lease`."""
        station = self.stations[neuron_id]
        taken = self._take_over(station, running)
        for order in self.of(neuron_id):
            doubtful = order.epoch != station.epoch or order.state is S.SENT
            named = (order.command_id, order.attempt) in taken
            if order.once and order.state in WORKED_ON and doubtful and not named:
                order.end(S.OUTCOME_UNKNOWN)
        waiting = [order for order in self.of(neuron_id) if order.state is S.QUEUED]
        self.release({order.batch_id for order in waiting if order.held})
        given, told = self.claim(neuron_id, station.epoch, doubtful=True, most=most)
        astray = [of for of in running if of not in taken]
        return [of for of in given if of not in taken], told + astray

    # ---- from the neuron

    def update(self, neuron_id: str, update: CommandUpdate) -> None:
        """What a neuron says of an attempt, on its newest session."""
        order = self.orders.get(update.command_id)
        if order is None or order.neuron_id != neuron_id:
            return
        if isinstance(update.change, Finished) and order.cancel_attempt == update.attempt:
            order.cancel_attempt = order.cancel_epoch = None
        if not order.with_neuron or order.attempt != update.attempt:
            return
        if isinstance(update.change, Finished):
            error = update.change.error
            if error is not None and error.code == EXPIRED and order.state is not S.RUNNING:
                order.end(S.EXPIRED)
            else:
                self._end_attempt(order, update.change.state)
        elif isinstance(update.change, Accepted):
            order.state = S.ACCEPTED if order.state is S.SENT else order.state
        else:
            order.progress_time = self.now
            if order.state in {S.SENT, S.ACCEPTED}:
                order.state, order.start_time = S.RUNNING, self.now

    def _end_attempt(self, order: Order, state: S) -> None:
        retry = state in RETRIED and order.state is not S.CANCELLING
        next_attempt = self.now + BACKOFF_S * 2 ** (order.attempt - 1)
        order.end(state)
        if retry and order.attempt < order.max_attempts and next_attempt < order.expire:
            order.state, order.next_attempt = S.QUEUED, next_attempt

    # ---- operators

    def cancel(self, chosen: Iterable[Order]) -> None:
        for order in chosen:
            if order.state is S.QUEUED:
                order.end(S.CANCELLED)
            elif order.state in WORKED_ON:
                order.state = S.CANCELLING
                order.cancel_attempt, order.cancel_epoch = order.attempt, None
                order.cancel_time = self.now

    def cancel_batch(self, batch_id: str) -> None:
        self.batches[batch_id].holding = False
        self.cancel(order for order in self.orders.values() if order.batch_id == batch_id)

    def release(self, batch_ids: Collection[str | None] | None = None) -> set[str]:
        """Lets commands of batches go; gives their neurons."""
        released = set()
        for batch in self.batches.values():
            if not batch.holding or (batch_ids is not None and batch.batch_id not in batch_ids):
                continue
            own = [order for order in self.orders.values() if order.batch_id == batch.batch_id]
            waiting = [order for order in own if order.state is S.QUEUED]
            for order in waiting:
                order.held |= order.attempt == 0 and not self.connected(order.neuron_id)
            under_way = [order for order in own if order.with_neuron] + [
                order for order in waiting if not order.held
            ]
            reachable = [order for order in waiting if order.held]
            reachable = [order for order in reachable if self.connected(order.neuron_id)]
            reachable.sort(key=lambda order: order.neuron_id)
            for order in reachable[: max(batch.max_in_flight - len(under_way), 0)]:
                order.held = False
                released.add(order.neuron_id)
            batch.holding = any(order.held or order.attempt == 0 for order in waiting)
        return released

    # ---- time

    def advance(self, steps: int) -> None:
        self.now += steps * STEP_S

    def expire(self) -> None:
        for order in self.orders.values():
            if order.state is S.QUEUED and order.expire <= self.now:
                order.end(S.EXPIRED)

    def time_out_late(self) -> None:
        for order in self.orders.values():
            if not order.limited or not self._is_late(order):
                continue
            if order.once and not self.connected(order.neuron_id):
                order.end(S.OUTCOME_UNKNOWN)
            else:
                self._end_attempt(order, S.TIMED_OUT)
                order.cancel_attempt, order.cancel_epoch = order.attempt, None

    def _is_late(self, order: Order) -> bool:
        if order.state is S.SENT:
            return self.now - order.send_time > TIMEOUT_S
        if order.state is S.RUNNING and order.start_time is not None:
            running = self.now - order.start_time > RUN_TIMEOUT_S
            return running or self.now - (order.progress_time or 0) > TIMEOUT_S
        return False

    def give_up_lost(self) -> None:
        for order in self.orders.values():
            if order.with_neuron and self._is_lost(order, self.stations[order.neuron_id]):
                order.end(S.OUTCOME_UNKNOWN)

    def _is_lost(self, order: Order, station: Station) -> bool:
        if order.once and order.state is not S.CANCELLING and station.open:
            known = station.marks.get(station.spool, 0) >= station.backlog
            if known and order.epoch != station.epoch:
                return True
        patience = self.now - CANCEL_PATIENCE_S
        if order.state is S.CANCELLING and station.open and order.cancel_time < patience:
            return station.open_time < patience
        if station.offline_since is None or self.connected(order.neuron_id):
            return False
        return self.now - station.offline_since > LOST_AFTER_S and order.expire < self.now

    def end_leases(self) -> None:
        for order in self.orders.values():
            station = self.stations[order.neuron_id]
            over = station.process is not None and station.lease_until < self.now
            if order.with_neuron and order.epoch == station.epoch and over and not station.open:
                if order.once:
                    order.end(S.OUTCOME_UNKNOWN)
                else:
                    self._end_attempt(order, S.FAILED)


def _sent_again(order: Order, epoch: int, *, doubtful: bool) -> bool:
    if order.epoch == epoch:
        return doubtful and order.state is S.SENT
    return not order.once
