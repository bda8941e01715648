"""The limits of the contract: each kind just inside and just outside, and none forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from federation.v1 import (
    access_service_pb2,
    analytics_service_pb2,
    command_service_pb2,
    errors_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
    session_service_pb2,
)
from federation_server.rpc import errors, limits
from federation_server.rpc.findings import MAX_VIOLATIONS
from federation_server.rpc.limit_table import LIMITS

SERVICES = (
    access_service_pb2,
    analytics_service_pb2,
    command_service_pb2,
    fleet_service_pb2,
    session_service_pb2,
)


def fields(message: Message, prefix: str = "") -> list[str]:
    return [violation.field for violation in limits.violations(message, prefix)]


def description(**changes: Any) -> neuron_pb2.NeuronDescription:
    return neuron_pb2.NeuronDescription(**{"neuron_id": "n-1", "type": "scraper", **changes})


def heartbeat(**changes: Any) -> heartbeat_pb2.Heartbeat:
    return heartbeat_pb2.Heartbeat(**changes)


def report(**changes: Any) -> report_pb2.AnalyticsReport:
    made = report_pb2.AnalyticsReport(**changes)
    made.start_time.seconds, made.end_time.seconds = 1_000, 2_000
    return made


def point(**changes: Any) -> report_pb2.MetricPoint:
    made = report_pb2.MetricPoint(**{"name": "rows", **changes})
    if made.WhichOneof("value") is None:
        made.gauge = 1.0
    return made


def event(**changes: Any) -> report_pb2.ReportedEvent:
    made = report_pb2.ReportedEvent(**{"type": "t", "severity": "SEVERITY_INFO", **changes})
    made.event_time.seconds = 1
    return made


def spec(**changes: Any) -> command_service_pb2.CommandSpec:
    return command_service_pb2.CommandSpec(**{"neuron_id": "n", "type": "run", **changes})


def finished(**changes: Any) -> session_service_pb2.CommandFinished:
    values = {"state": "COMMAND_STATE_SUCCEEDED", **changes}
    return session_service_pb2.CommandFinished(**values)


def hello(**changes: Any) -> session_service_pb2.Hello:
    values = {"instance_id": "i", "spool_id": "s", "first_sequence": 1, "next_sequence": 1}
    return session_service_pb2.Hello(**{**values, **changes})


def nested(levels: int, *, lists: bool = False, into: Struct | None = None) -> Struct:
    """A Struct that many levels deep: objects, or lists under one object."""
    struct = Struct() if into is None else into
    value: Value | None = None
    for _ in range(levels - 1):
        place = struct.fields["a"] if value is None else None
        if place is None and value is not None:
            in_list = value.WhichOneof("kind") == "list_value"
            place = value.list_value.values.add() if in_list else value.struct_value.fields["a"]
        assert place is not None
        if lists:
            place.list_value.SetInParent()
        else:
            place.struct_value.SetInParent()
        value = place
    return struct


def struct(**members: Any) -> Struct:
    made = Struct()
    made.update(members)
    return made


def of_size(size: int) -> Struct:
    """A Struct of that many bytes encoded."""
    made = struct(a="")
    made["a"] = "x" * size
    while made.ByteSize() > size:
        made["a"] = "x" * (len(str(made["a"])) - (made.ByteSize() - size))
    assert made.ByteSize() == size
    return made


# -- nothing is forgotten ------------------------------------------------------------------


def requests() -> Iterator[Any]:
    for module in SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield method.input_type


def reachable() -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = list(requests())
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in found or descriptor.full_name.startswith("google.protobuf."):
            continue
        found[descriptor.full_name] = descriptor
        for field in descriptor.fields:
            inner = field.message_type
            if inner is not None and not inner.GetOptions().map_entry:
                waiting.append(inner)
    return found


@pytest.mark.parametrize("name", sorted(reachable()))
def test_every_field_that_a_caller_can_send_has_a_limit(name: str) -> None:
    descriptor = reachable()[name]
    message_type = GetMessageClass(descriptor)
    assert message_type in LIMITS, f"{name} is not in the table"
    named = set(LIMITS[message_type].kinds)
    flags = {f.name for f in descriptor.fields if f.type == FieldDescriptor.TYPE_BOOL}
    assert named == {field.name for field in descriptor.fields} - flags
    oneofs = {o.name for o in descriptor.oneofs if not o.name.startswith("_")}
    one_of = LIMITS[message_type].one_of
    assert oneofs == ({one_of.name} if one_of else set())


def test_the_table_names_no_message_that_no_caller_can_send() -> None:
    assert {message_type.DESCRIPTOR.full_name for message_type in LIMITS} == set(reachable())


@pytest.mark.parametrize("message_type", list(LIMITS), ids=lambda m: m.DESCRIPTOR.name)
def test_every_limit_can_be_checked_and_an_empty_message_has_only_required_faults(
    message_type: type[Message],
) -> None:
    for violation in limits.violations(message_type()):
        assert violation.description.startswith(("is required", "must")), violation
        assert not violation.too_large


# -- just inside and just outside ----------------------------------------------------------

Make = Callable[[Any], Message]

INSIDE_AND_OUTSIDE: list[tuple[str, Make, Any, Any, str]] = [
    # what, how the message is made of a value, inside, outside, the violation's field
    ("text length", lambda v: description(name=v), "ä" * 256, "ä" * 257, "name"),
    ("text without NUL", lambda v: description(name=v), "a b", "a\0b", "name"),
    ("required text", lambda v: description(neuron_id=v), "a", "", "neuron_id"),
    ("pattern", lambda v: description(neuron_id=v), "a" * 128, "a" * 129, "neuron_id"),
    ("pattern to its end", lambda v: description(neuron_id=v), "a", "a\n", "neuron_id"),
    ("pattern of a type", lambda v: description(type=v), "a" * 64, "a" * 65, "type"),
    ("optional pattern", lambda v: neuron_pb2.ApiEndpoint(path="/", method=v), "", "get", "method"),
    ("path", lambda v: neuron_pb2.ApiEndpoint(path=v), "/" * 1024, "/" * 1025, "path"),
    ("URL", lambda v: description(base_url=v), "http://[::1]:9000", "ftp://h/", "base_url"),
    ("URL's port", lambda v: description(base_url=v), "https://h", "http://h:x", "base_url"),
    ("URL's host", lambda v: description(base_url=v), "http://h/p?q", "http:///p", "base_url"),
    ("URL's space", lambda v: description(base_url=v), "http://h/p", "http://h/ p", "base_url"),
    ("list count", lambda v: description(capabilities=map(str, range(v))), 128, 129,
     "capabilities"),
    ("list item", lambda v: description(capabilities=["a", v]), "b", "", "capabilities[1]"),
    ("list unique", lambda v: description(capabilities=["a", v]), "b", "a", "capabilities[1]"),
    ("list of numbers", lambda v: neuron_pb2.Deployment(ports=[1, v]), 65535, 65536, "ports[1]"),
    ("list of numbers from 1", lambda v: neuron_pb2.Deployment(ports=[v]), 1, 0, "ports[0]"),
    ("map count", lambda v: description(labels={f"k{i}": "" for i in range(v)}), 64, 65, "labels"),
    ("map key", lambda v: description(labels={v: ""}), "a.b/c", "A", 'labels["A"]'),
    ("map empty key", lambda v: description(labels={v: ""}), "a", "", 'labels[""]'),
    ("map value", lambda v: description(labels={"zone": v}), "x" * 256, "x" * 257,
     'labels["zone"]'),
    ("integer", lambda v: description(max_concurrent_commands=v), 1000, 1001,
     "max_concurrent_commands"),
    ("uint64", lambda v: heartbeat(spool={"pending": v}), 2**63 - 1, 2**63, "spool.pending"),
    ("int32", lambda v: fleet_service_pb2.ListNeuronsRequest(page_size=v), 1000, 1001,
     "page_size"),
    ("int32 below", lambda v: fleet_service_pb2.ListNeuronsRequest(page_size=v), 0, -1,
     "page_size"),
    ("percent", lambda v: heartbeat(health_score=v), 100, math.nextafter(100, 101),
     "health_score"),
    ("NaN", lambda v: heartbeat(health_score=v), 0, math.nan, "health_score"),
    ("not below 0", lambda v: heartbeat(application={"p50_response_ms": v}), 0, -5e-324,
     "application.p50_response_ms"),
    ("finite", lambda v: heartbeat(application={"requests_per_second": v}), 1.7e308, math.inf,
     "application.requests_per_second"),
    ("enum", lambda v: heartbeat(activity=v), 4, 5, "activity"),
    ("enum below 0", lambda v: heartbeat(activity=v), 0, -1, "activity"),
    ("required enum", lambda v: event(severity=v), 1, 0, "severity"),
    ("narrowed enum", lambda v: finished(state=v), 9, 5, "state"),
    ("custom metric", lambda v: report(custom_metrics={"rows": v}), -1.5, math.inf,
     'custom_metrics["rows"]'),
    ("metric name", lambda v: report(custom_metrics={v: 1}), "a.b", "a-b",
     'custom_metrics["a-b"]'),
    ("points unique", lambda v: report(points=[point(), point(labels=v)]), {"a": "b"}, {},
     "points[1]"),
    ("names over both fields", lambda v: report(points=[point()], custom_metrics={v: 1.0}),
     "other", "rows", "points[0].name"),
    ("counter", lambda v: point(counter=v), 0, -1, "counter"),
    ("gauge", lambda v: point(gauge=v), -1e300, -math.inf, "gauge"),
    ("oneof required", lambda v: report_pb2.MetricPoint(name="a", gauge=v), 0, None, "value"),
    ("dependency unique", lambda v: heartbeat(dependencies=[
        {"name": "a", "state": 1}, {"name": v, "state": 1}]), "b", "a", "dependencies[1]"),
    ("failed requests", lambda v: heartbeat(application={"requests": 7, "failed_requests": v}),
     7, 8, "application.failed_requests"),
    ("bytes of UTF-8", lambda v: finished(log_tail=v), "ä" * 8192, "ä" * 8193, "log_tail"),
    ("Struct bytes", lambda v: description(metadata=of_size(v)), 65536, 65537, "metadata"),
    ("Struct depth", lambda v: description(metadata=nested(v)), 16, 17, "metadata"),
    ("Struct depth of lists", lambda v: description(metadata=nested(v, lists=True)), 16, 17,
     "metadata"),
    ("Struct number", lambda v: description(metadata=struct(a={"b": [v]})), 1.0, math.nan,
     "metadata.a.b[0]"),
    ("Struct string", lambda v: description(metadata=struct(a=v)), "b", "\0", "metadata.a"),
    ("Struct key", lambda v: description(metadata=struct(**{v: 1})), "a b", "\0",
     'metadata["\\u0000"]'),
    ("command data", lambda v: spec(data=nested(v)), 32, 33, "data"),
    ("priority", lambda v: spec(priority=v), 0, 10, "priority"),
    ("first sequence", lambda v: hello(first_sequence=v, next_sequence=5), 5, 6,
     "first_sequence"),
    ("sequence from 1", lambda v: hello(next_sequence=v), 1, 0, "next_sequence"),
    ("error of a failure", lambda v: finished(state="COMMAND_STATE_FAILED", error=v), {}, None,
     "error"),
    ("group_by", lambda v: analytics_service_pb2.QueryMetricsRequest(name="a", group_by=[v]),
     "labels.a/b", "labels", "group_by[0]"),
    ("id pattern",
     lambda v: access_service_pb2.CreateEnrollmentTokenRequest(neuron_id_pattern=v), "a-*", "A*",
     "neuron_id_pattern"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "inside", "outside", "field"),
    [case[1:] for case in INSIDE_AND_OUTSIDE],
    ids=[case[0] for case in INSIDE_AND_OUTSIDE],
)
def test_a_limit_lets_the_last_value_inside_pass_and_names_the_first_one_outside(
    make: Make, inside: Any, outside: Any, field: str
) -> None:
    assert fields(make(inside)) == []
    assert fields(make(outside)) == [field]


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("make", "field", "low", "high"),
    [
        (heartbeat, "uptime", 0, 100 * 31_557_600 * SECOND),
        (spec, "run_timeout", SECOND // 1000, 31 * 86_400 * SECOND),
        (
            access_service_pb2.CreateEnrollmentTokenRequest,
            "ttl",
            SECOND,
            366 * 86_400 * SECOND,
        ),
        (neuron_pb2.AlertThresholds, "heartbeat_timeout", SECOND, 86_400 * SECOND),
    ],
)
def test_a_span_is_exact_to_the_nanosecond_at_both_ends(
    make: Callable[[], Message], field: str, low: int, high: int
) -> None:
    for nanos, good in ((low, True), (low - 1, False), (high, True), (high + 1, False)):
        message = make()
        getattr(message, field).FromNanoseconds(nanos)
        assert (fields(message) == []) is good, nanos


def test_a_span_of_zero_stands_for_the_default_where_the_contract_says_so() -> None:
    thresholds = neuron_pb2.AlertThresholds()
    thresholds.heartbeat_timeout.SetInParent()
    assert fields(thresholds) == []


@pytest.mark.parametrize(("seconds", "nanos"), [(1, -1), (-1, 1), (0, 10**9), (0, -(10**9))])
def test_a_span_whose_parts_disagree_is_refused(seconds: int, nanos: int) -> None:
    message = heartbeat()
    message.uptime.seconds, message.uptime.nanos = seconds, nanos
    assert fields(message) == ["uptime"]


@pytest.mark.parametrize(
    ("seconds", "nanos", "good"),
    [
        (0, 0, True),
        (-1, 0, False),
        (253_402_300_799, 999_999_999, True),
        (253_402_300_800, 0, False),
        (1, 1_000_000_000, False),
        (1, -1, False),
    ],
)
def test_a_time_is_from_1970_to_9999(seconds: int, nanos: int, *, good: bool) -> None:
    message = heartbeat()
    message.heartbeat_time.seconds, message.heartbeat_time.nanos = seconds, nanos
    assert (fields(message) == []) is good


def test_times_in_the_wrong_order_are_refused() -> None:
    swapped = report()
    swapped.end_time.seconds = 999
    assert fields(swapped) == ["end_time"]
    same = report()
    same.end_time.seconds = 1_000
    assert fields(same) == []
    command = spec()
    command.not_before_time.seconds = command.expire_time.seconds = 5
    assert fields(command) == ["expire_time"]


@pytest.mark.parametrize(
    ("bounds", "counts", "wrong"),
    [
        ([1, 2], [0, 1, 2], []),
        ([], [1], ["histogram.bounds"]),
        ([1, 1], [0, 1, 2], ["histogram.bounds[1]"]),
        ([1, 2], [0, 1], ["histogram.bucket_counts"]),
        ([math.nan], [0, 1], ["histogram.bounds[0]"]),
        ([1], [2**62, 2**62], ["histogram.bucket_counts"]),
        (range(100), range(101), []),
        (range(101), range(102), ["histogram.bounds", "histogram.bucket_counts"]),
    ],
)
def test_a_histogram_needs_rising_bounds_and_one_count_more(
    bounds: Any, counts: Any, wrong: list[str]
) -> None:
    assert fields(point(histogram={"bounds": bounds, "bucket_counts": counts})) == wrong


def test_a_report_is_at_most_one_mebibyte_and_is_not_looked_into_beyond() -> None:
    large = report(events=[event(message="x" * 8000) for _ in range(130)])
    assert fields(large) == []
    large.events.extend([event(message="x" * 8000, type="") for _ in range(2)])
    (violation,) = limits.violations(large, "analytics_report")
    assert (violation.field, violation.too_large) == ("analytics_report", True)


# -- the envelope --------------------------------------------------------------------------


def test_a_stream_s_message_is_named_by_its_member() -> None:
    message = session_service_pb2.NeuronMessage(heartbeat=heartbeat(system={"cpu_percent": 101}))
    assert fields(message) == ["heartbeat.system.cpu_percent"]
    assert fields(message.heartbeat, "heartbeat") == ["heartbeat.system.cpu_percent"]


def test_durable_messages_carry_a_sequence_and_others_none() -> None:
    update = session_service_pb2.CommandUpdate(command_id="c", attempt=1)
    update.accepted.SetInParent()
    make: Any = session_service_pb2.NeuronMessage
    assert fields(make(sequence=1, command_update=update)) == []
    assert fields(make(sequence=0, command_update=update)) == ["sequence"]
    assert fields(make(sequence=0, heartbeat={})) == []
    assert fields(make(sequence=1, heartbeat={})) == ["sequence"]


def test_a_report_on_the_stream_needs_its_send_time() -> None:
    message = session_service_pb2.NeuronMessage(sequence=1, analytics_report=report())
    assert fields(message) == ["send_time"]
    message.send_time.seconds = 1
    assert fields(message) == []


def test_a_member_of_the_envelope_that_is_not_known_is_ignored() -> None:
    unknown = session_service_pb2.NeuronMessage.FromString(b"\x08\x07" + b"\xa2\x06\x00")
    assert fields(unknown) == []


# -- UpdateNeuron --------------------------------------------------------------------------


def update(masked: list[str], released: list[str] | None = None, **changes: Any) -> Message:
    changed = neuron_pb2.NeuronDescription(**changes)
    request = fleet_service_pb2.UpdateNeuronRequest(neuron_id="n", description=changed)
    request.update_mask.paths.extend(masked)
    request.release_mask.paths.extend(released or [])
    return request


def test_only_the_masked_fields_of_a_description_are_checked() -> None:
    assert fields(update(["name"], name="a", base_url="no URL")) == []
    assert fields(update(["name", "base_url"], base_url="no URL")) == ["description.base_url"]
    assert fields(update(["labels"], labels={"A": "b"})) == ['description.labels["A"]']
    too_hot = update(["alert_thresholds"], alert_thresholds={"cpu_percent": 101})
    assert fields(too_hot) == ["description.alert_thresholds.cpu_percent"]


@pytest.mark.parametrize(
    ("masked", "released", "wrong"),
    [
        (["name", "type"], [], ["update_mask.paths[1]"]),
        (["labels.zone"], [], ["update_mask.paths[0]"]),
        ([], ["name"], []),
        ([], ["neuron_id"], ["release_mask.paths[0]"]),
        (["name"], ["labels", "name"], ["release_mask.paths[1]"]),
        ([], [], ["update_mask"]),
    ],
)
def test_masks_name_changeable_fields_and_none_twice(
    masked: list[str], released: list[str], wrong: list[str]
) -> None:
    assert fields(update(masked, released)) == wrong


# -- many faults, and which error they are -------------------------------------------------


def test_many_bad_fields_give_as_many_violations() -> None:
    bad = heartbeat(
        health_score=101,
        activity=99,
        system={"cpu_percent": math.nan, "memory_percent": -1, "disk_percent": 50},
        process={"cpu_percent": 1e7},
        host={"hostname": "x" * 257, "os": "\0"},
        dependencies=[{"name": "", "state": 1}, {"name": "b"}],
    )
    assert sorted(fields(bad)) == [
        "activity",
        "dependencies[0].name",
        "dependencies[1].state",
        "health_score",
        "host.hostname",
        "host.os",
        "process.cpu_percent",
        "system.cpu_percent",
        "system.memory_percent",
    ]


def test_a_check_stops_at_a_hundred_violations() -> None:
    bad = report(points=[point(name="", unit="x" * 33) for _ in range(2000)])
    assert len(limits.violations(bad)) == MAX_VIOLATIONS == 100


def test_a_list_that_is_too_long_is_not_looked_into() -> None:
    bad = report(points=[point(name="") for _ in range(2001)])
    assert fields(bad) == ["points"]


def test_a_message_without_faults_passes() -> None:
    limits.check(session_service_pb2.RegisterRequest(description=description()))


def test_bad_fields_are_an_invalid_argument() -> None:
    request = session_service_pb2.RegisterRequest(description=description(neuron_id="A"))
    with pytest.raises(errors.Refused) as caught:
        limits.check(request)
    assert caught.value.reason == errors_pb2.ERROR_REASON_INVALID_FIELD
    assert [v.field for v in caught.value.violations] == ["description.neuron_id"]


def test_size_alone_is_resource_exhausted_and_with_another_fault_it_is_not() -> None:
    request = session_service_pb2.RegisterRequest(description=description())
    request.description.metadata.CopyFrom(of_size(65537))
    with pytest.raises(errors.Refused) as caught:
        limits.check(request)
    assert caught.value.reason == errors_pb2.ERROR_REASON_TOO_LARGE
    request.description.type = ""
    with pytest.raises(errors.Refused) as caught:
        limits.check(request)
    assert caught.value.reason == errors_pb2.ERROR_REASON_INVALID_FIELD
    assert len(caught.value.violations) == 2


def test_a_long_key_is_cut_in_the_path() -> None:
    (path,) = fields(description(labels={"k" * 100_000: ""}))
    assert len(path) < 100


# -- depth ---------------------------------------------------------------------------------


@given(levels=st.integers(1, 60), lists=st.booleans())
def test_a_struct_is_refused_from_the_first_level_below_its_limit(
    levels: int, *, lists: bool
) -> None:
    expected = ["metadata"] if levels > 16 else []
    deep = description()  # filled in place: protobuf could not copy the deepest
    deep.metadata.SetInParent()
    nested(levels, lists=lists, into=deep.metadata)
    assert fields(deep) == expected


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.just("x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("k"), inner, max_size=1),
    max_leaves=40,
)


def depth(value: Any) -> int:
    match value:
        case dict():
            return 1 + max(map(depth, value.values()), default=0)
        case list():
            return 1 + max(map(depth, value), default=0)
        case _:
            return 0


@given(st.dictionaries(st.sampled_from("abc"), values))
def test_the_depth_of_any_struct_is_that_of_its_json(tree: dict[str, Any]) -> None:
    good = depth(tree) <= 16
    assert (fields(description(metadata=struct(**tree))) == []) is good


def test_a_struct_at_the_deepest_place_of_the_contract_may_have_all_its_levels_on_the_wire() -> (
    None
):
    # protobuf parses 100 messages deep, and a level of a Struct takes three of them: 32 levels
    # fit below any field of the contract, a few more do not parse at all.
    message = session_service_pb2.NeuronMessage(sequence=1)
    message.command_update.command_id, message.command_update.attempt = "c", 1
    message.command_update.finished.CopyFrom(finished(response=nested(32)))
    parsed = session_service_pb2.NeuronMessage.FromString(message.SerializeToString())
    assert fields(parsed) == []
    register = session_service_pb2.RegisterRequest(description=description())
    register.description.command_types.add(type="a").data_schema.CopyFrom(struct(const=1))
    register.description.command_types[0].data_schema["const"] = dict(nested_dict(31))
    parsed_register = session_service_pb2.RegisterRequest.FromString(register.SerializeToString())
    assert fields(parsed_register) == []


def nested_dict(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(levels - 1):
        made = {"a": made}
    return made


def test_a_bad_data_schema_is_named_where_it_is_bad() -> None:
    bad = description(
        command_types=[
            {"type": "a", "data_schema": struct(type="object")},
            {"type": "b", "data_schema": struct(properties={"limit": {"type": "int"}})},
        ]
    )
    assert fields(bad) == ["command_types[1].data_schema.properties.limit.type"]
