"""Messages, and bytes, that no neuron should send: each is refused by name, or does no harm."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import command_pb2, command_service_pb2, heartbeat_pb2, report_pb2
from federation.v1 import session_service_pb2 as pb
from tests.support.faults import issue, refused, report
from tests.support.federation import BareNeuron, Served, connected
from tests.support.plain_neuron import now
from tests.support.processes import FederationProcess


def deep(levels: int) -> Struct:
    """A Struct within a Struct within a Struct."""
    root = Struct()
    at = root
    for _ in range(levels):
        at = at.fields["a"].struct_value
    at.fields["a"].number_value = 1.0
    return root


def hostile_messages() -> dict[str, dict[str, Any]]:
    """Messages that a stream has to outlive: each is refused, or does no harm."""
    beat, application = heartbeat_pb2.Heartbeat, heartbeat_pb2.ApplicationMetrics
    update, finished = pb.CommandUpdate, pb.CommandFinished
    most = 2**64 - 1
    nan_histogram = report_pb2.HistogramValue(
        bounds=[math.nan], bucket_counts=[most, most], sum=math.inf, min=math.nan, max=math.nan
    )
    bad_point = report_pb2.MetricPoint(name="h", histogram=nan_histogram)
    labels = {f"l{number}": "x" for number in range(10_000)}
    old, far = Timestamp(seconds=-62_135_596_800), Timestamp(seconds=253_402_300_799)
    negative = heartbeat_pb2.Heartbeat()
    negative.uptime.FromSeconds(-5)
    broken_time = Timestamp(seconds=2**62, nanos=-5)
    some_id = "00000000-0000-0000-0000-000000000000"
    return {
        "nothing": {},
        "empty heartbeat": {"heartbeat": beat()},
        "NaN": {"heartbeat": beat(health_score=math.nan)},
        "infinite": {"heartbeat": beat(application=application(response_ms_sum=math.inf))},
        "unknown enum": {"heartbeat": beat(activity=77)},  # type: ignore[arg-type]
        "negative span": {"heartbeat": negative},
        "impossible time": {"heartbeat": beat(heartbeat_time=broken_time)},
        "uint64 max": {"heartbeat": beat(application=application(requests=most))},
        "int64 max": {"heartbeat": beat(application=application(requests=2**63 - 1))},
        "double max": {"heartbeat": beat(application=application(response_ms_sum=1.7e308))},
        "NUL": {"heartbeat": beat(versions=heartbeat_pb2.Versions(service="a\0b"))},
        "controls": {"heartbeat": beat(versions=heartbeat_pb2.Versions(service="\x01\x1b[2J"))},
        "sequence 2^64-1": {"sequence": most, "send_time": now(), "analytics_report": report("h")},
        "unknown, 2^64-1": {"sequence": most},
        "impossible send_time": {"send_time": broken_time, "analytics_report": report("h")},
        "no send_time": {"analytics_report": report("h")},
        "send_time of year 1": {"send_time": old, "analytics_report": report("h")},
        "send_time of year 9999": {"send_time": far, "analytics_report": report("h9999")},
        "event of year 9999": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=far,
                events=[
                    report_pb2.ReportedEvent(
                        event_time=far, severity=report_pb2.SEVERITY_INFO, type="t"
                    )
                ],
            ),
        },
        "NaN everywhere": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[bad_point],
                custom_metrics={"x": math.nan},
            ),
        },
        "10,000 labels": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[report_pb2.MetricPoint(name="h", counter=1, labels=labels)],
            ),
        },
        "labels that no index takes": {
            "send_time": now(),
            "analytics_report": report_pb2.AnalyticsReport(
                start_time=now(),
                end_time=now(),
                points=[
                    report_pb2.MetricPoint(
                        name="h",
                        counter=1,
                        labels={f"l{each}": chaos(each, 256) for each in range(16)},
                    )
                ],
            ),
        },
        "update of nothing": {"command_update": update(command_id="x", attempt=1)},
        "update of no attempt": {
            "command_update": update(command_id=some_id, accepted=pb.CommandAccepted())
        },
        "empty id": {"command_update": update(attempt=2**32 - 1, accepted=pb.CommandAccepted())},
        "NUL id": {
            "command_update": update(
                command_id="\0", attempt=2**32 - 1, accepted=pb.CommandAccepted()
            )
        },
        "deep response": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(
                    state=command_pb2.COMMAND_STATE_SUCCEEDED,
                    response=deep(30),
                ),
            )
        },
        "NUL in response": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(
                    state=command_pb2.COMMAND_STATE_SUCCEEDED,
                    response=Struct(fields={"a\0": deep(1).fields["a"]}),
                ),
            )
        },
        "unknown state": {
            "command_update": update(
                command_id=some_id,
                attempt=1,
                finished=finished(state=999),  # type: ignore[arg-type]
            )
        },
    }


def chaos(seed: int, length: int) -> str:
    """Text that does not compress."""
    return "".join(chr(33 + 7919 * (seed + 1) * (at + 1) ** 3 % 9001 % 90) for at in range(length))


async def test_no_hostile_message_ends_its_stream_or_disturbs_another(
    served: Served, server: FederationProcess
) -> None:
    async with connected(served, "victim") as victim, connected(served, "hostile") as hostile:
        sequence = 0
        for name, message in hostile_messages().items():
            durable = {"analytics_report", "command_update"}.intersection(message)
            if durable:
                sequence += 1
            await hostile.send(**({"sequence": sequence} if durable else {}) | message)
            # What comes after it is stored, for both.
            sequence += 1
            await hostile.send(sequence=sequence, send_time=now(), analytics_report=report("fine"))
            try:
                await hostile.acked(sequence)
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"{name}: {error}\n{server.output[-3000:]}") from error
        await victim.send(sequence=1, send_time=now(), analytics_report=report("fine"))
        await victim.acked(1)
        command = await issue(served, "victim")
        assert (await victim.receive()).command.command_id == command.command_id


def deep_on_the_wire(levels: int) -> bytes:
    """A Struct within a Struct, by hand: no library would write as many."""
    struct = b""
    for _ in range(levels):
        value = b"\x2a" + _varint(len(struct)) + struct
        entry = b"\x0a\x01a\x12" + _varint(len(value)) + value
        struct = b"\x0a" + _varint(len(entry)) + entry
    return struct


def raw_messages() -> dict[str, tuple[bytes, set[grpc.StatusCode]]]:
    """What no message of the contract is, and how a stream may end on it."""
    invalid, exhausted = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
    depth = deep_on_the_wire(200)
    finished = _tagged(pb.CommandFinished, "response", depth)
    update = _tagged(pb.CommandUpdate, "finished", finished)
    return {
        "garbage": (b"\xff\xff\xff\xff\x07garbage", {invalid}),
        "invalid UTF-8": (
            pb.NeuronMessage(goodbye=pb.Goodbye(reason="abcd"))
            .SerializeToString()
            .replace(b"abcd", b"\xff\xfe\xfd\xfc"),
            {invalid},
        ),
        "a Struct 200 deep": (
            pb.NeuronMessage(
                sequence=1, command_update=pb.CommandUpdate(command_id="x", attempt=1)
            ).SerializeToString()
            + _tagged(pb.NeuronMessage, "command_update", update),
            {invalid},
        ),
        "more than 4 MiB": (b"\x0a" + _varint(5 << 20) + bytes(5 << 20), {exhausted}),
    }


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _tagged(kind: type[Message], name: str, value: bytes) -> bytes:
    number = kind.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | 2) + _varint(len(value)) + value


@pytest.mark.parametrize("name", raw_messages())
async def test_bytes_that_are_no_message_end_their_stream_with_a_name_for_it(
    served: Served, name: str
) -> None:
    data, codes = raw_messages()[name]
    token = await served.register(f"raw-{abs(hash(name))}")
    connect = served.channel.stream_stream(
        "/federation.v1.SessionService/Connect",
        request_serializer=lambda message: message,
        response_deserializer=pb.FederationMessage.FromString,
    )
    for first in (True, False):
        call = connect(metadata=(("authorization", f"Bearer {token}"),))
        if not first:
            hello = pb.Hello(instance_id="i", spool_id="s", first_sequence=1, next_sequence=1)
            await call.write(pb.NeuronMessage(hello=hello).SerializeToString())
            await call.read()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(data)
        async with asyncio.timeout(10):
            assert await call.code() in codes, (first, await call.details())


async def test_a_hello_with_the_greatest_numbers_opens_a_session(served: Served) -> None:
    neuron = BareNeuron(served, await served.register("greatest"))
    command = pb.RunningCommand(
        command_id="00000000-0000-0000-0000-000000000000", attempt=2**32 - 1
    )
    await neuron.hello(running=[command])
    neuron.call.cancel()


async def test_unary_calls_refuse_the_impossible_by_name(served: Served) -> None:
    token = await served.register("unary")
    metadata = (("authorization", f"Bearer {token}"),)
    bad: list[Any] = [
        served.session.SendHeartbeat(pb.SendHeartbeatRequest(), metadata=metadata),
        served.session.ReportAnalytics(
            pb.ReportAnalyticsRequest(
                spool_id="s", sequence=2**64 - 1, send_time=now(), report=report("u")
            ),
            metadata=metadata,
        ),
        served.session.ReportAnalytics(
            pb.ReportAnalyticsRequest(
                spool_id="s", sequence=1, send_time=Timestamp(seconds=2**62), report=report("u")
            ),
            metadata=metadata,
        ),
        served.command.IssueCommand(
            command_service_pb2.IssueCommandRequest(
                command=command_service_pb2.CommandSpec(
                    neuron_id="un\0ary", type="run", not_before_time=Timestamp(seconds=-1)
                )
            ),
            metadata=served.admin,
        ),
    ]
    for call in bad:
        assert (await refused(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
    issuing: Any = served.channel.unary_unary(
        "/federation.v1.CommandService/IssueCommand", request_serializer=lambda message: message
    )
    depth = deep_on_the_wire(200)
    data = _tagged(command_service_pb2.CommandSpec, "data", depth)
    spec = _tagged(command_service_pb2.IssueCommandRequest, "command", data)
    for raw in (b"\xff\xff\xff\xff\x07garbage", spec):
        code, _ = await refused(issuing(raw, metadata=served.admin))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    too_large = issuing(bytes(5 << 20), metadata=served.admin)
    assert (await refused(too_large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    for unknown in ("\x01", "' OR 1=1", "ü" * 100):
        request = command_service_pb2.GetCommandRequest(command_id=unknown)
        call = served.command.GetCommand(request, metadata=served.admin)
        assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND
