"""How a heartbeat reads: a row in its history, and the whole of it in facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from federation.v1.heartbeat_pb2 import Activity, DependencyState
from federation_server.console.render import Column
from federation_server.console.wording import (
    NOTHING,
    absolute,
    enum,
    joined,
    listed,
    milliseconds,
    number,
    percent,
    size,
    span,
)

if TYPE_CHECKING:
    from federation.v1.fleet_service_pb2 import StoredHeartbeat
    from federation.v1.heartbeat_pb2 import (
        ApplicationMetrics,
        Heartbeat,
        HostInfo,
        ProcessInfo,
        SpoolStatus,
        SystemMetrics,
    )

Facts = list[tuple[str, str]]

COLUMNS = (
    Column("RECEIVED", folds=True),
    Column("HEALTH", right=True),
    Column("DOING"),
    Column("CPU", right=True),
    Column("MEM", right=True),
    Column("REQ/S", right=True),
    Column("MEAN", right=True),
    Column("P95", right=True, spare=True),
    Column("ERR", right=True),
    Column("QUEUE", right=True, spare=True),
)


def row(stored: StoredHeartbeat) -> tuple[str, ...]:
    """A heartbeat's row under COLUMNS."""
    beat = stored.heartbeat
    load = beat.application
    return (
        absolute(stored.receive_time),
        number(round(beat.health_score, 1)) if beat.HasField("health_score") else NOTHING,
        enum(Activity, beat.activity),
        percent(beat.system.cpu_percent),
        percent(beat.system.memory_percent),
        number(load.requests_per_second),
        milliseconds(load.mean_response_ms),
        milliseconds(load.p95_response_ms),
        percent(load.error_rate_percent),
        number(load.queue_size),
    )


def facts(beat: Heartbeat, received: str, host: HostInfo) -> Facts:
    activity = enum(Activity, beat.activity) if beat.activity else ""
    versions = beat.versions
    return [
        ("received", joined(received, activity)),
        ("up for", span(beat.uptime)),
        ("running", f"{beat.running_commands} commands" if beat.running_commands else ""),
        *_application(beat.application),
        *_host(beat.system, host),
        ("process", _process(beat.process)),
        ("versions", joined(versions.service, versions.sdk, versions.runtime)),
        ("spool", _spool(beat.spool)),
    ]


def _application(load: ApplicationMetrics) -> Facts:
    requests = listed(
        f"{number(load.requests_per_second)}/s",
        f"errors {percent(load.error_rate_percent)}",
        f"{load.active_connections} connections",
        f"{load.queue_size} waiting",
    )
    response = listed(
        f"mean {milliseconds(load.mean_response_ms)}",
        f"p50 {milliseconds(load.p50_response_ms)}",
        f"p95 {milliseconds(load.p95_response_ms)}",
        f"p99 {milliseconds(load.p99_response_ms)}",
    )
    return [("requests", requests), ("response", response)]


def _host(load: SystemMetrics, host: HostInfo) -> Facts:
    use = listed(
        f"CPU {percent(load.cpu_percent)}",
        f"memory {percent(load.memory_percent)} ({size(load.memory_used_bytes)})",
        f"disk {percent(load.disk_percent)} ({size(load.disk_used_bytes)})",
    )
    received, sent = size(load.network_received_bytes), size(load.network_sent_bytes)
    is_a = joined(
        host.hostname,
        f"{host.os} {host.architecture}".strip(),
        f"{host.cpu_count} CPUs" if host.cpu_count else "",
        size(host.memory_bytes) if host.memory_bytes else "",
    )
    return [("host", is_a), ("host load", use), ("network", f"{received} in, {sent} out")]


def _process(process: ProcessInfo) -> str:
    return listed(
        f"pid {process.pid}",
        f"{process.threads} threads",
        size(process.rss_bytes),
        f"{process.open_files} files",
        f"CPU {percent(process.cpu_percent)}",
    )


def _spool(spool: SpoolStatus) -> str:
    shortened = spool.shortened_results
    parts = [
        f"{spool.pending} waiting ({size(spool.pending_bytes)})",
        f"{spool.dropped} dropped{_by_class(spool)}",
    ]
    if shortened:
        parts.append(f"{shortened} results kept without their response")
    if spool.in_memory:
        parts.append("in memory: the neuron's disk does not take it")
    return listed(*parts)


def _by_class(spool: SpoolStatus) -> str:
    """Nothing of a neuron that does not tell classes apart."""
    classes = {
        "reports": spool.dropped_reports,
        "overtaken updates": spool.dropped_updates,
        "reports of errors": spool.dropped_error_reports,
    }
    said = listed(*(f"{count} {name}" for name, count in classes.items() if count))
    return f" ({said})" if said else ""


def dependencies(beat: Heartbeat) -> Facts:
    return [
        (
            each.name,
            joined(
                enum(DependencyState, each.state),
                milliseconds(each.latency_ms) if each.latency_ms else "",
                each.message,
            ),
        )
        for each in beat.dependencies
    ]
