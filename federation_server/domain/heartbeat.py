"""One heartbeat as the hot path carries it: a plain tuple in the order of its table's columns."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple


class Heartbeat(NamedTuple):
    """A neuron's state at one moment; units as in the contract's Heartbeat.

    None stands for what the neuron did not say. `host`, `dependencies` and `versions` are JSON
    text. The field names are those of the columns of the table `heartbeats`.
    """

    heartbeat_time: datetime | None
    uptime_s: float | None
    health_score: float | None
    activity: str
    cpu_percent: float | None
    memory_percent: float | None
    memory_used_bytes: int | None
    disk_percent: float | None
    disk_used_bytes: int | None
    network_received_bytes: int | None
    network_sent_bytes: int | None
    requests_per_second: float | None
    mean_response_ms: float | None
    p50_response_ms: float | None
    p95_response_ms: float | None
    p99_response_ms: float | None
    active_connections: int | None
    queue_size: int | None
    error_rate_percent: float | None
    requests: int | None
    failed_requests: int | None
    response_ms_sum: float | None
    pid: int | None
    threads: int | None
    rss_bytes: int | None
    open_files: int | None
    process_cpu_percent: float | None
    spool_pending: int | None
    spool_pending_bytes: int | None
    spool_dropped: int | None
    spool_dropped_reports: int | None
    spool_dropped_updates: int | None
    spool_dropped_error_reports: int | None
    spool_shortened_results: int | None
    spool_in_memory: bool | None
    running_commands: int
    host: str | None
    dependencies: str | None
    versions: str | None


class StoredHeartbeat(NamedTuple):
    """A heartbeat in the history: when it came, and on which session (0: on none)."""

    receive_time: datetime
    epoch: int
    heartbeat: Heartbeat
