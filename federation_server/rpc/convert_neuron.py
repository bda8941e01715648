"""Between the contract's neuron and the domain's.

Nested parts of a description are JSON objects in the domain and in the store, with the contract's
field names; a span there is seconds, named `…_s`. An absent part is an empty object, and absent
again on the way back; what has defaults is stored with them filled in.
"""

from __future__ import annotations

from typing import Any, cast

from google.protobuf.duration_pb2 import Duration

from federation.v1 import fleet_service_pb2, heartbeat_pb2, neuron_pb2
from federation_server.domain.access import approval_code
from federation_server.domain.doubt import Cause
from federation_server.domain.fleet import DoubtfulServer, FleetOverview, NeuronSummary
from federation_server.domain.neuron import (
    DEFAULT_ALERT_THRESHOLDS,
    DEFAULT_MAX_CONCURRENT_COMMANDS,
    JsonObject,
    Lifecycle,
    NeuronDescription,
    NeuronRecord,
    Presence,
    SessionRecord,
    Totals,
)
from federation_server.rpc.convert import (
    from_duration,
    from_struct,
    to_duration,
    to_struct,
    to_timestamp,
)

DEFAULT_METHOD = "GET"

LIFECYCLE = {
    lifecycle: neuron_pb2.Lifecycle.Value(f"LIFECYCLE_{lifecycle.value}") for lifecycle in Lifecycle
}
CAUSE = {cause: fleet_service_pb2.DoubtCause.Value(f"DOUBT_CAUSE_{cause.value}") for cause in Cause}
PRESENCE = {
    presence: neuron_pb2.Presence.Value(f"PRESENCE_{presence.value}") for presence in Presence
}


def description_from_proto(message: neuron_pb2.NeuronDescription) -> NeuronDescription:
    """A checked description, with defaults filled in."""
    return NeuronDescription(
        neuron_id=message.neuron_id,
        name=message.name or message.neuron_id,
        type=message.type,
        language=message.language,
        version=message.version,
        base_url=message.base_url,
        healthcheck_endpoint=message.healthcheck_endpoint,
        api_endpoints=[_endpoint_from(endpoint) for endpoint in message.api_endpoints],
        capabilities=list(message.capabilities),
        dependencies=list(message.dependencies),
        command_types=[_command_type_from(command) for command in message.command_types],
        resource_requirements=_requirements_from(message),
        deployment=_deployment_from(message),
        alert_thresholds=_thresholds_from(message.alert_thresholds),
        auto_restart=_auto_restart_from(message),
        labels=dict(message.labels),
        metadata=from_struct(message.metadata),
        max_concurrent_commands=(
            message.max_concurrent_commands or DEFAULT_MAX_CONCURRENT_COMMANDS
        ),
    )


def _endpoint_from(endpoint: neuron_pb2.ApiEndpoint) -> JsonObject:
    return {
        "path": endpoint.path,
        "method": endpoint.method or DEFAULT_METHOD,
        "description": endpoint.description,
    }


def _command_type_from(command: neuron_pb2.CommandType) -> JsonObject:
    described: JsonObject = {
        "type": command.type,
        "description": command.description,
        "control": command.control,
    }
    if not command.HasField("data_schema"):
        return described
    return {**described, "data_schema": from_struct(command.data_schema)}


def _requirements_from(message: neuron_pb2.NeuronDescription) -> JsonObject:
    if not message.HasField("resource_requirements"):
        return {}
    wanted = message.resource_requirements
    return {
        "cpu_cores": wanted.cpu_cores,
        "memory_bytes": wanted.memory_bytes,
        "storage_bytes": wanted.storage_bytes,
    }


def _deployment_from(message: neuron_pb2.NeuronDescription) -> JsonObject:
    if not message.HasField("deployment"):
        return {}
    deployment = message.deployment
    return {
        "type": deployment.type,
        "image": deployment.image,
        "ports": list(deployment.ports),
    }


def _thresholds_from(thresholds: neuron_pb2.AlertThresholds) -> JsonObject:
    said = {
        "cpu_percent": thresholds.cpu_percent,
        "memory_percent": thresholds.memory_percent,
        "error_rate_percent": thresholds.error_rate_percent,
        "response_time_ms": thresholds.response_time_ms,
        "heartbeat_timeout_s": from_duration(thresholds.heartbeat_timeout).total_seconds(),
        "health_score": thresholds.health_score,
    }
    return {name: said[name] or default for name, default in DEFAULT_ALERT_THRESHOLDS.items()}


def _auto_restart_from(message: neuron_pb2.NeuronDescription) -> JsonObject:
    if not message.HasField("auto_restart"):
        return {}
    return {
        "enabled": message.auto_restart.enabled,
        "max_attempts": message.auto_restart.max_attempts,
    }


def description_to_proto(description: NeuronDescription) -> neuron_pb2.NeuronDescription:
    """A description as the contract writes it."""
    return neuron_pb2.NeuronDescription(
        neuron_id=description.neuron_id,
        name=description.name,
        type=description.type,
        language=description.language,
        version=description.version,
        base_url=description.base_url,
        healthcheck_endpoint=description.healthcheck_endpoint,
        api_endpoints=[
            neuron_pb2.ApiEndpoint(**_fields(endpoint)) for endpoint in description.api_endpoints
        ],
        capabilities=description.capabilities,
        dependencies=description.dependencies,
        command_types=[_command_type(command) for command in description.command_types],
        resource_requirements=(
            neuron_pb2.ResourceRequirements(**_fields(description.resource_requirements))
            if description.resource_requirements
            else None
        ),
        deployment=(
            neuron_pb2.Deployment(**_fields(description.deployment))
            if description.deployment
            else None
        ),
        alert_thresholds=_thresholds(description.alert_thresholds),
        auto_restart=(
            neuron_pb2.AutoRestart(**_fields(description.auto_restart))
            if description.auto_restart
            else None
        ),
        labels=description.labels,
        metadata=to_struct(description.metadata) if description.metadata else None,
        max_concurrent_commands=description.max_concurrent_commands,
    )


def _fields(value: JsonObject) -> dict[str, Any]:
    """A stored JSON object as the arguments of its message: the names are the same."""
    return dict(value)


def _command_type(command: JsonObject) -> neuron_pb2.CommandType:
    fields = _fields(command)
    schema = fields.pop("data_schema", None)
    return neuron_pb2.CommandType(**fields, data_schema=to_struct(schema))


def _thresholds(stored: JsonObject) -> neuron_pb2.AlertThresholds:
    fields = {**DEFAULT_ALERT_THRESHOLDS, **_fields(stored)}
    timeout = to_duration(float(fields.pop("heartbeat_timeout_s")))
    return neuron_pb2.AlertThresholds(**fields, heartbeat_timeout=cast("Duration", timeout))


def neuron_to_proto(
    record: NeuronRecord, last_heartbeat: heartbeat_pb2.Heartbeat | None = None
) -> neuron_pb2.Neuron:
    """A neuron as the contract writes it; its last heartbeat only where the RPC shows one."""
    return neuron_pb2.Neuron(
        neuron_id=record.neuron_id,
        description=description_to_proto(record.description),
        overridden_fields=record.overridden_fields,
        lifecycle=LIFECYCLE[record.lifecycle],
        lifecycle_reason=record.lifecycle_reason,
        presence=PRESENCE[record.presence],
        presence_time=to_timestamp(record.presence_time),
        presence_reason=record.presence_reason,
        create_time=to_timestamp(record.create_time),
        update_time=to_timestamp(record.update_time),
        session=None if record.session is None else _session(record.session),
        last_heartbeat_time=to_timestamp(record.last_heartbeat_time),
        last_heartbeat=last_heartbeat,
        health_score=record.health_score,
        cpu_percent=record.cpu_percent,
        memory_percent=record.memory_percent,
        error_rate_percent=record.error_rate_percent,
        mean_response_ms=record.mean_response_ms,
        uptime=to_duration(record.uptime_s),
        totals=_totals(record.totals),
        host=None if record.host is None else _host(record.host),
        approval_code=(
            approval_code(record.neuron_id, record.create_time)
            if record.lifecycle is Lifecycle.PENDING
            else ""
        ),
    )


def _session(session: SessionRecord) -> neuron_pb2.SessionInfo:
    return neuron_pb2.SessionInfo(
        session_id=session.session_id,
        epoch=session.epoch,
        open=session.open,
        open_time=to_timestamp(session.open_time),
        close_time=to_timestamp(session.close_time),
        instance_id=session.instance_id,
        sdk=(
            neuron_pb2.Sdk(name=session.sdk_name, version=session.sdk_version)
            if session.sdk_name
            else None
        ),
        server_id=session.server_id,
        peer=session.peer,
        lease_expire_time=to_timestamp(session.lease_expire_time),
    )


def _host(host: JsonObject) -> heartbeat_pb2.HostInfo:
    said: Any = host  # as `convert_stream` wrote it
    return heartbeat_pb2.HostInfo(**said)


def _totals(totals: Totals) -> neuron_pb2.NeuronTotals:
    return neuron_pb2.NeuronTotals(
        requests=totals.requests,
        failed_requests=totals.failed_requests,
        mean_response_ms=totals.mean_response_ms,
        uptime=to_duration(totals.uptime_s),
    )


def overview_to_proto(overview: FleetOverview) -> fleet_service_pb2.GetFleetOverviewResponse:
    """The fleet's numbers as the contract writes them."""
    return fleet_service_pb2.GetFleetOverviewResponse(
        total=overview.total,
        presences=[
            fleet_service_pb2.PresenceCount(presence=PRESENCE[presence], count=count)
            for presence, count in overview.presences.items()
        ],
        lifecycles=[
            fleet_service_pb2.LifecycleCount(lifecycle=LIFECYCLE[lifecycle], count=count)
            for lifecycle, count in overview.lifecycles.items()
        ],
        types=[
            fleet_service_pb2.TypeCount(type=name, count=count) for name, count in overview.types
        ],
        mean_health_score=overview.mean_health_score,
        slowest=[_summary(neuron) for neuron in overview.slowest],
        worst=[_summary(neuron) for neuron in overview.worst],
        server_time=to_timestamp(overview.time),
        doubts=[_doubt(server) for server in overview.doubts],
    )


def _doubt(server: DoubtfulServer) -> fleet_service_pb2.ServerDoubt:
    return fleet_service_pb2.ServerDoubt(
        server_id=server.server_id,
        causes=[CAUSE[cause] for cause in server.causes],
        since_time=to_timestamp(server.since),
        sweeping=server.sweeping,
    )


def _summary(neuron: NeuronSummary) -> fleet_service_pb2.NeuronSummary:
    return fleet_service_pb2.NeuronSummary(
        neuron_id=neuron.neuron_id,
        type=neuron.type,
        health_score=neuron.health_score,
        mean_response_ms=neuron.mean_response_ms,
    )
