"""What the end-to-end tests ask a federation, as an operator would, and wait for."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import (
    analytics_service_pb2,
    command_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
)
from tests.support.federation import Served
from tests.support.waiting import eventually

ONLINE = neuron_pb2.PRESENCE_ONLINE
State = command_pb2.CommandState
FINAL = {
    State.COMMAND_STATE_SUCCEEDED,
    State.COMMAND_STATE_FAILED,
    State.COMMAND_STATE_REJECTED,
    State.COMMAND_STATE_TIMED_OUT,
    State.COMMAND_STATE_CANCELLED,
    State.COMMAND_STATE_EXPIRED,
    State.COMMAND_STATE_OUTCOME_UNKNOWN,
}


async def shown(served: Served, name: str) -> neuron_pb2.Neuron:
    answer = await served.fleet.GetNeuron(
        fleet_service_pb2.GetNeuronRequest(neuron_id=name), metadata=served.admin, timeout=10
    )
    return answer.neuron


async def online(served: Served, name: str, *, epoch: int = 1) -> neuron_pb2.Neuron:
    """Waits until the neuron is ONLINE in that session or a later one."""

    async def look() -> neuron_pb2.Neuron | None:
        try:
            found = await shown(served, name)
        except grpc.aio.AioRpcError:
            return None
        there = found.presence == ONLINE and found.session.open and found.session.epoch >= epoch
        return found if there and found.HasField("last_heartbeat") else None

    return await eventually(look, within=20, describe=f"{name} is ONLINE")


async def has_presence(served: Served, name: str, presence: int) -> bool:
    return (await shown(served, name)).presence == presence


def spec(
    name: str, kind: str, /, *, timeout_s: float = 0.0, **data: Any
) -> command_service_pb2.CommandSpec:
    wanted = command_service_pb2.CommandSpec(neuron_id=name, type=kind, data=Struct())
    wanted.data.update(data)
    if timeout_s:
        wanted.run_timeout.FromMilliseconds(round(timeout_s * 1000))
    return wanted


async def issue(
    served: Served, name: str, kind: str, /, *, timeout_s: float = 0.0, **data: Any
) -> str:
    """Issues a command; gives its id."""
    wanted = spec(name, kind, timeout_s=timeout_s, **data)
    answer = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=served.admin, timeout=10
    )
    return answer.command.command_id


async def command(served: Served, command_id: str) -> command_pb2.Command:
    answer = await served.command.GetCommand(
        command_service_pb2.GetCommandRequest(command_id=command_id),
        metadata=served.admin,
        timeout=10,
    )
    return answer.command


async def reached(served: Served, command_id: str, *states: int) -> command_pb2.Command:
    """Waits until the command is in one of those states."""

    async def look() -> command_pb2.Command | None:
        try:
            found = await command(served, command_id)
        except grpc.aio.AioRpcError:
            return None
        return found if found.state in states else None

    names = ", ".join(State.Name(state) for state in states)  # type: ignore[arg-type]
    return await eventually(look, within=30, describe=names)


async def done(
    served: Served, name: str, kind: str, /, *, timeout_s: float = 0.0, **data: Any
) -> command_pb2.Command:
    """Issues a command and waits for its end."""
    return await reached(
        served, await issue(served, name, kind, timeout_s=timeout_s, **data), *FINAL
    )


async def answer(served: Served, name: str, kind: str, /, **data: Any) -> dict[str, Any]:
    """What a command answers, which must succeed."""
    ended = await done(served, name, kind, **data)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED, ended
    return MessageToDict(ended.response)


async def heartbeats(
    served: Served, name: str, *, since: Timestamp | None = None
) -> list[heartbeat_pb2.Heartbeat]:
    found = await served.fleet.ListHeartbeats(
        fleet_service_pb2.ListHeartbeatsRequest(neuron_id=name, start_time=since, page_size=1000),
        metadata=served.admin,
        timeout=10,
    )
    return [stored.heartbeat for stored in found.heartbeats]


async def counted(served: Served, name: str, metric: str) -> float:
    """A counter's sum over all that the neuron has reported."""
    start, end = Timestamp(), Timestamp()
    end.GetCurrentTime()
    start.FromSeconds(end.seconds - 3600)
    end.FromSeconds(end.seconds + 60)
    found = await served.analytics.QueryMetrics(
        analytics_service_pb2.QueryMetricsRequest(
            name=metric,
            filter=f'neuron_id = "{name}"',
            start_time=start,
            end_time=end,
            bucket_width=Duration(seconds=3600),
        ),
        metadata=served.admin,
        timeout=10,
    )
    return sum(bucket.sum for series in found.series for bucket in series.buckets)


def outcomes(found: command_pb2.Command) -> int:
    """How many ends a command's history has."""
    return sum(step.state in FINAL for step in found.transitions)
