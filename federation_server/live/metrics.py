"""The server's own numbers, for Prometheus.

They live in a registry of their own that `app.py` serves over HTTP; nothing here is global, and
nothing on the hot path touches a metric per message: the writer counts once a batch.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_ITEMS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """Every metric of a server process."""

    def __init__(self) -> None:
        """Metrics at zero, in a registry of their own."""
        self.registry = CollectorRegistry()
        self.streams = Gauge(
            "federation_streams", "Neuron streams open now", registry=self.registry
        )
        self.sessions_opened = Counter(
            "federation_sessions_opened", "Sessions opened", registry=self.registry
        )
        self.admission_refused = Counter(
            "federation_admission_refused",
            "New streams and registrations that were told to come later",
            ["kind"],
            registry=self.registry,
        )
        self.limited = Counter(
            "federation_limited",
            "Calls that were refused because one caller makes too many, by the limit",
            ["limit"],
            registry=self.registry,
        )
        self.heartbeat_interval = Gauge(
            "federation_heartbeat_interval_seconds",
            "The least interval between heartbeats that streams are held to; 0: none",
            registry=self.registry,
        )
        self.heartbeats = Counter(
            "federation_heartbeats", "Heartbeats stored", registry=self.registry
        )
        self.reports = Counter(
            "federation_reports", "Analytics reports received", registry=self.registry
        )
        self.rollups = Counter(
            "federation_rollups",
            "Minutes, hours and days that metrics were added up for",
            registry=self.registry,
        )
        self.streams_given_up = Counter(
            "federation_streams_given_up",
            "Streams that were ended because the other side says, or reads, nothing",
            ["cause"],
            registry=self.registry,
        )
        self.refused = Counter(
            "federation_refused",
            "Messages of neurons that were refused",
            registry=self.registry,
        )
        self.flush_seconds = Histogram(
            "federation_flush_seconds",
            "Time of one transaction of the writer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.flush_items = Histogram(
            "federation_flush_items",
            "Items in one transaction of the writer",
            buckets=_ITEMS,
            registry=self.registry,
        )
        self.flush_failures = Counter(
            "federation_flush_failures",
            "Transactions of the writer that failed and were repeated",
            registry=self.registry,
        )
        self.commands_issued = Counter(
            "federation_commands_issued", "Commands issued", registry=self.registry
        )
        self.commands_sent = Counter(
            "federation_commands_sent", "Commands written to a stream", registry=self.registry
        )
        self.commands_ended = Counter(
            "federation_commands_ended",
            "Commands that reached a final state",
            ["state"],
            registry=self.registry,
        )
        self.command_seconds = Histogram(
            "federation_command_seconds",
            "Time from a command's issue to its final state",
            buckets=_LONG_SECONDS,
            registry=self.registry,
        )
        self.database_up = Gauge(
            "federation_database_up", "1 while PostgreSQL answers", registry=self.registry
        )
        self.neurons = Gauge(
            "federation_neurons",
            "Neurons by presence, as the sweeper last counted them",
            ["presence"],
            registry=self.registry,
        )
        self.sweeper_active = Gauge(
            "federation_sweeper_active",
            "1 on the server that sweeps",
            registry=self.registry,
        )
        self.presence_frozen = Gauge(
            "federation_presence_frozen",
            "1 while this server is in doubt of itself, and neurons are not marked down for that",
            ["cause"],
            registry=self.registry,
        )
        self.open_files = Gauge(
            "federation_open_files",
            "Files that the process has open; each connection is one",
            registry=self.registry,
        )
        self.open_files_limit = Gauge(
            "federation_open_files_limit",
            "How many it may have open",
            registry=self.registry,
        )
        self.certificate_expire_time = Gauge(
            "federation_tls_certificate_expire_time_seconds",
            "When what the gRPC port speaks TLS with expires, in seconds since 1970",
            ["certificate"],
            registry=self.registry,
        )
