"""Between the stream's messages and the domain: the hot direction, written out by hand.

Every message has passed `limits` before it comes here, so nothing is checked again.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeAlias

import orjson

from federation.v1 import command_pb2, errors_pb2, heartbeat_pb2, report_pb2, session_service_pb2
from federation_server.domain.access import IssuedToken
from federation_server.domain.analytics import (
    AnalyticsReport,
    Histogram,
    MetricKind,
    MetricPoint,
    ReportedEvent,
    Severity,
)
from federation_server.domain.command import (
    Accepted,
    CommandError,
    CommandState,
    CommandUpdate,
    Execution,
    Finished,
    Progressed,
)
from federation_server.domain.heartbeat import Heartbeat
from federation_server.domain.neuron import Activity, DependencyState
from federation_server.live.session import Cancel, Delivery, Outgoing, Reconnect, Refusal, Settings
from federation_server.rpc.convert import (
    from_struct,
    from_timestamp,
    optional_span,
    optional_time,
    to_duration,
    to_struct,
)
from federation_server.rpc.convert_access import token_to_proto

_ACTIVITY = {
    number: Activity(name.removeprefix("ACTIVITY_")).value
    for name, number in heartbeat_pb2.Activity.items()
}
_DEPENDENCY = {
    number: DependencyState(name.removeprefix("DEPENDENCY_STATE_")).value
    for name, number in heartbeat_pb2.DependencyState.items()
    if number
}
_SEVERITY = {
    number: Severity(name.removeprefix("SEVERITY_"))
    for name, number in report_pb2.Severity.items()
    if number
}
_FINISHED = {
    number: CommandState(name.removeprefix("COMMAND_STATE_"))
    for name, number in command_pb2.CommandState.items()
    if number
}
_EXECUTION = {each: command_pb2.Execution.Value(f"EXECUTION_{each.value}") for each in Execution}
_NO_SYSTEM = (None,) * 7
_NO_APPLICATION = (None,) * 11
_NO_PROCESS = (None,) * 5
_NO_SPOOL = (None,) * 8
_NONE_LOST = (None,) * 4

_Row: TypeAlias = tuple[Any, ...]


def heartbeat(message: heartbeat_pb2.Heartbeat) -> Heartbeat:
    """A checked Heartbeat as the row that is written."""
    has = message.HasField
    return Heartbeat._make(
        (
            from_timestamp(message.heartbeat_time) if has("heartbeat_time") else None,
            message.uptime.seconds + message.uptime.nanos / 1e9 if has("uptime") else None,
            message.health_score if has("health_score") else None,
            _ACTIVITY[message.activity],
            *(_system(message.system) if has("system") else _NO_SYSTEM),
            *(_application(message.application) if has("application") else _NO_APPLICATION),
            *(_process(message.process) if has("process") else _NO_PROCESS),
            *(_spool(message.spool) if has("spool") else _NO_SPOOL),
            message.running_commands,
            _host(message.host) if has("host") else None,
            _dependencies(message) if message.dependencies else None,
            _versions(message.versions) if has("versions") else None,
        )
    )


def _system(system: heartbeat_pb2.SystemMetrics) -> _Row:
    return (
        system.cpu_percent,
        system.memory_percent,
        system.memory_used_bytes,
        system.disk_percent,
        system.disk_used_bytes,
        system.network_received_bytes,
        system.network_sent_bytes,
    )


def _application(application: heartbeat_pb2.ApplicationMetrics) -> _Row:
    return (
        application.requests_per_second,
        application.mean_response_ms,
        application.p50_response_ms,
        application.p95_response_ms,
        application.p99_response_ms,
        application.active_connections,
        application.queue_size,
        application.error_rate_percent,
        application.requests,
        application.failed_requests,
        application.response_ms_sum,
    )


def _process(process: heartbeat_pb2.ProcessInfo) -> _Row:
    return (
        process.pid,
        process.threads,
        process.rss_bytes,
        process.open_files,
        process.cpu_percent,
    )


def _spool(spool: heartbeat_pb2.SpoolStatus) -> _Row:
    # Nearly every spool has room: what is 0 then takes none in the history.
    lost = (
        (
            spool.dropped_reports,
            spool.dropped_updates,
            spool.dropped_error_reports,
            spool.shortened_results,
        )
        if spool.dropped or spool.shortened_results
        else _NONE_LOST
    )
    return (spool.pending, spool.pending_bytes, spool.dropped, *lost, spool.in_memory)


def _host(host: heartbeat_pb2.HostInfo) -> str:
    return orjson.dumps(
        {
            "hostname": host.hostname,
            "os": host.os,
            "architecture": host.architecture,
            "cpu_count": host.cpu_count,
            "memory_bytes": host.memory_bytes,
        }
    ).decode()


def _dependencies(message: heartbeat_pb2.Heartbeat) -> str:
    return orjson.dumps(
        [
            {
                "name": dependency.name,
                "state": _DEPENDENCY[dependency.state],
                "latency_ms": dependency.latency_ms,
                "message": dependency.message,
                "check_time": optional_time(dependency, "check_time"),
            }
            for dependency in message.dependencies
        ]
    ).decode()


def _versions(versions: heartbeat_pb2.Versions) -> str:
    return orjson.dumps(
        {"service": versions.service, "sdk": versions.sdk, "runtime": versions.runtime}
    ).decode()


def report(message: report_pb2.AnalyticsReport, send_time: datetime) -> AnalyticsReport:
    """A checked AnalyticsReport; its age and its events' ages are by the neuron's own clock."""
    points = [_point(point) for point in message.points]
    points += [
        MetricPoint(name, MetricKind.GAUGE, "", {}, value)
        for name, value in message.custom_metrics.items()
    ]
    return AnalyticsReport(
        age=send_time - from_timestamp(message.end_time),
        points=points,
        events=[_event(event, send_time) for event in message.events],
    )


def _point(point: report_pb2.MetricPoint) -> MetricPoint:
    labels = dict(point.labels)
    match point.WhichOneof("value"):
        case "counter":
            return MetricPoint(point.name, MetricKind.COUNTER, point.unit, labels, point.counter)
        case "gauge":
            return MetricPoint(point.name, MetricKind.GAUGE, point.unit, labels, point.gauge)
        case _:
            histogram = _histogram(point.histogram)
            return MetricPoint(point.name, MetricKind.HISTOGRAM, point.unit, labels, histogram)


def _histogram(value: report_pb2.HistogramValue) -> Histogram:
    return Histogram(
        bounds=list(value.bounds),
        bucket_counts=list(value.bucket_counts),
        sum=value.sum,
        min=value.min if value.HasField("min") else None,
        max=value.max if value.HasField("max") else None,
    )


def _event(event: report_pb2.ReportedEvent, send_time: datetime) -> ReportedEvent:
    return ReportedEvent(
        age=send_time - from_timestamp(event.event_time),
        severity=_SEVERITY[event.severity],
        type=event.type,
        message=event.message,
        attributes=from_struct(event.attributes),
    )


def command_update(message: session_service_pb2.CommandUpdate) -> CommandUpdate:
    """A checked CommandUpdate."""
    change: Accepted | Progressed | Finished
    match message.WhichOneof("update"):
        case "accepted":
            change = Accepted()
        case "progressed":
            said = message.progressed
            checkpoint = from_struct(said.checkpoint) if said.HasField("checkpoint") else None
            change = Progressed(said.fraction, said.message, checkpoint)
        case _:
            change = _finished(message.finished)
    return CommandUpdate(message.command_id, message.attempt, change)


def _finished(message: session_service_pb2.CommandFinished) -> Finished:
    error = None
    if message.HasField("error"):
        details = message.error.details if message.error.HasField("details") else None
        error = CommandError(
            message.error.code,
            message.error.message,
            None if details is None else from_struct(details),
        )
    return Finished(
        state=_FINISHED[message.state],
        response=from_struct(message.response) if message.HasField("response") else None,
        error=error,
        run_duration=optional_span(message, "run_duration"),
        log_tail=message.log_tail,
    )


def outgoing(message: Outgoing) -> session_service_pb2.FederationMessage:
    """A message to the neuron, without an acknowledgement."""
    envelope = session_service_pb2.FederationMessage
    match message:
        case Delivery():
            return envelope(command=delivery(message))
        case Cancel():
            return envelope(cancel_command=cancel(message))
        case Settings():
            return envelope(settings=settings(message))
        case Reconnect():
            reconnect = session_service_pb2.Reconnect(
                after=to_duration(message.after), reason=message.reason
            )
            return envelope(reconnect=reconnect)
        case Refusal():
            return envelope(refusal=_refusal(message))
        case IssuedToken():
            rotation = session_service_pb2.TokenRotation(token=token_to_proto(message))
            return envelope(token_rotation=rotation)


def settings(message: Settings) -> session_service_pb2.SessionSettings:
    """The intervals to keep."""
    return session_service_pb2.SessionSettings(
        heartbeat_interval=to_duration(message.heartbeat_interval),
        analytics_interval=to_duration(message.analytics_interval),
        min_heartbeat_interval=to_duration(message.min_heartbeat_interval),
    )


def cancel(message: Cancel) -> session_service_pb2.CancelCommand:
    """A command to give up."""
    return session_service_pb2.CancelCommand(
        command_id=message.command_id, attempt=message.attempt, reason=message.reason
    )


def delivery(command: Delivery) -> session_service_pb2.CommandDelivery:
    """A command to carry out."""
    return session_service_pb2.CommandDelivery(
        command_id=command.command_id,
        attempt=command.attempt,
        type=command.type,
        data=to_struct(command.data),
        priority=command.priority,
        run_timeout=to_duration(command.run_timeout),
        expire_after=to_duration(command.expire_after),
        checkpoint=to_struct(command.checkpoint),
        max_attempts=command.max_attempts,
        execution=_EXECUTION[command.execution],
    )


def _refusal(refusal: Refusal) -> session_service_pb2.Refusal:
    return session_service_pb2.Refusal(
        sequence=refusal.sequence,
        message=refusal.message,
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{refusal.reason}"),
        detail=refusal.detail,
        field_violations=[
            session_service_pb2.FieldViolation(field=field, description=description)
            for field, description in refusal.violations.items()
        ],
    )
