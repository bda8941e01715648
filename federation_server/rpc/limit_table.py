"""Every limit of the contract, by message type and field.

The comments in `proto/` are the rule, this is the same in Python, and a test fails for a field of
a request that is not here. Flags (bool) have no limit and are not named. Where the contract gives
a string no length, it gets a generous one here.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from federation.v1 import (
    access_service_pb2,
    analytics_service_pb2,
    command_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
    session_service_pb2,
)
from federation_server.domain.neuron import ADMIN_FIELDS
from federation_server.rpc import limit_rules as rules
from federation_server.rpc.limit_kinds import (
    Fields,
    JsonObject,
    JsonSchema,
    Many,
    ManyNested,
    Mask,
    Masked,
    Nested,
    OneOf,
    Table,
)
from federation_server.rpc.limit_values import (
    MAX_DOUBLE,
    HttpUrl,
    Integer,
    Known,
    Number,
    Span,
    Text,
    Time,
)

KIB = 1024
MIB = 1024 * KIB
HOUR_S = 3_600
DAY_S = 86_400
YEAR_S = 365.25 * DAY_S

# What several fields have in common.
NEURON_ID = Text(required=True, pattern=r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
NEURON_TYPE_PATTERN = r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?"
COMMAND_TYPE = Text(required=True, pattern=r"[a-z][a-z0-9_.-]{0,127}")
METRIC_NAME = Text(required=True, pattern=r"[a-zA-Z][a-zA-Z0-9_.]{0,127}")
LABEL_KEY = Text(required=True, pattern=r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
LABEL_VALUE = Text(256)
LABELS = Table(64, LABEL_KEY, LABEL_VALUE)
POINT_LABELS = Table(16, LABEL_KEY, LABEL_VALUE)
NAME = Text(128, required=True)
SENTENCE = Text(1024)
LONG_TEXT = Text(8192)
# An id that names what may or may not exist: any short text, so that a wrong one is NOT_FOUND.
ID = Text(128)
REQUIRED_ID = Text(128, required=True)
INSTANCE = Text(64, required=True)
REQUEST_ID = Text(64)
CREDENTIAL = Text(4096)
FILTER = Text(4096)
ORDER = Text(256)
PAGE_SIZE = Integer(0, 1000)
PAGE_TOKEN = Text(8192)
SEQUENCE = Integer(0)
FROM_ONE = Integer(1)
COUNT = Integer()
PERCENT = Number(0, 100)
NOT_NEGATIVE = Number()
ANY_NUMBER = Number(-MAX_DOUBLE)
DETAILS = JsonObject(64 * KIB, 16)

_HEARTBEAT: Mapping[type[Message], Fields] = {
    heartbeat_pb2.Heartbeat: Fields(
        {
            "heartbeat_time": Time(),
            "uptime": Span(0, 100 * YEAR_S),
            "health_score": PERCENT,
            "activity": Known(heartbeat_pb2.Activity),
            "system": Nested(),
            "application": Nested(),
            "process": Nested(),
            "host": Nested(),
            "dependencies": ManyNested(128, unique_by="name"),
            "versions": Nested(),
            "spool": Nested(),
            "running_commands": COUNT,
        }
    ),
    heartbeat_pb2.SystemMetrics: Fields(
        {
            "cpu_percent": PERCENT,
            "memory_percent": PERCENT,
            "memory_used_bytes": COUNT,
            "disk_percent": PERCENT,
            "disk_used_bytes": COUNT,
            "network_received_bytes": COUNT,
            "network_sent_bytes": COUNT,
        }
    ),
    heartbeat_pb2.ApplicationMetrics: Fields(
        {
            "requests_per_second": NOT_NEGATIVE,
            "mean_response_ms": NOT_NEGATIVE,
            "p50_response_ms": NOT_NEGATIVE,
            "p95_response_ms": NOT_NEGATIVE,
            "p99_response_ms": NOT_NEGATIVE,
            "active_connections": COUNT,
            "queue_size": COUNT,
            "error_rate_percent": PERCENT,
            "requests": COUNT,
            "failed_requests": COUNT,
            "response_ms_sum": NOT_NEGATIVE,
        },
        rules=[rules.failed_within_requests],
    ),
    heartbeat_pb2.ProcessInfo: Fields(
        {
            "pid": COUNT,
            "threads": COUNT,
            "rss_bytes": COUNT,
            "open_files": COUNT,
            "cpu_percent": Number(0, 1_000_000),
        }
    ),
    heartbeat_pb2.HostInfo: Fields(
        {
            "hostname": Text(256),
            "os": Text(128),
            "architecture": Text(64),
            "cpu_count": COUNT,
            "memory_bytes": COUNT,
        }
    ),
    heartbeat_pb2.DependencyStatus: Fields(
        {
            "name": NAME,
            "state": Known(heartbeat_pb2.DependencyState, required=True),
            "latency_ms": NOT_NEGATIVE,
            "message": SENTENCE,
            "check_time": Time(),
        }
    ),
    heartbeat_pb2.Versions: Fields({"service": Text(128), "sdk": Text(64), "runtime": Text(128)}),
    heartbeat_pb2.SpoolStatus: Fields(
        {
            "pending": COUNT,
            "pending_bytes": COUNT,
            "dropped": COUNT,
            "dropped_reports": COUNT,
            "dropped_updates": COUNT,
            "dropped_error_reports": COUNT,
            "shortened_results": COUNT,
        },
    ),
}

_NEURON: Mapping[type[Message], Fields] = {
    neuron_pb2.NeuronDescription: Fields(
        {
            "neuron_id": NEURON_ID,
            "name": Text(256),
            "type": Text(required=True, pattern=NEURON_TYPE_PATTERN),
            "language": Text(64),
            "version": Text(128),
            "base_url": HttpUrl(2048),
            "healthcheck_endpoint": Text(2048),
            "api_endpoints": ManyNested(256),
            "capabilities": Many(128, NAME, unique=True),
            "dependencies": Many(128, NAME, unique=True),
            "command_types": ManyNested(256, unique_by="type"),
            "resource_requirements": Nested(),
            "deployment": Nested(),
            "alert_thresholds": Nested(),
            "auto_restart": Nested(),
            "labels": LABELS,
            "metadata": DETAILS,
            "max_concurrent_commands": Integer(0, 1000),
        },
        max_bytes=512 * KIB,
    ),
    neuron_pb2.ApiEndpoint: Fields(
        {
            "path": Text(required=True, pattern=r"/[^\x00]{0,1023}"),
            "method": Text(pattern=r"[A-Z]{1,16}"),
            "description": SENTENCE,
        }
    ),
    neuron_pb2.CommandType: Fields(
        {
            "type": COMMAND_TYPE,
            "description": SENTENCE,
            "data_schema": JsonSchema(64 * KIB, 32),
        }
    ),
    neuron_pb2.ResourceRequirements: Fields(
        {"cpu_cores": Number(0, 100_000), "memory_bytes": COUNT, "storage_bytes": COUNT}
    ),
    neuron_pb2.Deployment: Fields(
        {"type": Text(64), "image": Text(512), "ports": Many(64, Integer(1, 65_535))}
    ),
    neuron_pb2.AlertThresholds: Fields(
        {
            "cpu_percent": PERCENT,
            "memory_percent": PERCENT,
            "error_rate_percent": PERCENT,
            "response_time_ms": Number(0, 86_400_000),
            "heartbeat_timeout": Span(1, DAY_S, or_zero=True),
            "health_score": PERCENT,
        }
    ),
    neuron_pb2.AutoRestart: Fields({"max_attempts": Integer(0, 1000)}),
    neuron_pb2.Sdk: Fields({"name": Text(64), "version": Text(64)}),
}

_REPORT: Mapping[type[Message], Fields] = {
    report_pb2.AnalyticsReport: Fields(
        {
            "start_time": Time(required=True),
            "end_time": Time(required=True),
            "points": ManyNested(2000),
            "custom_metrics": Table(500, METRIC_NAME, ANY_NUMBER),
            "events": ManyNested(1000),
        },
        rules=[rules.in_order("start_time", "end_time", equal=True), rules.metrics_differ],
        max_bytes=MIB,
    ),
    report_pb2.MetricPoint: Fields(
        {
            "name": METRIC_NAME,
            "unit": Text(32),
            "labels": POINT_LABELS,
            "counter": NOT_NEGATIVE,
            "gauge": ANY_NUMBER,
            "histogram": Nested(),
        },
        one_of=OneOf("value", required=True),
    ),
    report_pb2.HistogramValue: Fields(
        {
            "bounds": Many(100, ANY_NUMBER),
            "bucket_counts": Many(101, COUNT),
            "sum": ANY_NUMBER,
            "min": ANY_NUMBER,
            "max": ANY_NUMBER,
        },
        rules=[rules.buckets_fit_bounds],
    ),
    report_pb2.ReportedEvent: Fields(
        {
            "event_time": Time(required=True),
            "severity": Known(report_pb2.Severity, required=True),
            "type": Text(required=True, pattern=r"[a-zA-Z][a-zA-Z0-9_.-]{0,127}"),
            "message": LONG_TEXT,
            "attributes": DETAILS,
        }
    ),
}

_SESSION: Mapping[type[Message], Fields] = {
    session_service_pb2.RegisterRequest: Fields(
        {
            "description": Nested(required=True),
            "enrollment_token": CREDENTIAL,
            "request_id": REQUEST_ID,
        }
    ),
    session_service_pb2.RefreshTokenRequest: Fields(),
    session_service_pb2.DeregisterRequest: Fields({"reason": SENTENCE}),
    session_service_pb2.SendHeartbeatRequest: Fields(
        {"heartbeat": Nested(required=True), "instance_id": INSTANCE}
    ),
    session_service_pb2.PullCommandsRequest: Fields(
        {
            "instance_id": INSTANCE,
            "running_commands": ManyNested(1000),
            "max_commands": Integer(0, 1000),
            "lease_duration": Span(1, HOUR_S),
            "epoch": Integer(0),
        }
    ),
    session_service_pb2.ReportCommandRequest: Fields(
        {
            "epoch": FROM_ONE,
            "spool_id": INSTANCE,
            "sequence": FROM_ONE,
            "update": Nested(required=True),
        }
    ),
    session_service_pb2.ReportAnalyticsRequest: Fields(
        {
            "spool_id": INSTANCE,
            "sequence": FROM_ONE,
            "send_time": Time(required=True),
            "report": Nested(required=True),
        }
    ),
    session_service_pb2.NeuronMessage: Fields(
        {
            "sequence": SEQUENCE,
            "send_time": Time(),
            "hello": Nested(),
            "heartbeat": Nested(),
            "analytics_report": Nested(),
            "command_update": Nested(),
            "goodbye": Nested(),
        },
        # Not required: a member that this server does not know is ignored.
        one_of=OneOf("message"),
        rules=[rules.envelope_fits],
    ),
    session_service_pb2.Hello: Fields(
        {
            "instance_id": INSTANCE,
            "sdk": Nested(),
            "features": Many(64, Text(64)),
            "spool_id": INSTANCE,
            "first_sequence": SEQUENCE,
            "next_sequence": FROM_ONE,
            "running_commands": ManyNested(1000),
        },
        rules=[rules.spool_in_order],
    ),
    session_service_pb2.RunningCommand: Fields({"command_id": ID, "attempt": COUNT}),
    session_service_pb2.CommandUpdate: Fields(
        {
            "command_id": REQUIRED_ID,
            "attempt": FROM_ONE,
            "accepted": Nested(),
            "progressed": Nested(),
            "finished": Nested(),
        },
        one_of=OneOf("update", required=True),
    ),
    session_service_pb2.CommandAccepted: Fields(),
    session_service_pb2.CommandProgressed: Fields(
        {"fraction": Number(0, 1), "message": SENTENCE, "checkpoint": JsonObject(64 * KIB, 16)}
    ),
    session_service_pb2.CommandFinished: Fields(
        {
            "state": Known(
                command_pb2.CommandState,
                required=True,
                only=(
                    "COMMAND_STATE_SUCCEEDED",
                    "COMMAND_STATE_FAILED",
                    "COMMAND_STATE_REJECTED",
                    "COMMAND_STATE_CANCELLED",
                    "COMMAND_STATE_TIMED_OUT",
                ),
            ),
            "response": JsonObject(MIB, 32),
            "error": Nested(),
            "run_duration": Span(0, 10 * YEAR_S),
            "log_tail": Text(max_bytes=16 * KIB),
        },
        rules=[rules.error_said],
    ),
    session_service_pb2.Goodbye: Fields({"reason": SENTENCE}),
    command_pb2.CommandError: Fields(
        {"code": Text(128), "message": LONG_TEXT, "details": DETAILS},
    ),
}

_FLEET: Mapping[type[Message], Fields] = {
    fleet_service_pb2.GetNeuronRequest: Fields({"neuron_id": REQUIRED_ID}),
    fleet_service_pb2.ListNeuronsRequest: Fields(
        {
            "page_size": PAGE_SIZE,
            "page_token": PAGE_TOKEN,
            "filter": FILTER,
            "order_by": ORDER,
        }
    ),
    fleet_service_pb2.UpdateNeuronRequest: Fields(
        {
            "neuron_id": REQUIRED_ID,
            "description": Masked("update_mask", sorted(ADMIN_FIELDS)),
            "update_mask": Mask(sorted(ADMIN_FIELDS)),
            "release_mask": Mask(sorted(ADMIN_FIELDS)),
        },
        rules=[rules.masks_differ],
    ),
    fleet_service_pb2.DeactivateNeuronRequest: Fields(
        {"neuron_id": REQUIRED_ID, "reason": SENTENCE}
    ),
    fleet_service_pb2.ActivateNeuronRequest: Fields({"neuron_id": REQUIRED_ID, "reason": SENTENCE}),
    fleet_service_pb2.DeleteNeuronRequest: Fields({"neuron_id": REQUIRED_ID}),
    fleet_service_pb2.GetFleetOverviewRequest: Fields({"filter": FILTER, "top": Integer(0, 100)}),
    fleet_service_pb2.ListHeartbeatsRequest: Fields(
        {
            "neuron_id": REQUIRED_ID,
            "start_time": Time(),
            "end_time": Time(),
            "page_size": PAGE_SIZE,
            "page_token": PAGE_TOKEN,
        }
    ),
}

_COMMAND: Mapping[type[Message], Fields] = {
    command_service_pb2.CommandSpec: Fields(
        {
            "neuron_id": Text(128),
            "type": COMMAND_TYPE,
            "data": JsonObject(256 * KIB, 32),
            "priority": Integer(0, 9),
            "not_before_time": Time(),
            "expire_time": Time(),
            "run_timeout": Span(0.001, 31 * DAY_S),
            "execution": Known(command_pb2.Execution),
            "max_attempts": Integer(0, 100),
            "retry_backoff": Span(0.001, HOUR_S),
            "accept_timeout": Span(0.001, 31 * DAY_S),
            "progress_timeout": Span(0.001, 31 * DAY_S),
        },
        rules=[
            rules.in_order("not_before_time", "expire_time", equal=False),
            rules.one_attempt_at_most_once,
        ],
    ),
    command_service_pb2.IssueCommandRequest: Fields(
        {"command": Nested(required=True), "request_id": REQUEST_ID}, rules=[rules.names_a_neuron]
    ),
    command_service_pb2.GetCommandRequest: Fields({"command_id": REQUIRED_ID}),
    command_service_pb2.ListCommandsRequest: Fields(
        {
            "page_size": PAGE_SIZE,
            "page_token": PAGE_TOKEN,
            "filter": FILTER,
            "order_by": ORDER,
        }
    ),
    command_service_pb2.ExecuteCommandRequest: Fields(
        {"command": Nested(required=True), "request_id": REQUEST_ID}, rules=[rules.names_a_neuron]
    ),
    command_service_pb2.IssueCommandBatchRequest: Fields(
        {
            "filter": Text(4096, required=True),
            "command": Nested(required=True),
            "max_in_flight": Integer(0, 10_000),
            "request_id": REQUEST_ID,
        },
        rules=[rules.names_no_neuron],
    ),
    command_service_pb2.GetCommandBatchRequest: Fields({"batch_id": REQUIRED_ID}),
    command_service_pb2.ListCommandBatchesRequest: Fields(
        {"page_size": PAGE_SIZE, "page_token": PAGE_TOKEN}
    ),
    command_service_pb2.WatchCommandBatchRequest: Fields({"batch_id": REQUIRED_ID}),
    command_service_pb2.CancelCommandBatchRequest: Fields(
        {"batch_id": REQUIRED_ID, "reason": SENTENCE}
    ),
    command_service_pb2.WatchCommandRequest: Fields(
        {"command_id": REQUIRED_ID, "after_revision": Integer(0)}
    ),
    command_service_pb2.CancelCommandRequest: Fields(
        {"command_id": REQUIRED_ID, "reason": SENTENCE}
    ),
    command_service_pb2.RetryCommandRequest: Fields(
        {"command_id": REQUIRED_ID, "request_id": REQUEST_ID}
    ),
    command_service_pb2.ExplainCommandRequest: Fields({"command_id": REQUIRED_ID}),
}

_ANALYTICS: Mapping[type[Message], Fields] = {
    analytics_service_pb2.QueryMetricsRequest: Fields(
        {
            "name": METRIC_NAME,
            "filter": FILTER,
            "labels": POINT_LABELS,
            "start_time": Time(),
            "end_time": Time(),
            "bucket_width": Span(1, 366 * DAY_S),
            "group_by": Many(
                4,
                Text(
                    required=True,
                    pattern=r"neuron_id|type|labels\.[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?",
                ),
            ),
        },
        rules=[rules.in_order("start_time", "end_time", equal=False)],
    ),
    analytics_service_pb2.ListMetricNamesRequest: Fields(
        {"prefix": Text(128), "page_size": PAGE_SIZE, "page_token": PAGE_TOKEN}
    ),
    analytics_service_pb2.ListReportedEventsRequest: Fields(
        {"page_size": PAGE_SIZE, "page_token": PAGE_TOKEN, "filter": FILTER}
    ),
}

_ACCESS: Mapping[type[Message], Fields] = {
    access_service_pb2.CreateEnrollmentTokenRequest: Fields(
        {
            "description": Text(256),
            "ttl": Span(1, 366 * DAY_S),
            "max_uses": Integer(0, 1_000_000),
            "neuron_type": Text(pattern=NEURON_TYPE_PATTERN),
            "neuron_id_pattern": Text(pattern=r"[a-z0-9._*-]{1,128}"),
            "labels": LABELS,
            "request_id": REQUEST_ID,
        }
    ),
    access_service_pb2.ListEnrollmentTokensRequest: Fields(
        {"page_size": PAGE_SIZE, "page_token": PAGE_TOKEN}
    ),
    access_service_pb2.RevokeEnrollmentTokenRequest: Fields({"enrollment_token_id": REQUIRED_ID}),
    access_service_pb2.ApproveNeuronRequest: Fields(
        {"neuron_id": REQUIRED_ID, "approval_code": Text(16), "reason": SENTENCE}
    ),
    access_service_pb2.RejectNeuronRequest: Fields({"neuron_id": REQUIRED_ID, "reason": SENTENCE}),
    access_service_pb2.RevokeNeuronTokensRequest: Fields(
        {"neuron_id": REQUIRED_ID, "reason": SENTENCE}
    ),
    access_service_pb2.CreateApiKeyRequest: Fields(
        {
            "name": Text(required=True, pattern=r"[a-z0-9]([a-z0-9._@-]{0,62}[a-z0-9])?"),
            "role": Known(access_service_pb2.Role, required=True),
            "ttl": Span(1, 3660 * DAY_S),
            "description": Text(256),
            "request_id": REQUEST_ID,
        }
    ),
    access_service_pb2.ListApiKeysRequest: Fields(
        {"page_size": PAGE_SIZE, "page_token": PAGE_TOKEN}
    ),
    access_service_pb2.RotateApiKeyRequest: Fields(
        {"name": REQUIRED_ID, "overlap": Span(0, 30 * DAY_S)}
    ),
    access_service_pb2.ExpireApiKeyRequest: Fields(
        {"name": REQUIRED_ID, "expire_time": Time(required=True)}
    ),
    access_service_pb2.RevokeApiKeyRequest: Fields({"name": REQUIRED_ID}),
    access_service_pb2.ListSigningKeysRequest: Fields(
        {"page_size": PAGE_SIZE, "page_token": PAGE_TOKEN}
    ),
    access_service_pb2.RotateSigningKeyRequest: Fields({"overlap": Span(0, 366 * DAY_S)}),
}

LIMITS: Mapping[type[Message], Fields] = {
    **_HEARTBEAT,
    **_NEURON,
    **_REPORT,
    **_SESSION,
    **_FLEET,
    **_COMMAND,
    **_ANALYTICS,
    **_ACCESS,
}
