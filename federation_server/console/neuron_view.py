"""How a neuron reads: a row in a list, and the whole of it on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from federation.v1.neuron_pb2 import Lifecycle, Presence
from federation_server.console import heartbeat_view
from federation_server.console.render import Column, struct_json, to_dict
from federation_server.console.wording import (
    NOTHING,
    both,
    enum,
    joined,
    listed,
    milliseconds,
    number,
    pairs,
    percent,
    relative,
    size,
    span,
)

if TYPE_CHECKING:
    from federation.v1.neuron_pb2 import (
        AlertThresholds,
        CommandType,
        Neuron,
        ResourceRequirements,
    )
    from federation_server.console.render import Output

Facts = list[tuple[str, str]]

COLUMNS = (
    Column("NEURON", folds=True),
    Column("TYPE", folds=True),
    Column("PRESENCE"),
    Column("HEALTH", right=True),
    Column("CPU", right=True),
    Column("MEM", right=True, spare=True),
    Column("ERR", right=True, spare=True),
    Column("RESP", right=True),
    Column("HEARTBEAT"),
)


def state(neuron: Neuron) -> str:
    """The presence, or the lifecycle where that says more."""
    if neuron.lifecycle != Lifecycle.LIFECYCLE_ACTIVE:
        return enum(Lifecycle, neuron.lifecycle)
    return enum(Presence, neuron.presence)


def row(neuron: Neuron) -> tuple[str, ...]:
    """A neuron's row under COLUMNS."""
    has = neuron.HasField
    return (
        neuron.neuron_id,
        neuron.description.type,
        state(neuron),
        number(round(neuron.health_score, 1)) if has("health_score") else NOTHING,
        percent(neuron.cpu_percent) if has("cpu_percent") else NOTHING,
        percent(neuron.memory_percent) if has("memory_percent") else NOTHING,
        percent(neuron.error_rate_percent) if has("error_rate_percent") else NOTHING,
        milliseconds(neuron.mean_response_ms) if has("mean_response_ms") else NOTHING,
        relative(neuron.last_heartbeat_time),
    )


def show(out: Output, neuron: Neuron) -> None:
    """Prints all that is known of a neuron."""
    out.facts(neuron.neuron_id, _standing(neuron))
    out.facts("Description", _description(neuron))
    out.facts("Session", _session(neuron))
    if neuron.HasField("last_heartbeat"):
        beat = neuron.last_heartbeat
        received = both(neuron.last_heartbeat_time)
        out.facts("Last heartbeat", heartbeat_view.facts(beat, received, neuron.host))
        out.facts("Dependencies", heartbeat_view.dependencies(beat))
    out.facts(
        "Commands", [(each.type, _command(each)) for each in neuron.description.command_types]
    )
    out.facts("Whole life", _totals(neuron))


def _standing(neuron: Neuron) -> Facts:
    presence = enum(Presence, neuron.presence)
    lifecycle = enum(Lifecycle, neuron.lifecycle)
    reason = f": {neuron.presence_reason}" if neuron.presence_reason else ""
    since = relative(neuron.presence_time)
    because = f": {neuron.lifecycle_reason}" if neuron.lifecycle_reason else ""
    return [
        ("presence", f"{presence}, {since}{reason}" if since != NOTHING else presence + reason),
        ("lifecycle", lifecycle + because),
        ("approval code", neuron.approval_code),
        (
            "health",
            number(round(neuron.health_score, 1)) if neuron.HasField("health_score") else "",
        ),
        ("registered", both(neuron.create_time)),
        ("described", both(neuron.update_time)),
        ("set by an admin", ", ".join(neuron.overridden_fields)),
    ]


def _description(neuron: Neuron) -> Facts:
    said = neuron.description
    deployed = said.deployment
    ports = ", ".join(map(str, deployed.ports))
    return [
        ("name", said.name if said.name != said.neuron_id else ""),
        ("type", joined(said.type, said.language, said.version)),
        ("url", joined(said.base_url, said.healthcheck_endpoint)),
        ("labels", pairs(said.labels.items())),
        ("capabilities", ", ".join(said.capabilities)),
        ("needs", ", ".join(said.dependencies)),
        ("API", ", ".join(f"{each.method or 'GET'} {each.path}" for each in said.api_endpoints)),
        ("wants", _wants(said.resource_requirements)),
        ("deployed", joined(deployed.type, deployed.image, f"ports {ports}" if ports else "")),
        ("alert", _limits(said.alert_thresholds) if said.HasField("alert_thresholds") else ""),
        ("restarted", "by its supervisor" if said.auto_restart.enabled else ""),
        ("runs at once", f"{said.max_concurrent_commands} commands"),
        ("metadata", struct_json(said.metadata) if said.metadata.fields else ""),
    ]


def _wants(wants: ResourceRequirements) -> str:
    return joined(
        f"{number(wants.cpu_cores)} cores" if wants.cpu_cores else "",
        f"{size(wants.memory_bytes)} memory" if wants.memory_bytes else "",
        f"{size(wants.storage_bytes)} storage" if wants.storage_bytes else "",
    )


def _limits(limits: AlertThresholds) -> str:
    return listed(
        f"CPU > {percent(limits.cpu_percent)}",
        f"memory > {percent(limits.memory_percent)}",
        f"errors > {percent(limits.error_rate_percent)}",
        f"response > {milliseconds(limits.response_time_ms)}",
        f"silence > {span(limits.heartbeat_timeout)}",
        f"health < {number(limits.health_score)}",
    )


def _session(neuron: Neuron) -> Facts:
    if not neuron.HasField("session"):
        return [("", "it never had one")]
    session = neuron.session
    if session.HasField("lease_expire_time"):
        return [
            ("stream", "none: it pulls its commands"),
            ("lease", f"until {both(session.lease_expire_time)}"),
            ("id", f"epoch {session.epoch}"),
            ("process", session.instance_id),
        ]
    opened = "open" if session.open else f"closed {relative(session.close_time)}, opened"
    return [
        ("stream", f"{opened} {both(session.open_time)}"),
        ("id", f"{session.session_id}, epoch {session.epoch}"),
        ("process", joined(session.instance_id, session.peer)),
        ("SDK", f"{session.sdk.name} {session.sdk.version}".strip()),
        ("server", session.server_id),
    ]


def _command(command: CommandType) -> str:
    schema = to_dict(command.data_schema)
    known, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    names = list(known) if isinstance(known, dict) else []
    names.sort(key=lambda name: (name not in needed, name))
    lane = "control" if command.control else ""
    takes = ", ".join(name if name in needed else f"{name}?" for name in names)
    return joined(f"({takes})", command.description.partition("\n")[0], lane)


def _totals(neuron: Neuron) -> Facts:
    if not neuron.HasField("totals"):
        return []
    totals = neuron.totals
    return [
        ("requests", f"{totals.requests}, {totals.failed_requests} failed"),
        ("response", f"mean {milliseconds(totals.mean_response_ms)}"),
        ("up", span(totals.uptime)),
    ]
