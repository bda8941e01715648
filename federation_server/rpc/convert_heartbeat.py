"""From a heartbeat in the history to the contract's.

The other way is the hot path's, in `convert_stream`. A part of the message whose columns are all
NULL was not in it; a number within a part that is there always is.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import orjson

from federation.v1 import fleet_service_pb2, heartbeat_pb2
from federation_server.domain.heartbeat import Heartbeat, StoredHeartbeat
from federation_server.domain.neuron import Activity, DependencyState
from federation_server.rpc.convert import to_duration, to_timestamp

_ACTIVITY = {
    activity.value: heartbeat_pb2.Activity.Value(f"ACTIVITY_{activity.value}")
    for activity in Activity
}
_DEPENDENCY = {
    state.value: heartbeat_pb2.DependencyState.Value(f"DEPENDENCY_STATE_{state.value}")
    for state in DependencyState
}
_SYSTEM = (
    "cpu_percent",
    "memory_percent",
    "memory_used_bytes",
    "disk_percent",
    "disk_used_bytes",
    "network_received_bytes",
    "network_sent_bytes",
)
_APPLICATION = (
    "requests_per_second",
    "mean_response_ms",
    "p50_response_ms",
    "p95_response_ms",
    "p99_response_ms",
    "active_connections",
    "queue_size",
    "error_rate_percent",
    "requests",
    "failed_requests",
    "response_ms_sum",
)
_PROCESS = ("pid", "threads", "rss_bytes", "open_files")
_SPOOL = tuple(f"spool_{field.name}" for field in heartbeat_pb2.SpoolStatus.DESCRIPTOR.fields)


def heartbeat_to_proto(row: Heartbeat) -> heartbeat_pb2.Heartbeat:
    """A heartbeat as the neuron sent it."""
    return heartbeat_pb2.Heartbeat(
        heartbeat_time=to_timestamp(row.heartbeat_time),
        uptime=to_duration(row.uptime_s),
        health_score=row.health_score,
        activity=_ACTIVITY[row.activity],
        system=_part(heartbeat_pb2.SystemMetrics, _said(row, _SYSTEM)),
        application=_part(heartbeat_pb2.ApplicationMetrics, _said(row, _APPLICATION)),
        process=_part(heartbeat_pb2.ProcessInfo, _process(row)),
        host=_part(heartbeat_pb2.HostInfo, orjson.loads(row.host or "{}")),
        dependencies=[
            _dependency(dependency) for dependency in orjson.loads(row.dependencies or "[]")
        ],
        versions=_part(heartbeat_pb2.Versions, orjson.loads(row.versions or "{}")),
        spool=_part(heartbeat_pb2.SpoolStatus, _spool(row)),
        running_commands=row.running_commands,
    )


def stored_heartbeat_to_proto(stored: StoredHeartbeat) -> fleet_service_pb2.StoredHeartbeat:
    """A heartbeat with its place in the history."""
    return fleet_service_pb2.StoredHeartbeat(
        receive_time=to_timestamp(stored.receive_time),
        epoch=stored.epoch,
        heartbeat=heartbeat_to_proto(stored.heartbeat),
    )


def _part(message: Any, said: Mapping[str, Any]) -> Any:
    """A part of a heartbeat; None if nothing of it was said."""
    return message(**said) if said else None


def _said(row: Heartbeat, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _process(row: Heartbeat) -> dict[str, Any]:
    said = _said(row, _PROCESS)
    if row.process_cpu_percent is not None:
        said["cpu_percent"] = row.process_cpu_percent
    return said


def _spool(row: Heartbeat) -> dict[str, Any]:
    said = _said(row, _SPOOL)
    return {name.removeprefix("spool_"): value for name, value in said.items()}


def _dependency(stored: dict[str, Any]) -> heartbeat_pb2.DependencyStatus:
    check_time = stored.get("check_time")
    return heartbeat_pb2.DependencyStatus(
        name=stored["name"],
        state=_DEPENDENCY[stored["state"]],
        latency_ms=stored.get("latency_ms", 0.0),
        message=stored.get("message", ""),
        check_time=to_timestamp(datetime.fromisoformat(check_time)) if check_time else None,
    )
