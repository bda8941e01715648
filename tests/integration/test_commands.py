"""Commands over real gRPC: issued, delivered, followed, refused."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from federation.v1 import command_pb2, command_service_pb2, fleet_service_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.command_pb2 import CommandState
from tests.support.federation import BareNeuron, Federation, connected, running
from tests.support.waiting import eventually

SCHEMA = {
    "type": "object",
    "properties": {"limit": {"type": "integer", "minimum": 1}, "source": {"type": "string"}},
    "required": ["source"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


def struct(value: dict[str, object]) -> Struct:
    return ParseDict(value, Struct())


def spec(
    neuron_id: str = "n", command_type: str = "run", **fields: Any
) -> command_service_pb2.CommandSpec:
    return command_service_pb2.CommandSpec(neuron_id=neuron_id, type=command_type, **fields)


async def issue(
    federation: Federation, command: command_service_pb2.CommandSpec, **fields: Any
) -> command_pb2.Command:
    answer = await federation.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=command, **fields),
        metadata=federation.admin,
    )
    return answer.command


async def get(federation: Federation, command_id: str) -> command_pb2.Command:
    answer = await federation.command.GetCommand(
        command_service_pb2.GetCommandRequest(command_id=command_id), metadata=federation.admin
    )
    return answer.command


async def delivered(neuron: BareNeuron) -> pb.CommandDelivery:
    while True:
        message = await neuron.receive()
        if message.HasField("command"):
            return message.command


def details(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    """The reason of an error and the fields that it names."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # the stub knows sync calls only
    assert isinstance(status, status_pb2.Status)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info) or detail.Unpack(request)
    return info.reason, [violation.field for violation in request.field_violations]


async def answer(
    neuron: BareNeuron, sequence: int, command: pb.CommandDelivery, **update: Any
) -> None:
    await neuron.send(
        sequence=sequence,
        command_update=pb.CommandUpdate(
            command_id=command.command_id, attempt=command.attempt, **update
        ),
    )


async def test_a_command_goes_its_whole_way_and_its_stream_shows_every_step(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        stream = federation.command.ExecuteCommand(
            command_service_pb2.ExecuteCommandRequest(command=spec(data=struct({"rows": 3}))),
            metadata=federation.admin,
        )
        command = await delivered(neuron)
        assert (command.type, command.attempt, dict(command.data)) == ("run", 1, {"rows": 3.0})
        await answer(neuron, 1, command, accepted=pb.CommandAccepted())
        await answer(
            neuron, 2, command, progressed=pb.CommandProgressed(fraction=0.5, message="half")
        )
        await neuron.acked(2)
        finished = pb.CommandFinished(
            state=CommandState.COMMAND_STATE_SUCCEEDED, response=struct({"done": True})
        )
        await answer(neuron, 3, command, finished=finished)
        seen = [response.command async for response in stream]
    assert seen[-1].state == CommandState.COMMAND_STATE_SUCCEEDED
    assert dict(seen[-1].response) == {"done": True}
    steps = [step.state for shown in seen for step in shown.transitions]
    assert steps == [
        CommandState.COMMAND_STATE_QUEUED,
        CommandState.COMMAND_STATE_SENT,
        CommandState.COMMAND_STATE_ACCEPTED,
        CommandState.COMMAND_STATE_RUNNING,
        CommandState.COMMAND_STATE_SUCCEEDED,
    ]
    stored = await get(federation, command.command_id)
    assert [step.state for step in stored.transitions] == steps
    assert (stored.issuer, stored.progress.message) == ("admin-env", "half")


async def test_a_neuron_that_is_away_gets_its_command_when_it_returns(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    issued = await issue(federation, spec())
    assert issued.state == CommandState.COMMAND_STATE_QUEUED
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    assert (await delivered(neuron)).command_id == issued.command_id
    neuron.call.cancel()


async def test_a_command_whose_stream_broke_is_sent_again_with_the_same_attempt(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    first = BareNeuron(federation, token)
    await first.hello()
    await issue(federation, spec())
    before = await delivered(first)
    first.call.cancel()
    second = BareNeuron(federation, token)
    await second.hello()
    again = await delivered(second)
    assert again.expire_after.ToTimedelta() < before.expire_after.ToTimedelta()
    again.expire_after.CopyFrom(before.expire_after)
    assert again == before
    second.call.cancel()


async def test_a_command_that_the_neuron_says_is_running_is_not_sent_again(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    first = BareNeuron(federation, token)
    await first.hello()
    await issue(federation, spec())
    running_one = await delivered(first)
    first.call.cancel()
    second = BareNeuron(federation, token)
    await second.hello(running=[pb.RunningCommand(command_id=running_one.command_id, attempt=1)])
    marker = await issue(federation, spec())
    assert (await delivered(second)).command_id == marker.command_id
    second.call.cancel()


async def test_a_command_to_an_unknown_neuron_is_not_found(federation: Federation) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await issue(federation, spec("nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)[0] == "NEURON_NOT_FOUND"


async def test_an_unadvertised_type_is_refused_unless_that_is_allowed(
    federation: Federation,
) -> None:
    await federation.register("n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await issue(federation, spec(command_type="explode"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(caught.value)[0] == "COMMAND_TYPE_NOT_ADVERTISED"
    allowed = await issue(federation, spec(command_type="explode", allow_unadvertised=True))
    assert allowed.state == CommandState.COMMAND_STATE_QUEUED


async def test_data_that_does_not_fit_the_schema_is_refused_field_by_field(
    federation: Federation,
) -> None:
    run = neuron_pb2.CommandType(type="run", data_schema=struct(SCHEMA))
    await federation.register("n", command_types=[run])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await issue(federation, spec(data=struct({"limit": 0, "colour": "red"})))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    reason, fields = details(caught.value)
    assert reason == "INVALID_FIELD"
    assert {"command.data.limit", "command.data.source"} <= set(fields)
    good = await issue(federation, spec(data=struct({"limit": 1, "source": "s3"})))
    assert good.command_id


async def test_every_bad_field_of_a_command_is_named(federation: Federation) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await issue(federation, spec("", "Bad Type", priority=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert set(details(caught.value)[1]) == {
        "command.neuron_id",
        "command.type",
        "command.priority",
    }


async def test_the_same_request_id_gives_the_same_command(federation: Federation) -> None:
    await federation.register("n")
    request_id = str(uuid.uuid4())
    first = await issue(federation, spec(), request_id=request_id)
    again = await issue(federation, spec(), request_id=request_id)
    assert again.command_id == first.command_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await issue(federation, spec(priority=9), request_id=request_id)
    assert details(caught.value)[0] == "REQUEST_ID_REUSED"


async def test_a_repeated_request_finds_its_command_whatever_has_become_of_the_neuron_and_the_time(
    federation: Federation,
) -> None:
    await federation.register("n")
    request_id, wanted = str(uuid.uuid4()), spec()
    wanted.expire_time.FromMilliseconds(round((time.time() + 1.0) * 1000))
    first = await issue(federation, wanted, request_id=request_id)
    await federation.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    await eventually(lambda: time.time() > wanted.expire_time.ToMilliseconds() / 1000)
    again = await issue(federation, wanted, request_id=request_id)
    assert again.command_id == first.command_id


async def test_a_dry_run_checks_everything_and_changes_nothing(federation: Federation) -> None:
    await federation.register("n")
    shown = await issue(federation, spec(priority=7), dry_run=True)
    assert (shown.command_id, shown.priority) == ("", 7)
    listed = await federation.command.ListCommands(
        command_service_pb2.ListCommandsRequest(), metadata=federation.admin
    )
    assert list(listed.commands) == []


async def test_commands_are_listed_by_filter_order_and_page(federation: Federation) -> None:
    await federation.register("n")
    issued = [await issue(federation, spec(priority=number)) for number in (1, 9, 5)]
    ids = [command.command_id for command in issued]

    async def page(**request: Any) -> command_service_pb2.ListCommandsResponse:
        return await federation.command.ListCommands(
            command_service_pb2.ListCommandsRequest(**request), metadata=federation.admin
        )

    assert [c.command_id for c in (await page()).commands] == ids[::-1]
    first = await page(order_by="priority desc", page_size=2)
    assert [c.priority for c in first.commands] == [9, 5]
    second = await page(order_by="priority desc", page_size=2, page_token=first.next_page_token)
    assert ([c.priority for c in second.commands], second.next_page_token) == ([1], "")
    some = await page(filter="priority > 4 AND state = QUEUED")
    assert [c.priority for c in some.commands] == [5, 9]
    for bad in ({"filter": "colour = red"}, {"order_by": "colour"}, {"page_token": "x"}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await page(**bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await page(page_token=first.next_page_token)
    assert details(caught.value)[0] == "PAGE_TOKEN_INVALID"


async def test_an_expired_command_ends_its_watchers_stream(federation: Federation) -> None:
    await federation.register("n")
    command = spec()
    command.expire_time.GetCurrentTime()
    command.expire_time.seconds += 2
    stream = federation.command.ExecuteCommand(
        command_service_pb2.ExecuteCommandRequest(command=command), metadata=federation.admin
    )
    async with asyncio.timeout(20):
        seen = [response.command.state async for response in stream]
    assert seen[-1] == CommandState.COMMAND_STATE_EXPIRED


async def test_an_unknown_command_id_is_not_found_whatever_it_looks_like(
    federation: Federation,
) -> None:
    for command_id in (str(uuid.uuid4()), "no-uuid"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(federation, command_id)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_command_issued_on_one_server_reaches_a_neuron_on_another(
    database_url: str,
) -> None:
    async with (
        running(database_url) as one,
        running(database_url) as other,
        connected(one, "n") as neuron,
    ):
        stream = other.command.ExecuteCommand(
            command_service_pb2.ExecuteCommandRequest(command=spec()), metadata=other.admin
        )
        command = await delivered(neuron)
        finished = pb.CommandFinished(state=CommandState.COMMAND_STATE_SUCCEEDED)
        await answer(neuron, 1, command, finished=finished)
        async with asyncio.timeout(20):
            seen = [response.command.state async for response in stream]
        assert seen[-1] == CommandState.COMMAND_STATE_SUCCEEDED


async def test_a_neuron_that_moves_to_another_server_is_superseded_on_the_first(
    database_url: str,
) -> None:
    async with running(database_url) as one, running(database_url) as other:
        token = await one.register("n")
        first = BareNeuron(one, token)
        await first.hello()
        second = BareNeuron(other, token)
        await second.hello()
        assert (await first.end())[0] is grpc.StatusCode.ABORTED

        async def gone() -> bool:
            return not len(one.app.sessions)

        await eventually(gone, describe="the first server has let go")
        assert len(other.app.sessions) == 1
        second.call.cancel()
