"""The first schema: neurons, heartbeats, commands, analytics, access."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ENUMS = """
CREATE TYPE lifecycle AS ENUM ('PENDING', 'ACTIVE', 'DEACTIVATED');
CREATE TYPE presence AS ENUM ('ONLINE', 'SUSPECT', 'OFFLINE');
CREATE TYPE activity AS ENUM ('UNSPECIFIED', 'ACTIVE', 'PAUSED', 'STALLED', 'STOPPING');
CREATE TYPE command_state AS ENUM (
    'QUEUED', 'SENT', 'ACCEPTED', 'RUNNING', 'CANCELLING', 'SUCCEEDED', 'FAILED', 'REJECTED',
    'CANCELLED', 'TIMED_OUT', 'EXPIRED', 'OUTCOME_UNKNOWN');
CREATE TYPE execution AS ENUM ('AT_LEAST_ONCE', 'AT_MOST_ONCE');
CREATE TYPE metric_kind AS ENUM ('COUNTER', 'GAUGE', 'HISTOGRAM');
CREATE TYPE severity AS ENUM ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL');
CREATE TYPE role AS ENUM ('VIEWER', 'OPERATOR', 'ADMIN');
"""

NEURONS = """
CREATE TABLE neurons (
    neuron_id text PRIMARY KEY,
    token_generation bigint NOT NULL,
    name text NOT NULL,
    type text NOT NULL,
    language text NOT NULL,
    version text NOT NULL,
    base_url text NOT NULL,
    healthcheck_endpoint text NOT NULL,
    api_endpoints jsonb NOT NULL,
    capabilities text[] NOT NULL,
    dependencies text[] NOT NULL,
    command_types jsonb NOT NULL,
    resource_requirements jsonb NOT NULL,
    deployment jsonb NOT NULL,
    alert_thresholds jsonb NOT NULL,
    auto_restart jsonb NOT NULL,
    labels jsonb NOT NULL,
    metadata jsonb NOT NULL,
    max_concurrent_commands integer NOT NULL,
    overridden_fields text[] NOT NULL,
    lifecycle lifecycle NOT NULL,
    lifecycle_reason text NOT NULL,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL
);
CREATE INDEX neurons_type ON neurons (type, neuron_id);
CREATE INDEX neurons_create_time ON neurons (create_time, neuron_id);
CREATE INDEX neurons_labels ON neurons USING gin (labels jsonb_path_ops);
CREATE INDEX neurons_capabilities ON neurons USING gin (capabilities);

-- Every heartbeat rewrites a row: room on each page and no index on what changes keep the
-- rewrite on its page (a HOT update).
CREATE TABLE neuron_states (
    neuron_id text PRIMARY KEY REFERENCES neurons ON DELETE CASCADE,
    presence presence NOT NULL,
    presence_time timestamptz NOT NULL,
    presence_reason text NOT NULL,
    heartbeat_timeout interval NOT NULL,
    session_epoch bigint NOT NULL,
    session_id uuid,
    session_open boolean NOT NULL,
    session_open_time timestamptz,
    session_close_time timestamptz,
    instance_id text NOT NULL,
    sdk_name text NOT NULL,
    sdk_version text NOT NULL,
    server_id text NOT NULL,
    peer text NOT NULL,
    last_heartbeat_time timestamptz,
    health_score double precision,
    cpu_percent double precision,
    memory_percent double precision,
    error_rate_percent double precision,
    mean_response_ms double precision,
    uptime_s double precision,
    host jsonb,
    requests_total bigint NOT NULL,
    failed_requests_total bigint NOT NULL,
    response_ms_total double precision NOT NULL,
    uptime_s_total double precision NOT NULL,
    counted_instance_id text NOT NULL,
    counted_requests bigint NOT NULL,
    counted_failed_requests bigint NOT NULL,
    counted_response_ms double precision NOT NULL,
    counted_uptime_s double precision NOT NULL
) WITH (fillfactor = 50);
"""

HEARTBEATS = """
CREATE TABLE heartbeats (
    neuron_id text NOT NULL,
    receive_time timestamptz NOT NULL DEFAULT now(),
    epoch bigint NOT NULL,
    heartbeat_time timestamptz,
    uptime_s double precision,
    health_score double precision,
    activity activity NOT NULL,
    cpu_percent double precision,
    memory_percent double precision,
    memory_used_bytes bigint,
    disk_percent double precision,
    disk_used_bytes bigint,
    network_received_bytes bigint,
    network_sent_bytes bigint,
    requests_per_second double precision,
    mean_response_ms double precision,
    p50_response_ms double precision,
    p95_response_ms double precision,
    p99_response_ms double precision,
    active_connections bigint,
    queue_size bigint,
    error_rate_percent double precision,
    requests bigint,
    failed_requests bigint,
    response_ms_sum double precision,
    pid bigint,
    threads bigint,
    rss_bytes bigint,
    open_files bigint,
    process_cpu_percent double precision,
    spool_pending bigint,
    spool_pending_bytes bigint,
    spool_dropped bigint,
    running_commands bigint NOT NULL,
    host jsonb,
    dependencies jsonb,
    versions jsonb,
    PRIMARY KEY (neuron_id, receive_time)
) PARTITION BY RANGE (receive_time);
"""

COMMANDS = """
CREATE TABLE spools (
    neuron_id text NOT NULL REFERENCES neurons ON DELETE CASCADE,
    spool_id text NOT NULL,
    last_sequence bigint NOT NULL,
    update_time timestamptz NOT NULL,
    PRIMARY KEY (neuron_id, spool_id)
) WITH (fillfactor = 50);

CREATE TABLE commands (
    command_id uuid PRIMARY KEY,
    neuron_id text NOT NULL REFERENCES neurons ON DELETE CASCADE,
    issuer text NOT NULL,
    request_id text,
    request_hash bytea,
    type text NOT NULL,
    data jsonb NOT NULL,
    control boolean NOT NULL,
    priority smallint NOT NULL,
    not_before_time timestamptz,
    expire_time timestamptz NOT NULL,
    accept_timeout interval,
    run_timeout interval,
    progress_timeout interval,
    execution execution NOT NULL DEFAULT 'AT_LEAST_ONCE',
    max_attempts integer NOT NULL DEFAULT 1,
    retry_backoff interval,
    state command_state NOT NULL,
    state_reason text NOT NULL DEFAULT '',
    attempt integer NOT NULL DEFAULT 0,
    session_epoch bigint,
    revision bigint NOT NULL DEFAULT 1,
    progress_fraction double precision,
    progress_message text,
    progress_time timestamptz,
    response jsonb,
    error_code text,
    error_message text,
    error_details jsonb,
    log_tail text NOT NULL DEFAULT '',
    run_duration interval,
    create_time timestamptz NOT NULL,
    send_time timestamptz,
    accept_time timestamptz,
    start_time timestamptz,
    end_time timestamptz
);
CREATE UNIQUE INDEX commands_request ON commands (issuer, request_id);
CREATE INDEX commands_queue ON commands (neuron_id, priority DESC, create_time)
    WHERE state = 'QUEUED';
CREATE INDEX commands_in_flight ON commands (neuron_id)
    WHERE state IN ('SENT', 'ACCEPTED', 'RUNNING', 'CANCELLING');
CREATE INDEX commands_expiry ON commands (expire_time) WHERE state IN ('QUEUED', 'SENT');
CREATE INDEX commands_create_time ON commands (create_time, command_id);
CREATE INDEX commands_neuron ON commands (neuron_id, create_time);

CREATE TABLE command_transitions (
    command_id uuid NOT NULL REFERENCES commands ON DELETE CASCADE,
    revision bigint NOT NULL,
    state command_state NOT NULL,
    transition_time timestamptz NOT NULL,
    attempt integer NOT NULL,
    actor text NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (command_id, revision)
);
"""

ANALYTICS = """
CREATE TABLE metric_series (
    series_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    neuron_id text NOT NULL REFERENCES neurons ON DELETE CASCADE,
    name text NOT NULL,
    kind metric_kind NOT NULL,
    labels jsonb NOT NULL,
    unit text NOT NULL,
    last_report_time timestamptz NOT NULL,
    UNIQUE (neuron_id, name, kind, labels)
);
CREATE INDEX metric_series_name ON metric_series (name, kind);

CREATE TABLE metric_points (
    series_id bigint NOT NULL,
    point_time timestamptz NOT NULL,
    value double precision,
    count bigint,
    sum double precision,
    min double precision,
    max double precision,
    bounds double precision[],
    bucket_counts bigint[]
) PARTITION BY RANGE (point_time);
CREATE INDEX metric_points_series ON metric_points (series_id, point_time);

CREATE SEQUENCE reported_event_ids;
CREATE TABLE reported_events (
    event_id bigint NOT NULL DEFAULT nextval('reported_event_ids'),
    event_time timestamptz NOT NULL,
    neuron_id text NOT NULL,
    receive_time timestamptz NOT NULL,
    severity severity NOT NULL,
    type text NOT NULL,
    message text NOT NULL,
    attributes jsonb NOT NULL,
    PRIMARY KEY (event_id, event_time)
) PARTITION BY RANGE (event_time);
CREATE INDEX reported_events_time ON reported_events (event_time, event_id);
CREATE INDEX reported_events_neuron ON reported_events (neuron_id, event_time);
"""

ACCESS = """
CREATE TABLE servers (
    server_id text PRIMARY KEY,
    start_time timestamptz NOT NULL,
    lease_expire_time timestamptz NOT NULL,
    version text NOT NULL
);

CREATE TABLE api_keys (
    api_key_id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    role role NOT NULL,
    secret_hash bytea NOT NULL UNIQUE,
    create_time timestamptz NOT NULL,
    expire_time timestamptz,
    revoke_time timestamptz
);

CREATE TABLE enrollment_tokens (
    enrollment_token_id uuid PRIMARY KEY,
    secret_hash bytea NOT NULL UNIQUE,
    description text NOT NULL,
    creator text NOT NULL,
    request_id text,
    request_hash bytea,
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    revoke_time timestamptz,
    max_uses integer NOT NULL,
    uses integer NOT NULL DEFAULT 0,
    neuron_type text NOT NULL,
    neuron_id_pattern text NOT NULL,
    labels jsonb NOT NULL,
    allow_reenrollment boolean NOT NULL
);
CREATE UNIQUE INDEX enrollment_tokens_request ON enrollment_tokens (creator, request_id);

CREATE TABLE enrollment_uses (
    enrollment_token_id uuid NOT NULL REFERENCES enrollment_tokens ON DELETE CASCADE,
    neuron_id text NOT NULL,
    request_id text NOT NULL,
    use_time timestamptz NOT NULL,
    PRIMARY KEY (enrollment_token_id, neuron_id, request_id)
);

CREATE TABLE signing_keys (
    kid text PRIMARY KEY,
    secret bytea NOT NULL,
    create_time timestamptz NOT NULL,
    retire_time timestamptz
);
"""


def upgrade() -> None:
    """Make everything."""
    for part in (ENUMS, NEURONS, HEARTBEATS, COMMANDS, ANALYTICS, ACCESS):
        op.execute(part)
