"""The store's ledger against a model of it, on random histories and a real PostgreSQL.

Hypothesis chooses the steps: commands are issued, sent, answered, cancelled, timed out, by neurons
that come and go, with streams and without, that repeat themselves, speak of attempts that are over
and lose their journals. `tests/support/ledger_machine.py` says what must hold. What random steps
meet too rarely is told below in histories of their own.

LEDGER_EXAMPLES is how many histories are tried; they are the same ones each time unless it is set.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from federation_server.domain.command import Accepted, Finished, Progressed
from federation_server.domain.command import CommandState as S
from tests.support.ledger_machine import PULLS, STREAMS, Ledger
from tests.support.ledger_model import AttemptId
from tests.support.ledger_store import LedgerStore

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "0"))
STEPS = 40


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        yield runner


@pytest.fixture
def store(runner: asyncio.Runner, database_url: str) -> Iterator[LedgerStore]:
    store = LedgerStore(database_url)
    yield store
    runner.run(store.close_all())


@pytest.mark.timeout(0 if EXAMPLES else 600)  # a failure is made small before it is shown
def test_the_ledger_does_what_its_model_says_and_every_command_ends(
    runner: asyncio.Runner, store: LedgerStore
) -> None:
    run_state_machine_as_test(
        lambda: Ledger(runner, store),  # type: ignore[arg-type]  # a factory will do
        settings=settings(
            max_examples=EXAMPLES or 120,
            stateful_step_count=STEPS,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- histories of commands that may run once: when is one lost?


@pytest.fixture
def ledger(runner: asyncio.Runner, store: LedgerStore) -> Ledger:
    """No neuron has come yet."""
    ledger = Ledger(runner, store)
    ledger.begin(set())
    return ledger


def issue_once(ledger: Ledger, neuron_id: str) -> str:
    ledger.issue(
        neuron_id=neuron_id,
        priority=5,
        control=False,
        attempts=0,
        later=False,
        limited=False,
        lives=20,
        at_once=False,
    )
    return list(ledger.model.orders)[-1]


def sweep(ledger: Ledger) -> None:
    """Ends what is lost."""
    ledger.time_passes_and_somebody_sweeps(0, ["give_up_lost"], 1)


def states(ledger: Ledger) -> list[S]:
    """All commands', in the order of their issue; both books agree."""
    ledger.the_ledger_is_as_the_model_says()
    return [order.state for order in ledger.model.orders.values()]


def test_what_may_run_once_is_not_given_up_before_its_neuron_has_said_what_it_had_noted(
    ledger: Ledger,
) -> None:
    neuron = ledger.neurons[STREAMS]
    issue_once(ledger, STREAMS)
    issue_once(ledger, STREAMS)
    ledger.connect(STREAMS, forgets=False, number=0)
    ledger.claim({STREAMS}, 0)
    ended, _never_seen = neuron.given
    neuron.say(ended, Finished(S.SUCCEEDED, {}, None, None, ""))
    ledger.connect(STREAMS, forgets=False, number=0)  # it has neither of them any more
    sweep(ledger)
    assert states(ledger) == [S.SENT, S.SENT]
    ledger.send(0, acked=True, old=0)
    assert states(ledger) == [S.SUCCEEDED, S.SENT]
    sweep(ledger)
    assert states(ledger) == [S.SUCCEEDED, S.OUTCOME_UNKNOWN]


@pytest.mark.parametrize(
    ("heard", "by_the_same", "by_another"),
    [
        # The same process: what it never spoke of was lost on its way to it, all else it has had.
        ("nothing", S.OUTCOME_UNKNOWN, S.OUTCOME_UNKNOWN),
        ("accepted", S.ACCEPTED, S.OUTCOME_UNKNOWN),
        ("progressed", S.RUNNING, S.OUTCOME_UNKNOWN),
        ("accepted, cancelled", S.CANCELLING, S.CANCELLING),
    ],
)
@pytest.mark.parametrize("process", ["the same", "another"])
def test_what_may_run_once_is_lost_to_a_process_that_cannot_have_it_and_to_no_other(
    ledger: Ledger, process: str, heard: str, by_the_same: S, by_another: S
) -> None:
    neuron = ledger.neurons[PULLS]
    command_id = issue_once(ledger, PULLS)
    ledger.pull("the same", most=1, number=1)
    of: AttemptId = (command_id, 1)
    assert neuron.given == [of]
    for word in heard.split(", "):
        match word:
            case "accepted":
                neuron.say(of, Accepted())
                ledger.send(0, acked=True, old=0)
            case "progressed":
                neuron.say(of, Progressed(0.5, ""))
                ledger.send(0, acked=True, old=0)
            case "cancelled":
                ledger.cancel_it(ledger.model.orders[command_id], whole_batch=False)
    ledger.pull(process, most=1, number=0)  # and names nothing
    assert states(ledger) == [by_the_same if process == "the same" else by_another]
