"""Between the SDK's values and the contract's messages; one converter each way."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import command_pb2, heartbeat_pb2, neuron_pb2, report_pb2
from federation.v1 import session_service_pb2 as session_pb2
from neuron_sdk.context import Progress
from neuron_sdk.delivery import Delivery
from neuron_sdk.description import NeuronDescription
from neuron_sdk.outcome import CommandFault, CommandOutcome
from neuron_sdk.payload import MAX_SAFE_INTEGER, JsonObject, clean_text
from neuron_sdk.points import HistogramValue, Point
from neuron_sdk.reports import Event, Report
from neuron_sdk.spool_store import Attempt, Execution
from neuron_sdk.vitals import Vitals

_LONGEST_S = 10 * 365 * 86_400


def to_timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as a Timestamp."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=min(int((seconds - whole) * 1e9), 999_999_999))


def to_duration(seconds: float) -> Duration:
    """Seconds, not below 0, as a Duration."""
    kept = min(max(seconds, 0.0), _LONGEST_S)
    whole = int(kept)
    return Duration(seconds=whole, nanos=int((kept - whole) * 1e9))


def from_duration(span: Duration) -> float:
    """A Duration in seconds."""
    return span.seconds + span.nanos / 1e9


def to_struct(value: Mapping[str, Any]) -> Struct:
    """A JSON object, already made plain, as a Struct."""
    return Struct(fields={key: _to_value(item) for key, item in value.items()})


def _to_value(value: Any) -> Value:
    match value:
        case None:
            return Value(null_value=NULL_VALUE)
        case bool():
            return Value(bool_value=value)
        case int() | float():
            return Value(number_value=value)
        case str():
            return Value(string_value=value)
        case Mapping():
            return Value(struct_value=to_struct(value))
        case _:
            return Value(list_value=ListValue(values=[_to_value(item) for item in value]))


def from_struct(struct: Struct) -> JsonObject:
    """A Struct as a JSON object. Whole numbers up to 2^53 become int."""
    return {key: _from_value(value) for key, value in struct.fields.items()}


def _from_value(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            whole = number.is_integer() and abs(number) <= MAX_SAFE_INTEGER
            return int(number) if whole else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
        case _:
            return None


# ---- commands


def from_delivery(delivery: session_pb2.CommandDelivery) -> Delivery:
    """A command as it arrived."""
    once = delivery.execution == command_pb2.Execution.EXECUTION_AT_MOST_ONCE
    timed, expires = delivery.HasField("run_timeout"), delivery.HasField("expire_after")
    return Delivery(
        of=Attempt(delivery.command_id, max(1, delivery.attempt)),
        type=delivery.type,
        data=from_struct(delivery.data),
        priority=min(delivery.priority, 9),
        run_timeout=from_duration(delivery.run_timeout) if timed else None,
        expire_after=from_duration(delivery.expire_after) if expires else None,
        checkpoint=from_struct(delivery.checkpoint) if delivery.HasField("checkpoint") else None,
        max_attempts=max(1, delivery.max_attempts),
        execution=Execution.AT_MOST_ONCE if once else Execution.AT_LEAST_ONCE,
    )


def accepted_update(of: Attempt) -> bytes:
    """The update that says: noted."""
    return session_pb2.CommandUpdate(
        command_id=of.command_id, attempt=of.attempt, accepted=session_pb2.CommandAccepted()
    ).SerializeToString()


def progress_update(of: Attempt, progress: Progress) -> bytes:
    """The update that says how far the handler is."""
    return session_pb2.CommandUpdate(
        command_id=of.command_id,
        attempt=of.attempt,
        progressed=session_pb2.CommandProgressed(
            fraction=progress.fraction,
            message=progress.message,
            checkpoint=None if progress.checkpoint is None else to_struct(progress.checkpoint),
        ),
    ).SerializeToString()


def finish_update(of: Attempt, outcome: CommandOutcome) -> bytes:
    """The update that says how the command ended."""
    finished = session_pb2.CommandFinished(
        state=command_pb2.CommandState.Value(f"COMMAND_STATE_{outcome.state}"),
        log_tail=outcome.log_tail,
    )
    if outcome.response is not None:
        finished.response.CopyFrom(to_struct(outcome.response))
    if outcome.error is not None:
        finished.error.CopyFrom(_to_error(outcome.error))
    if outcome.run_duration is not None:
        finished.run_duration.CopyFrom(to_duration(outcome.run_duration))
    return session_pb2.CommandUpdate(
        command_id=of.command_id, attempt=of.attempt, finished=finished
    ).SerializeToString()


def shortened_finish(finish: bytes) -> bytes:
    """A finish in a few hundred bytes: without its response, its logs, and its error's details. One
    that had a response says FAILED, because whoever waits for the response must not miss it.
    """
    update = session_pb2.CommandUpdate.FromString(finish)
    finished = update.finished
    finished.log_tail = ""
    if finished.HasField("error"):
        finished.error.ClearField("details")
        finished.error.message = clean_text(finished.error.message, 256)
    if finished.HasField("response"):
        size = finished.response.ByteSize()
        finished.ClearField("response")
        finished.state = command_pb2.COMMAND_STATE_FAILED
        finished.error.code = "RESPONSE_LOST"
        finished.error.message = (
            f"the handler succeeded, but the neuron's spool had no room for its {size} bytes"
        )
    return update.SerializeToString()


def _to_error(fault: CommandFault) -> command_pb2.CommandError:
    details = None if fault.details is None else to_struct(fault.details)
    return command_pb2.CommandError(code=fault.code, message=fault.message, details=details)


# ---- a heartbeat


def heartbeat_message(vitals: Vitals, *, with_host: bool) -> heartbeat_pb2.Heartbeat:
    """The neuron's state as a Heartbeat; the host only if asked for."""
    beat = heartbeat_pb2.Heartbeat(
        heartbeat_time=to_timestamp(vitals.time),
        uptime=to_duration(vitals.uptime_s),
        health_score=vitals.health_score,
        activity=heartbeat_pb2.Activity.Value(f"ACTIVITY_{vitals.activity}"),
        versions=heartbeat_pb2.Versions(
            service=vitals.service_version, sdk=vitals.sdk_version, runtime=vitals.runtime
        ),
        running_commands=vitals.running_commands,
    )
    _copy(vitals.application, beat.application)
    _copy(vitals.spool, beat.spool)
    if vitals.system is not None:
        _copy(vitals.system, beat.system)
    if vitals.process is not None:
        _copy(vitals.process, beat.process)
    if with_host and vitals.host is not None:
        _copy(vitals.host, beat.host)
    for result in vitals.dependencies:
        status = beat.dependencies.add(
            name=result.name,
            state=heartbeat_pb2.DependencyState.Value(f"DEPENDENCY_STATE_{result.state.value}"),
            latency_ms=_finite(result.latency_ms),
            message=clean_text(result.message, 1024),
        )
        if result.check_time is not None:
            status.check_time.CopyFrom(to_timestamp(result.check_time.timestamp()))
    return beat


def _copy(sample: Any, message: Any) -> None:
    """A frozen dataclass with the fields of a message into that message."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(sample, field.name)
        setattr(message, field.name, _finite(value) if isinstance(value, float) else value)


def _finite(number: float) -> float:
    return max(0.0, number) if math.isfinite(number) else 0.0


# ---- a report


def report_message(report: Report) -> report_pb2.AnalyticsReport:
    """What was measured over a span."""
    return report_pb2.AnalyticsReport(
        start_time=to_timestamp(report.start_time),
        end_time=to_timestamp(report.end_time),
        points=[to_point(point) for point in report.points],
        events=[to_event(event) for event in report.events],
    )


def to_point(point: Point) -> report_pb2.MetricPoint:
    """One series' value."""
    message = report_pb2.MetricPoint(name=point.name, unit=point.unit, labels=dict(point.labels))
    match point.value:
        case HistogramValue() as value:
            message.histogram.CopyFrom(
                report_pb2.HistogramValue(
                    bounds=value.bounds,
                    bucket_counts=value.bucket_counts,
                    sum=value.sum,
                    min=value.min,
                    max=value.max,
                )
            )
        case number if point.kind == "counter":
            message.counter = number
        case number:
            message.gauge = number
    return message


def to_event(event: Event) -> report_pb2.ReportedEvent:
    """Something that happened."""
    return report_pb2.ReportedEvent(
        event_time=to_timestamp(event.time),
        severity=report_pb2.Severity.Value(f"SEVERITY_{event.severity}"),
        type=event.type,
        message=event.message,
        attributes=to_struct(event.attributes) if event.attributes else None,
    )


# ---- a description


def description_message(description: NeuronDescription) -> neuron_pb2.NeuronDescription:
    """What the neuron says of itself."""
    message = neuron_pb2.NeuronDescription(
        neuron_id=description.neuron_id,
        name=description.name,
        type=description.type,
        language=description.language,
        version=description.version,
        base_url=description.base_url,
        healthcheck_endpoint=description.healthcheck_endpoint,
        api_endpoints=[
            neuron_pb2.ApiEndpoint(path=e.path, method=e.method, description=e.description)
            for e in description.api_endpoints
        ],
        capabilities=description.capabilities,
        dependencies=description.dependencies,
        command_types=[
            neuron_pb2.CommandType(
                type=c.type,
                description=c.description,
                data_schema=None if c.data_schema is None else to_struct(c.data_schema),
                control=c.control,
            )
            for c in description.command_types
        ],
        labels=dict(description.labels),
        max_concurrent_commands=description.max_concurrent_commands,
    )
    if description.metadata:
        message.metadata.CopyFrom(to_struct(description.metadata))
    _describe_extras(description, message)
    return message


def _describe_extras(description: NeuronDescription, message: neuron_pb2.NeuronDescription) -> None:
    if description.resource_requirements is not None:
        _copy(description.resource_requirements, message.resource_requirements)
    if (deployment := description.deployment) is not None:
        message.deployment.CopyFrom(
            neuron_pb2.Deployment(
                type=deployment.type, image=deployment.image, ports=deployment.ports
            )
        )
    if (restart := description.auto_restart) is not None:
        message.auto_restart.CopyFrom(
            neuron_pb2.AutoRestart(enabled=restart.enabled, max_attempts=restart.max_attempts)
        )
    if (alerts := description.alert_thresholds) is not None:
        message.alert_thresholds.CopyFrom(
            neuron_pb2.AlertThresholds(
                cpu_percent=alerts.cpu_percent,
                memory_percent=alerts.memory_percent,
                error_rate_percent=alerts.error_rate_percent,
                response_time_ms=alerts.response_time_ms,
                health_score=alerts.health_score,
            )
        )
        if alerts.heartbeat_timeout:
            message.alert_thresholds.heartbeat_timeout.CopyFrom(
                to_duration(alerts.heartbeat_timeout)
            )


# ---- the envelope


def durable_message(sequence: int, *, is_report: bool, payload: bytes) -> session_pb2.NeuronMessage:
    """A spooled message, ready to be sent now."""
    message = session_pb2.NeuronMessage(sequence=sequence, send_time=to_timestamp(time.time()))
    if is_report:
        message.analytics_report.ParseFromString(payload)
    else:
        message.command_update.ParseFromString(payload)
    return message
