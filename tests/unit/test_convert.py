"""What a neuron says comes back as it said it, with the contract's defaults filled in."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from federation.v1 import analytics_service_pb2, heartbeat_pb2, neuron_pb2, report_pb2
from federation_server.domain.analytics import MetricKind, Severity
from federation_server.domain.heartbeat import StoredHeartbeat
from federation_server.domain.neuron import (
    ADMIN_FIELDS,
    Activity,
    DependencyState,
    JsonObject,
    Lifecycle,
    NeuronDescription,
    NeuronRecord,
    Presence,
    SessionRecord,
    Totals,
)
from federation_server.rpc import convert_stream
from federation_server.rpc.convert import (
    from_duration,
    from_struct,
    from_timestamp,
    to_duration,
    to_struct,
    to_timestamp,
)
from federation_server.rpc.convert_heartbeat import heartbeat_to_proto, stored_heartbeat_to_proto
from federation_server.rpc.convert_neuron import (
    description_from_proto,
    description_to_proto,
    neuron_to_proto,
)

NOON = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)

FULL_DESCRIPTION: dict[str, Any] = {
    "neuron_id": "scraper-1",
    "name": "The scraper",
    "type": "scraper",
    "language": "python",
    "version": "2.4.1",
    "base_url": "http://10.0.0.7:9000",
    "healthcheck_endpoint": "/health",
    "api_endpoints": [{"path": "/data", "method": "POST", "description": "takes data"}],
    "capabilities": ["scrape", "store"],
    "dependencies": ["postgresql"],
    "command_types": [
        {"type": "run", "description": "runs", "data_schema": {"type": "object", "maxItems": 3}},
        {"type": "stop", "control": True},
    ],
    "resource_requirements": {"cpu_cores": 0.5, "memory_bytes": "1024", "storage_bytes": "2048"},
    "deployment": {"type": "docker", "image": "scraper:2", "ports": [80, 443]},
    "alert_thresholds": {
        "cpu_percent": 70,
        "memory_percent": 71,
        "error_rate_percent": 3,
        "response_time_ms": 99.5,
        "heartbeat_timeout": "90.500s",
        "health_score": 40,
    },
    "auto_restart": {"enabled": True, "max_attempts": 3},
    "labels": {"zone": "eu"},
    "metadata": {"team": "data", "deep": {"list": [1, 2.5, None, True, "x"]}},
    "max_concurrent_commands": 9,
}

FULL_HEARTBEAT: dict[str, Any] = {
    "heartbeat_time": "2026-11-21T12:00:00.123456Z",
    "uptime": "12.250s",
    "health_score": 88.5,
    "activity": "ACTIVITY_PAUSED",
    "system": {
        "cpu_percent": 1.5,
        "memory_percent": 2.5,
        "memory_used_bytes": "3",
        "disk_percent": 4.5,
        "disk_used_bytes": "5",
        "network_received_bytes": "6",
        "network_sent_bytes": "7",
    },
    "application": {
        "requests_per_second": 1.25,
        "mean_response_ms": 2.25,
        "p50_response_ms": 3.25,
        "p95_response_ms": 4.25,
        "p99_response_ms": 5.25,
        "active_connections": 6,
        "queue_size": "7",
        "error_rate_percent": 8.25,
        "requests": "9",
        "failed_requests": "1",
        "response_ms_sum": 11.25,
    },
    "process": {"pid": 1, "threads": 2, "rss_bytes": "3", "open_files": 4, "cpu_percent": 150},
    "host": {
        "hostname": "h",
        "os": "Linux 6.1",
        "architecture": "x86_64",
        "cpu_count": 2,
        "memory_bytes": "3",
    },
    "dependencies": [
        {
            "name": "postgresql",
            "state": "DEPENDENCY_STATE_DEGRADED",
            "latency_ms": 12.5,
            "message": "slow",
            "check_time": "2026-11-21T11:59:00.5Z",
        },
        {"name": "redis", "state": "DEPENDENCY_STATE_DOWN"},
    ],
    "versions": {"service": "1", "sdk": "2", "runtime": "CPython 3.11"},
    "spool": {
        "pending": "1",
        "pending_bytes": "2",
        "dropped": "15",
        "dropped_reports": "4",
        "dropped_updates": "5",
        "dropped_error_reports": "6",
        "shortened_results": "7",
        "in_memory": True,
    },
    "running_commands": 5,
}

HEARTBEAT_PARTS = [
    "system",
    "application",
    "process",
    "host",
    "dependencies",
    "versions",
    "spool",
    "uptime",
    "heartbeat_time",
    "health_score",
]


def description(**fields: Any) -> neuron_pb2.NeuronDescription:
    return ParseDict(fields, neuron_pb2.NeuronDescription())


def record(**changes: Any) -> NeuronRecord:
    plain = NeuronRecord(
        description=NeuronDescription(neuron_id="n", name="n", type="worker"),
        overridden_fields=[],
        lifecycle=Lifecycle.ACTIVE,
        lifecycle_reason="",
        presence=Presence.OFFLINE,
        presence_time=NOON,
        presence_reason="registered",
        create_time=NOON,
        update_time=NOON,
        session=None,
        last_heartbeat_time=None,
        health_score=None,
        cpu_percent=None,
        memory_percent=None,
        error_rate_percent=None,
        mean_response_ms=None,
        uptime_s=None,
        host=None,
        totals=Totals(0, 0, 0.0, 0.0),
    )
    return replace(plain, **changes)


def test_a_full_description_comes_back_as_it_was() -> None:
    said = description(**FULL_DESCRIPTION)
    assert set(said.DESCRIPTOR.fields_by_name) == set(FULL_DESCRIPTION), "a field is not tried"
    assert description_to_proto(description_from_proto(said)) == said


def test_a_full_description_survives_json() -> None:
    """The store keeps nested parts as JSON."""
    said = description_from_proto(description(**FULL_DESCRIPTION))
    stored = {name: orjson.loads(orjson.dumps(getattr(said, name))) for name in said.__slots__}
    assert NeuronDescription(**stored) == said


def test_a_bare_description_gets_its_defaults() -> None:
    shown = description_to_proto(description_from_proto(description(neuron_id="n", type="worker")))
    thresholds = shown.alert_thresholds
    assert shown.name == "n"
    assert shown.max_concurrent_commands == 4
    assert thresholds.heartbeat_timeout == Duration(seconds=120)
    assert (thresholds.cpu_percent, thresholds.memory_percent) == (80, 85)
    assert (thresholds.error_rate_percent, thresholds.response_time_ms) == (5, 5000)
    assert thresholds.health_score == 50


def test_an_absent_part_of_a_description_stays_absent() -> None:
    shown = description_to_proto(description_from_proto(description(neuron_id="n", type="worker")))
    for part in ("resource_requirements", "deployment", "auto_restart", "metadata"):
        assert not shown.HasField(part)


def test_an_empty_part_of_a_description_is_not_an_absent_one() -> None:
    said = description(neuron_id="n", type="worker", auto_restart={}, deployment={})
    shown = description_to_proto(description_from_proto(said))
    assert shown.HasField("auto_restart")
    assert shown.HasField("deployment")


def test_an_endpoint_without_a_method_is_a_get() -> None:
    said = description(neuron_id="n", type="worker", api_endpoints=[{"path": "/"}])
    assert description_to_proto(description_from_proto(said)).api_endpoints[0].method == "GET"


def test_a_command_types_empty_schema_is_not_an_absent_one() -> None:
    commands = [{"type": "a"}, {"type": "b", "data_schema": {}}]
    said = description(neuron_id="n", type="worker", command_types=commands)
    shown = description_to_proto(description_from_proto(said)).command_types
    assert [command.HasField("data_schema") for command in shown] == [False, True]


def test_what_an_admin_may_set_are_fields_of_a_description() -> None:
    assert set(neuron_pb2.NeuronDescription.DESCRIPTOR.fields_by_name) >= ADMIN_FIELDS


def test_a_neuron_that_never_came_shows_no_session_and_no_heartbeat() -> None:
    shown = neuron_to_proto(record())
    for field in (
        "session",
        "last_heartbeat_time",
        "last_heartbeat",
        "health_score",
        "cpu_percent",
        "memory_percent",
        "error_rate_percent",
        "mean_response_ms",
        "uptime",
    ):
        assert not shown.HasField(field)
    assert shown.totals.mean_response_ms == 0
    assert shown.presence == neuron_pb2.PRESENCE_OFFLINE


def test_a_neurons_state_is_shown_with_zeros_that_were_said() -> None:
    session = SessionRecord("s", 7, True, NOON, None, "i", "sdk", "1", "server", "ipv4:1.2.3.4:5")
    shown = neuron_to_proto(
        record(
            session=session,
            last_heartbeat_time=NOON,
            health_score=0.0,
            uptime_s=1.5,
            totals=Totals(4, 1, 10.0, 60.0),
        )
    )
    assert shown.HasField("health_score")
    assert shown.health_score == 0
    assert from_duration(shown.uptime) == timedelta(seconds=1.5)
    assert (shown.totals.mean_response_ms, shown.totals.failed_requests) == (2.5, 1)
    assert (shown.session.epoch, shown.session.open, shown.session.sdk.name) == (7, True, "sdk")
    assert not shown.session.HasField("close_time")


def test_a_full_heartbeat_comes_back_as_it_was() -> None:
    said = ParseDict(FULL_HEARTBEAT, heartbeat_pb2.Heartbeat())
    assert set(said.DESCRIPTOR.fields_by_name) == set(FULL_HEARTBEAT), "a field is not tried"
    assert heartbeat_to_proto(convert_stream.heartbeat(said)) == said


@pytest.mark.parametrize("part", HEARTBEAT_PARTS)
def test_what_a_heartbeat_does_not_say_stays_unsaid(part: str) -> None:
    said = ParseDict(FULL_HEARTBEAT, heartbeat_pb2.Heartbeat())
    said.ClearField(part)  # type: ignore[arg-type]
    assert heartbeat_to_proto(convert_stream.heartbeat(said)) == said


@pytest.mark.parametrize("part", ["system", "application", "process", "host", "versions", "spool"])
def test_a_part_of_a_heartbeat_with_nothing_but_zeros_is_not_an_absent_one(part: str) -> None:
    said = heartbeat_pb2.Heartbeat()
    getattr(said, part).SetInParent()
    assert heartbeat_to_proto(convert_stream.heartbeat(said)) == said


@pytest.mark.parametrize("spool", [{"dropped": 3}, {"shortened_results": 2}, {"in_memory": True}])
def test_a_spool_that_tells_only_a_part_comes_back_the_same(spool: dict[str, Any]) -> None:
    said = heartbeat_pb2.Heartbeat(spool=heartbeat_pb2.SpoolStatus(**spool))
    assert heartbeat_to_proto(convert_stream.heartbeat(said)) == said


def test_an_empty_heartbeat_comes_back_empty() -> None:
    said = heartbeat_pb2.Heartbeat()
    assert heartbeat_to_proto(convert_stream.heartbeat(said)) == said


def test_a_stored_heartbeat_names_its_time_and_its_session() -> None:
    row = convert_stream.heartbeat(ParseDict(FULL_HEARTBEAT, heartbeat_pb2.Heartbeat()))
    shown = stored_heartbeat_to_proto(StoredHeartbeat(NOON, 3, row))
    assert from_timestamp(shown.receive_time) == NOON
    assert (shown.epoch, shown.heartbeat.running_commands) == (3, 5)


@pytest.mark.parametrize(
    "time", [datetime(1970, 1, 1, tzinfo=UTC), NOON, datetime(1969, 12, 31, 23, 59, 59, 1, UTC)]
)
def test_a_time_comes_back_to_the_microsecond(time: datetime) -> None:
    stamp = to_timestamp(time)
    assert stamp is not None
    assert 0 <= stamp.nanos < 10**9
    assert from_timestamp(stamp) == time


@pytest.mark.parametrize("seconds", [0.0, 0.000001, 1.5, 86_400.25, 3_155_760_000.0])
def test_a_span_comes_back_to_the_microsecond(seconds: float) -> None:
    span = to_duration(seconds)
    assert span is not None
    assert from_duration(span) == timedelta(seconds=seconds)


def test_a_struct_comes_back_as_it_was() -> None:
    value: JsonObject = {"a": None, "b": True, "c": 3, "d": 2.5, "e": "x", "f": [1, {"g": []}]}
    struct = to_struct(value)
    assert struct is not None
    assert from_struct(struct) == value


def test_a_whole_number_of_a_struct_becomes_an_int_and_a_flag_does_not() -> None:
    struct = Struct()
    struct.update({"whole": 3.0, "flag": True})
    value = from_struct(struct)
    assert type(value["whole"]) is int
    assert type(value["flag"]) is bool


def test_an_integer_that_a_double_cannot_hold_travels_as_a_string() -> None:
    struct = to_struct({"n": 2**53 + 1})
    assert struct is not None
    assert struct.fields["n"].string_value == str(2**53 + 1)


@pytest.mark.parametrize("number", [1e18, -1e18, 2.0**60, 1e19, 1e300, 2.0**53, 0.1])
def test_a_large_number_comes_back_from_the_store_as_a_number(number: float) -> None:
    said = Struct(fields={"n": Value(number_value=number)})
    digits = format(Decimal(orjson.dumps(from_struct(said)["n"]).decode()), "f")  # as jsonb has it
    assert to_struct({"n": orjson.loads(digits)}) == said


@pytest.mark.parametrize(
    ("domain", "contract", "prefix"),
    [
        (Lifecycle, neuron_pb2.Lifecycle, "LIFECYCLE_"),
        (Presence, neuron_pb2.Presence, "PRESENCE_"),
        (DependencyState, heartbeat_pb2.DependencyState, "DEPENDENCY_STATE_"),
        (Severity, report_pb2.Severity, "SEVERITY_"),
        (MetricKind, analytics_service_pb2.MetricKind, "METRIC_KIND_"),
    ],
)
def test_the_domain_has_the_contracts_choices_in_its_order(
    domain: Any, contract: Any, prefix: str
) -> None:
    names = [name.removeprefix(prefix) for name, number in contract.items() if number]
    assert [member.value for member in domain] == names


def test_the_domain_has_the_contracts_activities() -> None:
    names = [name.removeprefix("ACTIVITY_") for name, _ in heartbeat_pb2.Activity.items()]
    assert [activity.value for activity in Activity] == names


def test_every_field_of_a_neuron_is_filled() -> None:
    session = SessionRecord("s", 7, False, NOON, NOON, "i", "sdk", "1", "server", "peer", NOON)
    shown = neuron_to_proto(
        record(
            description=description_from_proto(description(**FULL_DESCRIPTION)),
            overridden_fields=["labels"],
            lifecycle=Lifecycle.PENDING,
            lifecycle_reason="why",
            session=session,
            last_heartbeat_time=NOON,
            health_score=1.0,
            cpu_percent=2.0,
            memory_percent=3.0,
            error_rate_percent=4.0,
            mean_response_ms=5.0,
            uptime_s=6.0,
            host={"hostname": "h"},
            totals=Totals(1, 1, 1.0, 1.0),
        ),
        ParseDict(FULL_HEARTBEAT, heartbeat_pb2.Heartbeat()),
    )
    filled = _filled(shown)
    assert filled == set(shown.DESCRIPTOR.fields_by_name)
    assert _filled(shown.session) == set(shown.session.DESCRIPTOR.fields_by_name) - {"open"}
    assert _filled(shown.totals) == set(shown.totals.DESCRIPTOR.fields_by_name)


def _filled(message: Message) -> set[str]:
    return {field.name for field, _ in message.ListFields()}
