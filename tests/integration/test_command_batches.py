"""The same command for many neurons, over real gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from federation.v1 import command_pb2, command_service_pb2, fleet_service_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as session_pb2
from federation.v1.command_service_pb2 import CommandSpec
from federation.v1.errors_pb2 import ErrorReason
from federation_server.live import watchers
from tests.support.calls import State
from tests.support.federation import BareNeuron, Federation, running
from tests.support.servers import refusal
from tests.support.waiting import eventually

STRICT: dict[str, Any] = {
    "type": "object",
    "properties": {"limit": {"type": "integer"}},
    "required": ["limit"],
}


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


async def batch(
    federation: Federation, wanted: str = 'neuron_id = "*"', *, data: Any = None, **fields: Any
) -> command_service_pb2.IssueCommandBatchResponse:
    request = command_service_pb2.IssueCommandBatchRequest(
        filter=wanted, command=CommandSpec(type="run"), **fields
    )
    if data is not None:
        request.command.data.update(data)
    return await federation.command.IssueCommandBatch(request, metadata=federation.admin)


async def shown(federation: Federation, batch_id: str) -> command_pb2.CommandBatch:
    answer = await federation.command.GetCommandBatch(
        command_service_pb2.GetCommandBatchRequest(batch_id=batch_id), metadata=federation.admin
    )
    return answer.batch


async def cancel(federation: Federation, batch_id: str) -> command_pb2.CommandBatch:
    answer = await federation.command.CancelCommandBatch(
        command_service_pb2.CancelCommandBatchRequest(batch_id=batch_id, reason="no need"),
        metadata=federation.admin,
    )
    return answer.batch


def counts(of: command_pb2.CommandBatch) -> dict[str, int]:
    return {State.Name(each.state).removeprefix("COMMAND_STATE_"): each.count for each in of.counts}


class Crew:
    """Neurons w0, w1, … with a stream each."""

    def __init__(self, neurons: list[BareNeuron]) -> None:
        self.neurons = neurons
        self.waiting: list[tuple[BareNeuron, session_pb2.CommandDelivery]] = []
        self.most = 0

    async def work(self, neuron: BareNeuron) -> None:
        """Takes commands for ever, and leaves each unfinished."""
        while True:
            self.waiting.append((neuron, await neuron.command()))
            self.most = max(self.most, len(self.waiting))

    async def finish_one(self) -> None:
        neuron, delivery = self.waiting.pop(0)
        await neuron.finish(delivery, "SUCCEEDED")


@pytest_asyncio.fixture
async def crew(federation: Federation) -> AsyncIterator[Crew]:
    neurons = []
    async with AsyncExitStack() as stack:
        for number in range(6):
            neuron = BareNeuron(federation, await federation.register(f"w{number}"))
            stack.callback(neuron.call.cancel)
            await neuron.hello()
            neurons.append(neuron)
        crew = Crew(neurons)
        tasks = [asyncio.create_task(crew.work(neuron)) for neuron in neurons]
        yield crew
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_every_neuron_that_matches_gets_the_command(
    federation: Federation, crew: Crew
) -> None:
    answer = await batch(federation, 'neuron_id = "w*" AND NOT neuron_id = "w3"')
    assert list(answer.neuron_ids) == ["w0", "w1", "w2", "w4", "w5"]
    await eventually(lambda: len(crew.waiting) == 5, describe="all have it")
    while crew.waiting:
        await crew.finish_one()

    async def ended() -> command_pb2.CommandBatch | None:
        found = await shown(federation, answer.batch.batch_id)
        return found if found.HasField("end_time") else None

    of = await eventually(ended, describe="the end")
    assert (of.matched_count, of.skipped_count, counts(of)) == (5, 0, {"SUCCEEDED": 5})
    listed = await federation.command.ListCommands(
        command_service_pb2.ListCommandsRequest(
            filter=f'batch_id = "{of.batch_id}" AND state = SUCCEEDED'
        ),
        metadata=federation.admin,
    )
    assert len(listed.commands) == 5


async def test_no_more_are_in_flight_than_the_batch_allows(
    federation: Federation, crew: Crew
) -> None:
    answer = await batch(federation, max_in_flight=2)
    for done in range(6):
        await eventually(lambda: crew.waiting, describe="the next has it")
        now = counts(await shown(federation, answer.batch.batch_id))
        assert now.get("SENT", 0) <= 2
        assert now.get("SUCCEEDED", 0) == done or now.get("SENT", 0) < 2
        await crew.finish_one()

        async def counted(wanted: int = done + 1) -> bool:
            now = counts(await shown(federation, answer.batch.batch_id))
            return now.get("SUCCEEDED", 0) == wanted

        await eventually(counted, describe="it is counted")
    assert crew.most == 2


async def test_a_neuron_that_is_away_takes_no_place_of_a_batch(
    federation: Federation, crew: Crew
) -> None:
    await federation.register("a-away")  # first in the order of ids
    answer = await batch(federation, max_in_flight=1)
    for _ in range(6):
        await eventually(lambda: crew.waiting, describe="the next has it")
        await crew.finish_one()

    async def all_but_one() -> bool:
        now = counts(await shown(federation, answer.batch.batch_id))
        return now == {"QUEUED": 1, "SUCCEEDED": 6}

    await eventually(all_but_one, describe="all that are there")
    explained = await federation.command.ListCommands(
        command_service_pb2.ListCommandsRequest(filter="state = QUEUED"),
        metadata=federation.admin,
    )
    assert [command.neuron_id for command in explained.commands] == ["a-away"]


async def test_a_cancel_stops_all_of_a_batch_at_once(federation: Federation, crew: Crew) -> None:
    answer = await batch(federation, max_in_flight=2)
    await eventually(lambda: len(crew.waiting) == 2, describe="two have it")
    of = await cancel(federation, answer.batch.batch_id)
    assert counts(of) == {"CANCELLING": 2, "CANCELLED": 4}
    assert of.cancel_reason == "no need"
    for neuron, delivery in crew.waiting:
        await neuron.finish(delivery, "CANCELLED")

    async def ended() -> bool:
        return counts(await shown(federation, answer.batch.batch_id)) == {"CANCELLED": 6}

    await eventually(ended, describe="the end")
    assert crew.most == 2
    assert counts(await cancel(federation, answer.batch.batch_id)) == {"CANCELLED": 6}


async def test_a_dry_run_shows_who_would_get_it_and_who_would_not_and_changes_nothing(
    federation: Federation,
) -> None:
    strict = neuron_pb2.CommandType(type="run")
    strict.data_schema.update(STRICT)
    await federation.register("fits")
    await federation.register("other", command_types=[neuron_pb2.CommandType(type="walk")])
    await federation.register("strict", command_types=[strict])
    await federation.register("shut")
    await federation.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="shut"), metadata=federation.admin
    )
    answer = await batch(federation, dry_run=True, data={"limit": "many"})
    assert (answer.batch.batch_id, answer.batch.matched_count) == ("", 4)
    assert list(answer.neuron_ids) == ["fits"]
    skipped = {each.neuron_id: ErrorReason.Name(each.reason) for each in answer.skipped_neurons}
    assert skipped == {
        "other": "ERROR_REASON_COMMAND_TYPE_NOT_ADVERTISED",
        "shut": "ERROR_REASON_NEURON_DEACTIVATED",
        "strict": "ERROR_REASON_INVALID_FIELD",
    }
    listed = await federation.command.ListCommandBatches(
        command_service_pb2.ListCommandBatchesRequest(), metadata=federation.admin
    )
    assert list(listed.batches) == []


async def test_a_batch_for_nobody_is_refused(federation: Federation) -> None:
    _, reason, _ = await refusal(batch(federation, 'type = "none"'))
    assert reason == "NO_NEURON_MATCHES"
    await federation.register("n", command_types=[neuron_pb2.CommandType(type="walk")])
    _, reason, _ = await refusal(batch(federation))
    assert reason == "NO_NEURON_MATCHES"


async def test_every_bad_field_of_a_batch_is_named(federation: Federation) -> None:
    request = command_service_pb2.IssueCommandBatchRequest(
        command=CommandSpec(neuron_id="n", type="Bad Type"), max_in_flight=10_001
    )
    call = federation.command.IssueCommandBatch(request, metadata=federation.admin)
    _, _, fields = await refusal(call)
    assert set(fields) == {"filter", "command.neuron_id", "command.type", "max_in_flight"}
    _, _, fields = await refusal(batch(federation, "type = = x"))
    assert set(fields) == {"filter"}


async def test_the_same_request_gives_the_same_batch(federation: Federation) -> None:
    await federation.register("n")
    request_id = str(uuid.uuid4())
    first = await batch(federation, request_id=request_id)
    again = await batch(federation, request_id=request_id)
    assert again.batch == first.batch
    _, reason, _ = await refusal(batch(federation, request_id=request_id, max_in_flight=3))
    assert reason == "REQUEST_ID_REUSED"


async def test_a_watched_batch_shows_how_far_it_is_and_ends_with_it(
    federation: Federation, crew: Crew
) -> None:
    answer = await batch(federation)
    call = federation.command.WatchCommandBatch(
        command_service_pb2.WatchCommandBatchRequest(batch_id=answer.batch.batch_id),
        metadata=federation.admin,
    )
    steps = aiter(call)
    assert sum(counts((await anext(steps)).batch).values()) == 6
    await eventually(lambda: len(crew.waiting) == 6, describe="all have it")
    while crew.waiting:
        await crew.finish_one()
    last = [step.batch async for step in steps][-1]
    assert (counts(last), last.HasField("end_time")) == ({"SUCCEEDED": 6}, True)


async def test_a_watched_batch_ends_when_its_last_command_does_with_no_look_in_between(
    federation: Federation, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "LOOK_INTERVAL_S", 3600.0)
    answer = await batch(federation)
    call = federation.command.WatchCommandBatch(
        command_service_pb2.WatchCommandBatchRequest(batch_id=answer.batch.batch_id),
        metadata=federation.admin,
    )
    steps = aiter(call)
    assert not (await anext(steps)).batch.HasField("end_time")
    await eventually(lambda: len(crew.waiting) == 6, describe="all have it")
    while crew.waiting:
        await crew.finish_one()
    async with asyncio.timeout(20):
        rest = [step.batch async for step in steps]
    assert [counts(step) for step in rest] == [{"SUCCEEDED": 6}]


async def test_a_cancel_of_a_batch_ends_those_who_watch_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "LOOK_INTERVAL_S", 3600.0)
    await federation.register("away")
    answer = await batch(federation)
    call = federation.command.WatchCommandBatch(
        command_service_pb2.WatchCommandBatchRequest(batch_id=answer.batch.batch_id),
        metadata=federation.admin,
    )
    steps = aiter(call)
    await anext(steps)
    await cancel(federation, answer.batch.batch_id)
    async with asyncio.timeout(20):
        assert [counts(step.batch) async for step in steps] == [{"CANCELLED": 1}]


async def test_a_server_that_shuts_down_sends_those_home_who_watch_a_batch(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "LOOK_INTERVAL_S", 3600.0)
    await federation.register("away")
    answer = await batch(federation)
    call = federation.command.WatchCommandBatch(
        command_service_pb2.WatchCommandBatchRequest(batch_id=answer.batch.batch_id),
        metadata=federation.admin,
    )
    await call.read()
    draining = asyncio.create_task(federation.app.drain())
    _, reason, _ = await refusal(call.read())
    assert reason == "SERVER_DRAINING"
    await draining


@pytest.mark.parametrize("call", ["Get", "Watch", "Cancel"])
async def test_an_unknown_batch_is_not_found(federation: Federation, call: str) -> None:
    request = getattr(command_service_pb2, f"{call}CommandBatchRequest")(batch_id="nothing")
    rpc = getattr(federation.command, f"{call}CommandBatch")(request, metadata=federation.admin)
    _, reason, _ = await refusal(rpc.read() if call == "Watch" else rpc)
    assert reason == "COMMAND_BATCH_NOT_FOUND"


async def test_batches_are_listed_newest_first_page_by_page(federation: Federation) -> None:
    await federation.register("n")
    ids = [(await batch(federation)).batch.batch_id for _ in range(3)]
    found: list[str] = []
    token = ""
    for _ in range(2):
        answer = await federation.command.ListCommandBatches(
            command_service_pb2.ListCommandBatchesRequest(page_size=2, page_token=token),
            metadata=federation.admin,
        )
        found += [each.batch_id for each in answer.batches]
        token = answer.next_page_token
    assert (found, token) == (ids[::-1], "")
