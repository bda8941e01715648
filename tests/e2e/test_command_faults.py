"""Commands while processes are killed, connections break and PostgreSQL is away.

Servers, neurons and PostgreSQL are real processes. Each neuron writes down each run of each
handler, and after each fault its notes and the ledger must agree (`tests/support/evidence.py`):
every command has ended, no attempt ran twice, nothing that may run once ran twice.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from federation.v1 import command_service_pb2
from tests.support.calls import FINAL, State, command, online, reached, shown
from tests.support.command_faults import (
    ONCE,
    DeafProxy,
    Witness,
    agree,
    deaf_proxy,
    ended,
    issue,
    span,
    witness,
)
from tests.support.evidence import Account
from tests.support.faults import Postgres
from tests.support.federation import Served
from tests.support.processes import FederationProcess
from tests.support.waiting import eventually

RUNNING = State.COMMAND_STATE_RUNNING
SENT = State.COMMAND_STATE_SENT
SETTINGS = {"FEDERATION_COMMAND_LOST_AFTER": "PT2S"}


def outcome(account: Account) -> str:
    """How a command ended, in one word and a number."""
    code = f" {account.error_code}" if account.error_code else ""
    return f"{account.state.value}{code} in {account.attempt}"


# ---- who dies, and when

DONE = "SUCCEEDED in 1"
UNKNOWN = "OUTCOME_UNKNOWN in 1"


class Scene:
    """A witness behind a proxy, a command that may be tried twice, and one that may run once."""

    def __init__(
        self, server: FederationProcess, served: Served, neuron: Witness, between: DeafProxy
    ) -> None:
        self.server = server
        self.served = served
        self.neuron = neuron
        self.between = between
        self.ids: list[str] = []

    async def issue(self, **fields: Any) -> None:
        name = self.neuron.name
        again: dict[str, Any] = {"max_attempts": 2, "retry_backoff": span(0.1)}
        self.ids.append(await issue(self.served, name, "hold", **fields, **again))
        self.ids.append(await issue(self.served, name, "hold", **fields, execution=ONCE))

    async def reached(self, state: int) -> None:
        for command_id in self.ids:
            await reached(self.served, command_id, state)

    async def before_it_is_sent(self) -> None:
        await self.issue(in_s=1.0)

    async def after_it_is_sent(self) -> None:
        self.neuron.freeze()
        await self.issue()
        await self.reached(SENT)

    async def while_it_runs(self) -> None:
        await self.issue()
        await self.reached(RUNNING)

    async def before_its_result_is_acknowledged(self) -> None:
        await self.while_it_runs()
        self.between.deafen()
        self.neuron.release()
        await self.reached(State.COMMAND_STATE_SUCCEEDED)

    async def kill_server(self) -> None:
        await asyncio.to_thread(self.server.kill)
        self.neuron.thaw()
        self.between.hear()
        await asyncio.to_thread(self.server.start)

    async def kill_neuron(self) -> None:
        await asyncio.to_thread(self.neuron.process.kill)
        self.between.hear()
        self.neuron.process.start()


@pytest.mark.parametrize(
    ("victim", "moment", "tried", "once"),
    [
        ("server", "before_it_is_sent", {DONE}, {DONE}),
        # What lay in the neuron's socket it takes; else nobody knows that it did not.
        ("server", "after_it_is_sent", {DONE}, {DONE, UNKNOWN}),
        ("server", "while_it_runs", {DONE}, {DONE}),
        ("server", "before_its_result_is_acknowledged", {DONE}, {DONE}),
        ("neuron", "before_it_is_sent", {DONE}, {DONE}),
        ("neuron", "after_it_is_sent", {DONE}, {UNKNOWN}),
        ("neuron", "while_it_runs", {"SUCCEEDED in 2"}, {"FAILED INTERRUPTED in 1"}),
        ("neuron", "before_its_result_is_acknowledged", {DONE}, {DONE}),
    ],
)
async def test_whoever_is_killed_at_whichever_step_each_command_ends_as_it_must_and_ran_once(  # noqa: PLR0917 - a table
    folder: Path,
    server: FederationProcess,
    served: Served,
    doomed: Postgres,
    victim: str,
    moment: str,
    tried: set[str],
    once: set[str],
) -> None:
    name, token = f"{victim}-{moment}".replace("_", "-"), await served.enrollment_token()
    async with deaf_proxy(server.address) as between:
        with witness(folder, name, between.address, token) as neuron:
            await online(served, name)
            scene = Scene(server, served, neuron, between)
            await getattr(scene, moment)()
            await getattr(scene, f"kill_{victim}")()
            neuron.release()
            accounts = await ended(doomed.url, scene.ids)
            first, second = (accounts[command_id] for command_id in scene.ids)
            agree(accounts, neuron)
            assert outcome(first) in tried, first.told(neuron.notes)
            assert outcome(second) in once, second.told(neuron.notes)


# ---- a flow of commands under a fault that lasts


async def flow(served: Served, name: str, number: int) -> list[str]:
    """Commands of several kinds, one after the other."""
    ids = []
    for place in range(number):
        match place % 4:
            case 0:
                command_id = await issue(served, name, "work", data={"seconds": 0.1})
            case 1:
                command_id = await issue(
                    served, name, "work", data={"seconds": 0.05}, execution=ONCE
                )
            case 2:
                command_id = await issue(
                    served,
                    name,
                    "flaky",
                    data={"failures": 1},
                    max_attempts=3,
                    retry_backoff=span(0.1),
                )
            case _:
                command_id = await issue(served, name, "steps", data={"count": 5}, max_attempts=2)
        ids.append(command_id)
    return ids


async def test_a_stream_that_is_cut_and_stalled_again_and_again_loses_and_doubles_nothing(
    folder: Path, server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token()
    async with deaf_proxy(server.address) as between:
        with witness(folder, "cut", between.address, token) as neuron:
            epoch = (await online(served, "cut")).session.epoch
            ids: list[str] = []
            for cut_bytes in (0, 40, 300, 700, 1500):
                ids += await flow(served, "cut", 8)
                if cut_bytes:
                    between.cut_after(cut_bytes)
                else:
                    between.stall()
                    between.cut()
                    between.go_on()
                epoch = (await online(served, "cut", epoch=epoch + 1)).session.epoch
            accounts = await ended(doomed.url, ids)
            agree(accounts, neuron)
            kept = [each for each in accounts.values() if not each.once]
            assert {each.state.value for each in kept} == {"SUCCEEDED"}


async def hold(served: Served, name: str, **fields: Any) -> list[str]:
    """A command that may be tried again and one that may run once; both run when this returns."""
    ids = [
        await issue(served, name, "hold", max_attempts=2, **fields),
        await issue(served, name, "hold", execution=ONCE, **fields),
    ]
    for command_id in ids:
        await reached(served, command_id, RUNNING)
    return ids


async def queue(served: Served, name: str) -> dict[str, int]:
    """Commands of both kinds for a neuron that has no place for them, and their priorities."""
    ids = {}
    for place, priority in enumerate((1, 8, 3, 8, 5, 0, 9, 5)):
        kind: dict[str, Any] = {"execution": ONCE} if place % 2 else {"max_attempts": 2}
        ids[await issue(served, name, "work", priority=priority, **kind)] = priority
    return ids


async def end_in_vain(neuron: Witness, ids: list[str]) -> None:
    """Lets those commands come to their end, whoever can hear of it."""
    neuron.release()

    def all_ended() -> bool:
        through = {note.command_id for note in neuron.notes if note.event == "ended"}
        return through >= set(ids)

    await eventually(all_ended, describe="the handlers have ended")


async def test_while_postgresql_is_stopped_for_20_s_commands_wait_run_and_end_and_none_runs_twice(
    folder: Path, server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token()
    with (
        witness(folder / "ending", "ending-meanwhile", served.address, token) as ending,
        witness(folder / "lasting", "lasting", served.address, token) as lasting,
        witness(folder / "full", "full", served.address, token, WITNESS_PLACES="1") as full,
    ):
        neurons = (ending, lasting, full)
        epochs = [(await online(served, each.name)).session.epoch for each in neurons]
        # A timer that is over when PostgreSQL returns, of a command that has ended by then.
        over_there = await hold(served, ending.name, progress_timeout=span(10))
        after_it = await hold(served, lasting.name)
        over_there.append(await issue(served, full.name, "hold", priority=9))
        await reached(served, over_there[-1], RUNNING)
        waiting = await queue(served, full.name)
        under_way = await flow(served, ending.name, 12)
        await asyncio.to_thread(doomed.embedded.stop)
        try:
            for neuron in (ending, full):
                held = [each for each in over_there if neuron.began(each)]
                await end_in_vain(neuron, held)
            await asyncio.sleep(20)  # the fault's length, and not a wait for anything
        finally:
            await asyncio.to_thread(doomed.start)
        lasting.release()
        accounts = await ended(doomed.url, [*over_there, *after_it, *waiting, *under_way])
        agree(accounts, *neurons)
        assert {outcome(accounts[each]) for each in over_there + after_it} == {DONE}
        assert {outcome(accounts[each]) for each in waiting} == {DONE}
        assert {accounts[each].state.value for each in under_way} == {"SUCCEEDED"}
        began = [note.command_id for note in full.notes if note.event == "began"]
        order = [waiting[command_id] for command_id in began if command_id in waiting]
        assert order == sorted(order, reverse=True)
        assert epochs == [(await shown(served, each.name)).session.epoch for each in neurons]


async def test_two_processes_with_one_id_never_both_run_what_may_run_once(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token(allow_reenrollment=True)
    with witness(folder, "twin", served.address, token) as older:
        await online(served, "twin")
        ids = await flow(served, "twin", 8)
        held = [await issue(served, "twin", "hold", execution=ONCE) for _ in range(2)]
        for command_id in held:
            await reached(served, command_id, RUNNING)
        with witness(folder / "copy", "twin", served.address, token) as newer:
            await online(served, "twin", epoch=2)
            ids += await flow(served, "twin", 8)
            for each in (older, newer):
                each.release()
            accounts = await ended(doomed.url, [*ids, *held])
            newer.name = "twin's copy"  # it has a journal of its own
            agree(accounts, older, newer)
            for command_id in held:
                assert outcome(accounts[command_id]) == UNKNOWN


@pytest.mark.parametrize("offset_s", [-86_400, 86_400])
async def test_a_neuron_whose_clock_is_a_day_off_does_all_in_time(
    folder: Path, served: Served, doomed: Postgres, offset_s: int
) -> None:
    name = "a-day-late" if offset_s < 0 else "a-day-early"
    token = await served.enrollment_token()
    with witness(folder, name, served.address, token, CLOCK_OFFSET=str(offset_s)) as neuron:
        await online(served, name)
        ids = await flow(served, name, 8)
        too_long = await issue(served, name, "hold", run_timeout=span(0.5))
        later = await issue(served, name, "work", in_s=0.5)
        accounts = await ended(doomed.url, [*ids, too_long, later])
        agree(accounts, neuron)
        states = {command_id: account.state.value for command_id, account in accounts.items()}
        assert states.pop(too_long) == "TIMED_OUT"
        assert set(states.values()) == {"SUCCEEDED"}
        neuron.process.kill()
        neuron.process.start(CLOCK_OFFSET="0")
        await online(served, name, epoch=2)
        again = await ended(doomed.url, await flow(served, name, 4))
        assert {each.state.value for each in again.values()} == {"SUCCEEDED"}


async def test_priorities_hold_over_the_deaths_of_the_neuron_and_the_server(
    folder: Path, server: FederationProcess, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token()
    with witness(folder, "orderly", served.address, token, WITNESS_PLACES="1") as neuron:
        await online(served, "orderly")
        first = await issue(served, "orderly", "hold", max_attempts=3, priority=9)
        await reached(served, first, RUNNING)
        ids = {
            await issue(served, "orderly", "work", priority=priority): priority
            for priority in (1, 8, 3, 8, 5, 0, 9)
        }
        neuron.process.kill()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        neuron.process.start()
        neuron.release()
        accounts = await ended(doomed.url, [first, *ids])
        agree(accounts, neuron)
        began = [note.command_id for note in neuron.notes if note.event == "began"]
        order = [ids[command_id] for command_id in began if command_id in ids]
        assert order == sorted(ids.values(), reverse=True)


# ---- handlers that go wrong


async def test_a_handler_that_takes_the_neuron_with_it_is_tried_again_and_finds_its_checkpoint(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token()
    with witness(folder, "ending", served.address, token) as neuron:
        await online(served, "ending")
        ids = [
            await issue(served, "ending", "ending", max_attempts=2, retry_backoff=span(0.1)),
            await issue(served, "ending", "hold", execution=ONCE),
        ]
        assert await neuron.process.ended() == 3
        neuron.release()
        neuron.process.start()
        accounts = await ended(doomed.url, ids)
        agree(accounts, neuron)
        assert outcome(accounts[ids[0]]) == "SUCCEEDED in 2"
        assert (accounts[ids[0]].response or {})["checkpoint"] == {"died": True}
        assert outcome(accounts[ids[1]]) in {"FAILED INTERRUPTED in 1", UNKNOWN, DONE}


@pytest.mark.parametrize(
    ("kind", "code"), [("apart_ending", "PROCESS_ENDED"), ("huge", "RESPONSE_TOO_LARGE")]
)
async def test_a_handler_that_cannot_answer_fails_in_each_attempt_and_then_for_good(
    folder: Path, served: Served, doomed: Postgres, kind: str, code: str
) -> None:
    name, token = kind.replace("_", "-"), await served.enrollment_token()
    with witness(folder, name, served.address, token) as neuron:
        await online(served, name)
        command_id = await issue(served, name, kind, max_attempts=2, retry_backoff=span(0.1))
        accounts = await ended(doomed.url, [command_id])
        agree(accounts, neuron)
        assert outcome(accounts[command_id]) == f"FAILED {code} in 2"
        assert neuron.began(command_id) == [1, 2]


async def test_a_handler_that_ignores_a_cancel_ends_as_such_and_keeps_its_place_until_it_ends(
    folder: Path, served: Served, doomed: Postgres
) -> None:
    token = await served.enrollment_token()
    with witness(folder, "stubborn", served.address, token, WITNESS_PLACES="1") as neuron:
        await online(served, "stubborn")
        command_id = await issue(served, "stubborn", "stubborn", data={"seconds": 9.0})
        await reached(served, command_id, RUNNING)
        await served.command.CancelCommand(
            command_service_pb2.CancelCommandRequest(command_id=command_id, reason="enough"),
            metadata=served.admin,
        )
        found = await reached(served, command_id, *FINAL)
        assert found.error.code == "CANCEL_IGNORED", MessageToDict(found)
        after = await issue(served, "stubborn", "work")
        accounts = await ended(doomed.url, [command_id, after])
        agree(accounts, neuron)
        assert (await command(served, after)).state == State.COMMAND_STATE_SUCCEEDED
        events = [(note.command_id, note.event) for note in neuron.notes]
        assert events.index((after, "began")) > events.index((command_id, "ended"))
