"""The tables, as SQLAlchemy sees them.

The migrations make the tables; a test proves that this description and what the migrations made
are the same. Times are `timestamptz`, set by PostgreSQL's clock unless the name says otherwise
(`heartbeat_time` is the neuron's). Spans that SQL does not compute with are seconds (`_s`).
"""

from __future__ import annotations

import enum

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Enum,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

from federation_server.domain.access import Role
from federation_server.domain.analytics import MetricKind, Severity
from federation_server.domain.command import CommandState, Execution
from federation_server.domain.doubt import Cause
from federation_server.domain.neuron import Activity, Lifecycle, Presence
from federation_server.domain.rollup import Level

metadata = MetaData()

_TIME = DateTime(timezone=True)


def _enum(kind: type[enum.Enum], name: str) -> Enum:
    return Enum(kind, name=name, create_type=False, values_callable=lambda e: [m.name for m in e])


LIFECYCLE = _enum(Lifecycle, "lifecycle")
PRESENCE = _enum(Presence, "presence")
ACTIVITY = _enum(Activity, "activity")
COMMAND_STATE = _enum(CommandState, "command_state")
EXECUTION = _enum(Execution, "execution")
METRIC_KIND = _enum(MetricKind, "metric_kind")
SEVERITY = _enum(Severity, "severity")
ROLE = _enum(Role, "role")
ROLLUP_LEVEL = _enum(Level, "rollup_level")
DOUBT_CAUSE = _enum(Cause, "doubt_cause")

ENUMS = (
    LIFECYCLE,
    PRESENCE,
    ACTIVITY,
    COMMAND_STATE,
    EXECUTION,
    METRIC_KIND,
    SEVERITY,
    ROLE,
    ROLLUP_LEVEL,
    DOUBT_CAUSE,
)


def _neuron_key(*, primary_key: bool = True) -> Column[str]:
    return Column(
        "neuron_id",
        Text,
        ForeignKey("neurons.neuron_id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
    )


# What a neuron says of itself, and whether it may take part. Changes seldom.
neurons = Table(
    "neurons",
    metadata,
    # identity
    Column("neuron_id", Text, primary_key=True),
    Column("token_generation", BigInteger, nullable=False),
    # description
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("language", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("healthcheck_endpoint", Text, nullable=False),
    Column("api_endpoints", JSONB, nullable=False),
    Column("capabilities", ARRAY(Text, dimensions=1), nullable=False),
    Column("dependencies", ARRAY(Text, dimensions=1), nullable=False),
    Column("command_types", JSONB, nullable=False),
    Column("resource_requirements", JSONB, nullable=False),
    Column("deployment", JSONB, nullable=False),
    Column("alert_thresholds", JSONB, nullable=False),
    Column("auto_restart", JSONB, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("metadata", JSONB, nullable=False),
    Column("max_concurrent_commands", Integer, nullable=False),
    Column("overridden_fields", ARRAY(Text, dimensions=1), nullable=False),
    # lifecycle
    Column("lifecycle", LIFECYCLE, nullable=False),
    Column("lifecycle_reason", Text, nullable=False),
    Column("create_time", _TIME, nullable=False),
    Column("update_time", _TIME, nullable=False),
)

# How a neuron is: one row beside each neuron's, narrow because every heartbeat rewrites it.
neuron_states = Table(
    "neuron_states",
    metadata,
    _neuron_key(),
    # presence; heartbeat_timeout is the neuron's, copied here for the sweeper
    Column("presence", PRESENCE, nullable=False),
    Column("presence_time", _TIME, nullable=False),
    Column("presence_reason", Text, nullable=False),
    Column("heartbeat_timeout", Interval, nullable=False),
    # session: the current one, or the last
    Column("session_epoch", BigInteger, nullable=False),
    Column("session_id", UUID(as_uuid=False)),
    Column("session_open", Boolean, nullable=False),
    Column("session_open_time", _TIME),
    Column("session_close_time", _TIME),
    Column("instance_id", Text, nullable=False),
    Column("sdk_name", Text, nullable=False),
    Column("sdk_version", Text, nullable=False),
    Column("server_id", Text, nullable=False),
    Column("peer", Text, nullable=False),
    # its spool, and the last sequence that this held when the session began
    Column("spool_id", Text, nullable=False),
    Column("backlog_sequence", BigInteger, nullable=False),
    # of a session without a stream
    Column("lease_duration", Interval),
    Column("lease_expire_time", _TIME),
    # the last heartbeat
    Column("last_heartbeat_time", _TIME),
    Column("health_score", Double),
    Column("cpu_percent", Double),
    Column("memory_percent", Double),
    Column("error_rate_percent", Double),
    Column("mean_response_ms", Double),
    Column("uptime_s", Double),
    # of its process, as a heartbeat of that said it last: not every heartbeat does
    Column("host", JSONB),
    # totals, and how far the process `counted_instance_id` has been counted into them
    Column("requests_total", BigInteger, nullable=False),
    Column("failed_requests_total", BigInteger, nullable=False),
    Column("response_ms_total", Double, nullable=False),
    Column("uptime_s_total", Double, nullable=False),
    Column("counted_instance_id", Text, nullable=False),
    Column("counted_requests", BigInteger, nullable=False),
    Column("counted_failed_requests", BigInteger, nullable=False),
    Column("counted_response_ms", Double, nullable=False),
    Column("counted_uptime_s", Double, nullable=False),
    Column("counted_before", JSONB, nullable=False),
)

# The history of heartbeats, in daily partitions by receive_time.
heartbeats = Table(
    "heartbeats",
    metadata,
    Column("neuron_id", Text, primary_key=True),
    Column("receive_time", _TIME, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("heartbeat_time", _TIME),
    Column("uptime_s", Double),
    Column("health_score", Double),
    Column("activity", ACTIVITY, nullable=False),
    # system
    Column("cpu_percent", Double),
    Column("memory_percent", Double),
    Column("memory_used_bytes", BigInteger),
    Column("disk_percent", Double),
    Column("disk_used_bytes", BigInteger),
    Column("network_received_bytes", BigInteger),
    Column("network_sent_bytes", BigInteger),
    # application
    Column("requests_per_second", Double),
    Column("mean_response_ms", Double),
    Column("p50_response_ms", Double),
    Column("p95_response_ms", Double),
    Column("p99_response_ms", Double),
    Column("active_connections", BigInteger),
    Column("queue_size", BigInteger),
    Column("error_rate_percent", Double),
    Column("requests", BigInteger),
    Column("failed_requests", BigInteger),
    Column("response_ms_sum", Double),
    # process
    Column("pid", BigInteger),
    Column("threads", BigInteger),
    Column("rss_bytes", BigInteger),
    Column("open_files", BigInteger),
    Column("process_cpu_percent", Double),
    # spool and commands
    Column("spool_pending", BigInteger),
    Column("spool_pending_bytes", BigInteger),
    Column("spool_dropped", BigInteger),
    Column("spool_dropped_reports", BigInteger),
    Column("spool_dropped_updates", BigInteger),
    Column("spool_dropped_error_reports", BigInteger),
    Column("spool_shortened_results", BigInteger),
    Column("spool_in_memory", Boolean),
    Column("running_commands", BigInteger, nullable=False),
    # what has a shape of its own, as JSON with the contract's field names
    Column("host", JSONB),
    Column("dependencies", JSONB),
    Column("versions", JSONB),
)

# How far each spool of a neuron has been applied.
spools = Table(
    "spools",
    metadata,
    _neuron_key(),
    Column("spool_id", Text, primary_key=True),
    Column("last_sequence", BigInteger, nullable=False),
    Column("update_time", _TIME, nullable=False),
)

# Orders to many neurons. `holding`: some of its commands are held, because others go first.
command_batches = Table(
    "command_batches",
    metadata,
    Column("batch_id", UUID(as_uuid=False), primary_key=True),
    Column("issuer", Text, nullable=False),
    Column("request_id", Text),
    Column("request_hash", LargeBinary, nullable=False),
    Column("filter", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    Column("max_in_flight", Integer, nullable=False),
    Column("matched_count", Integer, nullable=False),
    Column("skipped_count", Integer, nullable=False),
    Column("create_time", _TIME, nullable=False),
    Column("cancel_time", _TIME),
    Column("cancel_reason", Text, nullable=False),
    Column("holding", Boolean, nullable=False),
)

# The ledger.
commands = Table(
    "commands",
    metadata,
    # identity
    Column("command_id", UUID(as_uuid=False), primary_key=True),
    _neuron_key(primary_key=False),
    Column("issuer", Text, nullable=False),
    Column("request_id", Text),
    Column("request_hash", LargeBinary),
    # the order
    Column("type", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    # scheduling
    Column("control", Boolean, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("not_before_time", _TIME),
    Column("expire_time", _TIME, nullable=False),
    Column("accept_timeout", Interval),
    Column("run_timeout", Interval),
    Column("progress_timeout", Interval),
    Column("execution", EXECUTION, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("retry_backoff", Interval, nullable=False),
    Column("allow_unadvertised", Boolean, nullable=False),
    Column("retry_of_command_id", UUID(as_uuid=False)),
    # a held command waits until others of its batch have ended
    Column("batch_id", UUID(as_uuid=False), ForeignKey("command_batches.batch_id")),
    Column("held", Boolean, nullable=False),
    # where it stands; revision grows with every change, session_epoch is the last send's
    Column("state", COMMAND_STATE, nullable=False),
    Column("state_reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("session_epoch", BigInteger),
    Column("revision", BigInteger, nullable=False),
    Column("progress_fraction", Double),
    Column("progress_message", Text),
    Column("progress_time", _TIME),
    Column("checkpoint", JSONB),
    Column("next_attempt_time", _TIME),
    # the attempt that the neuron is to give up and has not answered for, and the session that was
    # told last
    Column("cancel_attempt", Integer),
    Column("cancel_epoch", BigInteger),
    Column("cancel_time", _TIME),
    # result
    Column("response", JSONB),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("error_details", JSONB),
    Column("log_tail", Text, nullable=False),
    Column("run_duration", Interval),
    # times
    Column("create_time", _TIME, nullable=False),
    Column("send_time", _TIME),
    Column("accept_time", _TIME),
    Column("start_time", _TIME),
    Column("end_time", _TIME),
)

# Every change of a command's state; `revision` is the command's after the change.
command_transitions = Table(
    "command_transitions",
    metadata,
    Column(
        "command_id",
        UUID(as_uuid=False),
        ForeignKey("commands.command_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("revision", BigInteger, primary_key=True),
    Column("state", COMMAND_STATE, nullable=False),
    Column("transition_time", _TIME, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

# One series for each neuron, metric, kind, set of labels and, of a histogram, bounds (none for what
# is no histogram).
metric_series = Table(
    "metric_series",
    metadata,
    Column("series_id", BigInteger, primary_key=True),
    _neuron_key(primary_key=False),
    Column("name", Text, nullable=False),
    Column("kind", METRIC_KIND, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("unit", Text, nullable=False),
    Column("last_report_time", _TIME, nullable=False),
    Column("bounds", ARRAY(Double, dimensions=1), nullable=False),
)

# What was measured, in daily partitions by point_time. `value` is a counter's growth or a
# gauge's stand; the rest is a histogram's.
metric_points = Table(
    "metric_points",
    metadata,
    Column("series_id", BigInteger, nullable=False),
    Column("point_time", _TIME, nullable=False),
    Column("value", Double),
    Column("count", BigInteger),
    Column("sum", Double),
    Column("min", Double),
    Column("max", Double),
    Column("bucket_counts", ARRAY(BigInteger, dimensions=1)),
)


def _rollup(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("series_id", BigInteger, nullable=False),
        Column("bucket_time", _TIME, nullable=False),
        Column("count", BigInteger, nullable=False),
        Column("sum", Double, nullable=False),
        Column("min", Double),
        Column("max", Double),
        Column("bucket_counts", ARRAY(BigInteger, dimensions=1)),
    )


# Points added up by minute, hour and day: one row for each series and bucket. In daily partitions
# (minutes) and monthly ones, by bucket_time.
metric_minutes = _rollup("metric_minutes")
metric_hours = _rollup("metric_hours")
metric_days = _rollup("metric_days")

# What has to be made anew, because points have come since; any may be named twice.
stale_rollups = Table(
    "stale_rollups",
    metadata,
    Column("level", ROLLUP_LEVEL, nullable=False),
    Column("bucket_time", _TIME, nullable=False),
    Column("neuron_id", Text),  # NULL: the rows of all neurons
)

# Up to when each level has been made.
rollup_levels = Table(
    "rollup_levels",
    metadata,
    Column("level", ROLLUP_LEVEL, primary_key=True),
    Column("until_time", _TIME),
)

# What neurons noted, in daily partitions by event_time.
reported_events = Table(
    "reported_events",
    metadata,
    Column("event_id", BigInteger, primary_key=True),
    Column("event_time", _TIME, primary_key=True),
    Column("neuron_id", Text, nullable=False),
    Column("receive_time", _TIME, nullable=False),
    Column("severity", SEVERITY, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("attributes", JSONB, nullable=False),
)

# The server processes, each with a lease that it renews, and with it what it doubts of itself.
# heartbeat_interval: the longest that its streams may be keeping because it told them.
servers = Table(
    "servers",
    metadata,
    Column("server_id", Text, primary_key=True),
    Column("start_time", _TIME, nullable=False),
    Column("lease_expire_time", _TIME, nullable=False),
    Column("version", Text, nullable=False),
    Column("heartbeat_interval", Interval),
    Column("doubt_causes", ARRAY(DOUBT_CAUSE), nullable=False),
    Column("doubt_time", _TIME),
    Column("sweeping", Boolean, nullable=False),
)

# Access. Of every secret only its SHA-256 is kept.
api_keys = Table(
    "api_keys",
    metadata,
    Column("api_key_id", UUID(as_uuid=False), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("role", ROLE, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False, unique=True),
    Column("description", Text, nullable=False),
    Column("creator", Text, nullable=False),
    Column("request_id", Text),
    Column("request_hash", LargeBinary),
    Column("create_time", _TIME, nullable=False),
    Column("expire_time", _TIME),
    Column("revoke_time", _TIME),
    Column("last_use_time", _TIME),
)

# The secrets that API keys had before they were rotated: each is good until its expire_time, and
# stays known, so that a restart with it as ADMIN_API_KEY does not bring it back.
api_key_old_secrets = Table(
    "api_key_old_secrets",
    metadata,
    Column("secret_hash", LargeBinary, primary_key=True),
    Column(
        "api_key_id",
        UUID(as_uuid=False),
        ForeignKey("api_keys.api_key_id", ondelete="CASCADE"),
        nullable=False,
    ),
    Column("expire_time", _TIME, nullable=False),
)

enrollment_tokens = Table(
    "enrollment_tokens",
    metadata,
    Column("enrollment_token_id", UUID(as_uuid=False), primary_key=True),
    Column("secret_hash", LargeBinary, nullable=False, unique=True),
    Column("description", Text, nullable=False),
    Column("creator", Text, nullable=False),
    Column("request_id", Text),
    Column("request_hash", LargeBinary),
    Column("create_time", _TIME, nullable=False),
    Column("expire_time", _TIME, nullable=False),
    Column("revoke_time", _TIME),
    Column("max_uses", Integer, nullable=False),
    Column("uses", Integer, nullable=False),
    Column("neuron_type", Text, nullable=False),
    Column("neuron_id_pattern", Text, nullable=False),
    Column("labels", JSONB, nullable=False),
    Column("allow_reenrollment", Boolean, nullable=False),
)

# Which Register calls an enrollment token has been counted for.
enrollment_uses = Table(
    "enrollment_uses",
    metadata,
    Column(
        "enrollment_token_id",
        UUID(as_uuid=False),
        ForeignKey("enrollment_tokens.enrollment_token_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("neuron_id", Text, primary_key=True),
    Column("request_id", Text, primary_key=True),
    Column("use_time", _TIME, nullable=False),
)

# The keys that sign neuron tokens; the newest signs, all that are not retired verify.
# Who joined without a credential: the call that took it in may come again.
applications = Table(
    "applications",
    metadata,
    _neuron_key(),
    Column("request_hash", LargeBinary, nullable=False),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("kid", Text, primary_key=True),
    Column("secret", LargeBinary, nullable=False),
    Column("create_time", _TIME, nullable=False),
    Column("retire_time", _TIME),
)

# Who did what, or tried to, in monthly partitions by entry_time. Rows are never changed.
audit_entries = Table(
    "audit_entries",
    metadata,
    Column("entry_time", _TIME, primary_key=True),
    Column("entry_id", BigInteger, primary_key=True),
    # who, from where
    Column("actor", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("api_key_id", Text, nullable=False),
    Column("peer", Text, nullable=False),
    # what, on which object
    Column("method", Text, nullable=False),
    Column("object_type", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("neuron_id", Text, nullable=False),
    Column("before", JSONB),
    Column("after", JSONB),
    # how it ended, and how often
    Column("outcome", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    # which call
    Column("request_id", Text, nullable=False),
    Column("call_id", Text, nullable=False),
    Column("server_id", Text, nullable=False),
)
