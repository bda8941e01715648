"""The store's ledger and its model, driven side by side: each rule is a step that both take.

After each step every command must be as `tests/support/ledger_model.py` says, and its history must
be one that the table of transitions allows. At the end of a history all neurons behave, and every
command must come to an end. Hypothesis chooses the steps, or a test calls the rules itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Coroutine, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from federation_server.domain.command import (
    FINAL_STATES,
    TRANSITIONS,
    Accepted,
    CommandError,
    CommandState,
    CommandUpdate,
    Finished,
    Progressed,
)
from tests.support.ledger_model import PLACES, AttemptId, Batch, Model, Order
from tests.support.ledger_store import LedgerStore, Stored

T = TypeVar("T")

NEURONS = ("n-0", "n-1")
COMES_AND_GOES = (
    "connect",
    "connect",
    "connect, all forgotten",
    "goodbye",
    "cut",
    "late",
)
STREAMS, PULLS = NEURONS
"""The second one also pulls."""

SWEEPS = ("expire", "time_out_late", "give_up_lost", "end_leases")
ROUNDS_TO_THE_END = 30

which = st.integers(0, 999)
neurons = st.sampled_from(NEURONS)
ends = st.sampled_from(["SUCCEEDED", "FAILED", "FAILED", "TIMED_OUT", "REJECTED", "CANCELLED"])


class Neuron:
    """A neuron's own side: what it was given, and what it has said and nobody has acknowledged."""

    def __init__(self, neuron_id: str) -> None:
        self.neuron_id = neuron_id
        self.spools = 0
        self.sequence = 0
        self.unacked: list[tuple[int, CommandUpdate]] = []
        self.given: list[AttemptId] = []
        self.told: list[AttemptId] = []

    @property
    def spool(self) -> str:
        return f"{self.neuron_id}-spool-{self.spools}"

    def say(self, of: AttemptId, change: Accepted | Progressed | Finished) -> None:
        self.sequence += 1
        self.unacked.append((self.sequence, CommandUpdate(*of, change)))

    def forget(self) -> None:
        """It loses its disk."""
        self.spools += 1
        self.sequence = 0
        self.unacked, self.given, self.told = [], [], []


class Ledger(RuleBasedStateMachine):
    """The store and the model, side by side."""

    def __init__(self, runner: asyncio.Runner, store: LedgerStore) -> None:
        super().__init__()
        self.runner = runner
        self.store = store
        self.model = Model(NEURONS)
        self.neurons = {neuron_id: Neuron(neuron_id) for neuron_id in NEURONS}
        self.doubtful: set[tuple[str, int]] = set()
        self.known_epochs: dict[str, int] = {}
        self.handed_out: Counter[str] = Counter()
        self.given_in: set[tuple[str, int, str]] = set()
        self.seen: dict[str, Stored] = {}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def open_orders(self) -> list[Order]:
        return [each for each in self.model.orders.values() if each.state not in FINAL_STATES]

    @initialize(there=st.sets(neurons) | st.just(set(NEURONS)))
    def begin(self, there: set[str]) -> None:
        self.do(self.store.begin(NEURONS, places=PLACES))
        for neuron_id in sorted(there):
            self.connect(neuron_id, False, 0)

    # ---- operators

    @rule(
        neuron_id=neurons,
        priority=st.integers(0, 9),
        control=st.sampled_from([False, False, False, True]),
        attempts=st.sampled_from([1, 2, 3, 0]),
        later=st.sampled_from([False, False, True]),
        limited=st.booleans(),
        lives=st.sampled_from([20, 20, 20, 0, 1, 3]),
        at_once=st.sampled_from([True, True, False]),
    )
    def issue(
        self,
        *,
        neuron_id: str,
        priority: int,
        control: bool,
        attempts: int,
        later: bool,
        limited: bool,
        lives: int,
        at_once: bool,
    ) -> None:
        order = self.model.order(
            neuron_id,
            priority=priority,
            control=control,
            attempts=attempts,
            later=later,
            limited=limited,
            lives=lives,
        )
        order.command_id = self.do(self.store.issue(order, self.model.now))
        self.model.orders[order.command_id] = order
        if at_once:
            self.claim({neuron_id}, 0)

    @rule(
        chosen=st.sets(neurons, min_size=1),
        most=st.sampled_from([0, 1, 1, 2]),
        attempts=st.sampled_from([0, 1, 2]),
        lives=st.sampled_from([1, 20]),
    )
    def issue_batch(self, chosen: set[str], most: int, attempts: int, lives: int) -> None:
        template = self.model.order("", attempts=attempts, lives=lives)
        batch_id, made = self.do(
            self.store.issue_batch(template, sorted(chosen), most, self.model.now)
        )
        self.model.batches[batch_id] = Batch(batch_id, most, holding=most > 0)
        for neuron_id, command_id in made:
            order = self.model.order(neuron_id, attempts=attempts, lives=lives)
            order.command_id, order.batch_id, order.held = command_id, batch_id, most > 0
            self.model.orders[command_id] = order

    @precondition(lambda self: self.open_orders())
    @rule(
        number=which,
        whole_batch=st.sampled_from([False, False, False, True]),
        then=st.sampled_from(["claim", "answer lost", "nothing"]),
    )
    def cancel(self, number: int, whole_batch: bool, then: str) -> None:
        order = self.open_orders()[number % len(self.open_orders())]
        self.cancel_it(order, whole_batch)
        if then != "nothing":
            self.dispatch({order.neuron_id}, then)

    def cancel_it(self, order: Order, whole_batch: bool) -> None:
        if whole_batch and order.batch_id is not None:
            self.do(self.store.cancel_batch(order.batch_id))
            self.model.cancel_batch(order.batch_id)
            return
        self.do(self.store.cancel(order.command_id))
        self.model.cancel([order])

    # ---- neurons come and go

    @precondition(lambda self: self.open_orders())
    @rule(neuron_id=neurons, how=st.sampled_from(COMES_AND_GOES), number=which)
    def come_or_go(self, neuron_id: str, how: str, number: int) -> None:
        match how:
            case "connect" | "connect, all forgotten":
                self.connect(neuron_id, how != "connect", number)
            case _:
                self.disconnect(neuron_id, how)

    def connect(self, neuron_id: str, forgets: bool, number: int) -> None:
        neuron = self.neurons[neuron_id]
        if forgets:
            neuron.forget()
        running = neuron.given[: number % (len(neuron.given) + 1)]
        epoch, mark, astray = self.do(
            self.store.open_session(neuron_id, neuron.spool, neuron.sequence, running)
        )
        expected = self.model.open_session(neuron_id, neuron.spool, neuron.sequence, running)
        station = self.model.stations[neuron_id]
        assert (epoch, mark) == (station.epoch, station.marks.get(neuron.spool, 0))
        assert set(astray) == expected
        neuron.unacked = [each for each in neuron.unacked if each[0] > mark]
        # What it has is given to it: that an acceptance is not stored yet does not matter.
        self.given_in |= {(neuron_id, epoch, command_id) for command_id, _ in running}

    def disconnect(self, neuron_id: str, how: str) -> None:
        station = self.model.stations[neuron_id]
        epoch = station.epoch - (how == "late")
        self.do(self.store.close(neuron_id, epoch, offline=how == "goodbye"))
        if station.open and how != "late":
            self.model.close_session(neuron_id, offline=how == "goodbye")

    @precondition(lambda self: any(each.neuron_id == PULLS for each in self.open_orders()))
    @rule(
        process=st.sampled_from("aab"),
        most=st.integers(1, 3),
        number=which,
        begins=st.booleans(),
    )
    def pull(self, process: str, most: int, number: int, *, begins: bool = True) -> None:
        neuron_id = PULLS
        neuron = self.neurons[neuron_id]
        running = neuron.given[: number % (len(neuron.given) + 1)]
        known = 0 if begins else self.known_epochs.get(process, 0)
        answer = self.do(self.store.pull(neuron_id, process, known, running, most))
        assert (answer is not None) == self.model.open_lease(neuron_id, process, known)
        if answer is None:
            return
        epoch, given, told = answer
        expected = self.model.pull(neuron_id, running, most)
        assert (given, set(told)) == (expected[0], set(expected[1]))
        assert epoch == self.model.stations[neuron_id].epoch
        if number % 4:  # else the answer is lost on its way
            self.known_epochs[process] = epoch
            self.receive(neuron_id, epoch, given, told)

    # ---- to the neurons

    @precondition(lambda self: self.open_orders())
    @rule(
        chosen=st.sets(neurons, min_size=1),
        how=st.sampled_from(["claim", "claim", "stale", "answer lost", "answer lost", "scan"]),
    )
    def dispatch(self, chosen: set[str], how: str) -> None:
        match how:
            case "claim" | "stale":
                self.claim(chosen, int(how == "stale"))
            case "answer lost":
                self.claim_whose_answer_is_lost(min(chosen))
            case _:
                self.scan()

    def claim(self, chosen: set[str], stale: int) -> None:
        streams = [self.model.stations[each] for each in sorted(chosen)]
        sessions = [(each.neuron_id, each.epoch - stale) for each in streams if not each.process]
        for neuron_id, epoch, given, told in self.claimed(sessions):
            self.receive(neuron_id, epoch, given, told)
        self.doubtful.difference_update(sessions)

    def claim_whose_answer_is_lost(self, neuron_id: str) -> None:
        if not self.model.stations[neuron_id].process:
            session = (neuron_id, self.model.stations[neuron_id].epoch)
            self.claimed([session])
            self.doubtful.add(session)

    def scan(self) -> None:
        """What nobody told of is found: for all other streams there is nothing."""
        found = set(self.do(self.store.neurons_with_work()))
        found |= {neuron_id for neuron_id, _ in self.doubtful}
        others = [each for each in self.model.stations.values() if each.neuron_id not in found]
        streams = [(each.neuron_id, each.epoch) for each in others if each.open]
        for neuron_id, _, given, told in self.claimed(streams):
            assert not given, neuron_id
            assert not told, neuron_id
        if found:
            self.claim(found, 0)

    def claimed(
        self, sessions: list[tuple[str, int]]
    ) -> list[tuple[str, int, list[AttemptId], list[AttemptId]]]:
        doubtful = self.doubtful.intersection(sessions)
        before = {neuron_id: self.model.due(neuron_id) for neuron_id, _ in sessions}
        answers = self.do(self.store.claim(sessions, doubtful))
        for neuron_id, epoch in sessions:
            given, told = answers[neuron_id]
            expected = self.model.claim(neuron_id, epoch, doubtful=(neuron_id, epoch) in doubtful)
            assert (given, set(told)) == (expected[0], set(expected[1]))
            taken = {command_id for command_id, _ in given}
            self.nobody_was_passed_over(before[neuron_id], taken)
        return [(neuron_id, epoch, *answers[neuron_id]) for neuron_id, epoch in sessions]

    def nobody_was_passed_over(self, due: list[Order], taken: set[str]) -> None:
        normal = [order for order in due if not order.control]
        lowest = min((each.priority for each in normal if each.command_id in taken), default=9)
        assert all(each.priority <= lowest for each in normal if each.command_id not in taken)

    def receive(
        self, neuron_id: str, epoch: int, given: list[AttemptId], told: list[AttemptId]
    ) -> None:
        """The answer of a claim has arrived, and is passed on as the dispatcher does it."""
        neuron = self.neurons[neuron_id]
        neuron.told += told
        for of in given:
            once = self.model.orders[of[0]].once
            if once and (neuron_id, epoch, of[0]) in self.given_in:
                continue
            self.given_in.add((neuron_id, epoch, of[0]))
            self.handed_out[of[0]] += once
            assert self.handed_out[of[0]] <= 1, "handed out twice"
            if of not in neuron.given:
                neuron.given.append(of)

    # ---- from the neurons

    @precondition(lambda self: any(each.given for each in self.neurons.values()))
    @rule(
        number=which,
        change=st.sampled_from(["accepted", "progressed", "finished", "finished", "all"]),
        end=ends,
        shift=st.sampled_from([0, 0, 0, 0, 1, -1]),
        at_once=st.booleans(),
    )
    def say(self, *, number: int, change: str, end: str, shift: int, at_once: bool) -> None:
        """A neuron notes what became of an attempt that it was given, or of another one."""
        given = [(each, of) for each in self.neurons.values() for of in each.given]
        neuron, (command_id, attempt) = given[number % len(given)]
        of = (command_id, attempt + shift)
        error = CommandError("EXPIRED", "") if end == "REJECTED" and number % 2 else None
        finished = Finished(CommandState(end), None, error, None, "")
        if change in {"accepted", "all"}:
            neuron.say(of, Accepted())
        if change in {"progressed", "all"}:
            neuron.say(of, Progressed(0.5, ""))
        if change in {"finished", "all"}:
            neuron.say(of, finished)
        if at_once:
            self.send_what_is_noted(neuron, self.model.stations[neuron.neuron_id].epoch, acked=True)

    @precondition(lambda self: any(each.told for each in self.neurons.values()))
    @rule(number=which)
    def answer_cancels(self, number: int) -> None:
        waiting = [each for each in self.neurons.values() if each.told]
        neuron = waiting[number % len(waiting)]
        for of in neuron.told:
            neuron.say(of, Finished(CommandState.CANCELLED, None, None, None, ""))
        neuron.told = []

    @precondition(lambda self: any(each.unacked for each in self.neurons.values()))
    @rule(number=which, acked=st.sampled_from([True, True, False]), old=st.sampled_from([0, 0, 1]))
    def send(self, number: int, acked: bool, old: int) -> None:
        """What a neuron has noted arrives, perhaps on a session that is over."""
        talking = [each for each in self.neurons.values() if each.unacked]
        neuron = talking[number % len(talking)]
        epoch = max(self.model.stations[neuron.neuron_id].epoch - old, 1)
        self.send_what_is_noted(neuron, epoch, acked=acked)

    def send_what_is_noted(self, neuron: Neuron, epoch: int, *, acked: bool) -> None:
        station = self.model.stations[neuron.neuron_id]
        fenced, mark = self.do(
            self.store.ingest(neuron.neuron_id, epoch, neuron.spool, neuron.unacked)
        )
        assert fenced == (epoch != station.epoch)
        if fenced:
            return
        for sequence, update in neuron.unacked:
            if sequence > station.marks.get(neuron.spool, 0):
                station.marks[neuron.spool] = sequence
                self.model.update(neuron.neuron_id, update)
        assert mark == neuron.unacked[-1][0]
        if acked:
            neuron.unacked = []

    # ---- time, and those who act on it

    @precondition(lambda self: self.open_orders())
    @rule(steps=st.sampled_from([0, 0, 0, 1, 1, 2, 3]), sweeps=st.permutations(SWEEPS), upto=which)
    def time_passes_and_somebody_sweeps(self, steps: int, sweeps: Sequence[str], upto: int) -> None:
        self.model.advance(steps)
        self.do(self.store.advance(steps))
        for sweep in sweeps[: upto % (len(SWEEPS) + 1)]:
            self.do(getattr(self.store, sweep)())
            getattr(self.model, sweep)()

    @precondition(lambda self: any(each.holding for each in self.model.batches.values()))
    @rule()
    def release(self) -> None:
        assert self.do(self.store.release()) == self.model.release()

    # ---- what must hold after each step

    @invariant()
    def the_ledger_is_as_the_model_says(self) -> None:
        found = self.do(self.store.read())
        for command_id, order in self.model.orders.items():
            assert found[command_id].standing == order.standing(), order
        assert found.keys() == self.model.orders.keys()
        for command_id, stored in found.items():
            follows(self.seen.get(command_id), stored)
        self.seen = found

    @invariant()
    def nobody_has_more_than_there_is_room_for(self) -> None:
        busy = [order for order in self.model.orders.values() if order.with_neuron]
        of_neurons = Counter(order.neuron_id for order in busy if not order.control)
        assert all(number <= PLACES for number in of_neurons.values())
        of_batches = Counter(order.batch_id for order in busy)
        for batch in self.model.batches.values():
            assert of_batches[batch.batch_id] <= (batch.max_in_flight or len(busy))

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.everything_ends()

    def everything_ends(self) -> None:
        """All neurons come with streams, and answer all that they are given."""
        for neuron_id in NEURONS:
            self.connect(neuron_id, False, 0)
        for _ in range(ROUNDS_TO_THE_END):
            self.do(self.store.release())
            self.model.release()
            self.scan()
            for neuron in self.neurons.values():
                for of in neuron.given:
                    neuron.say(of, Finished(CommandState.SUCCEEDED, {}, None, None, ""))
                neuron.given = []
            while any(each.told for each in self.neurons.values()):
                self.answer_cancels(0)
            while any(each.unacked for each in self.neurons.values()):
                self.send(0, True, 0)
            self.time_passes_and_somebody_sweeps(1, SWEEPS, len(SWEEPS))
            self.the_ledger_is_as_the_model_says()
            if not self.open_orders():
                return
        raise AssertionError(f"stuck: {self.open_orders()}")


def follows(before: Stored | None, now: Stored) -> None:
    """Whether a command may look like this after it has looked like that."""
    steps = now.history
    assert (steps[0].state, steps[0].attempt) == (CommandState.QUEUED, 0)
    for earlier, later in pairwise(steps):
        assert later.state in TRANSITIONS[earlier.state]
        assert earlier.revision < later.revision
        assert earlier.attempt <= later.attempt <= now.max_attempts
    assert (steps[-1].state, steps[-1].attempt) == (now.standing.state, now.standing.attempt)
    assert steps[-1].revision <= now.revision
    if before is not None:
        assert steps[: len(before.history)] == before.history
        assert before.revision <= now.revision
        if before.standing.state in FINAL_STATES:
            assert (now.revision, now.standing.state) == (before.revision, before.standing.state)
