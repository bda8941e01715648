"""What a neuron is: its description, its lifecycle and its presence.

The enums are stored by name; a test proves that PostgreSQL's and the contract's agree with
these. Values here are plain Python; `rpc/convert.py` makes them from protobuf, `store/` from rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]

DEFAULT_MAX_CONCURRENT_COMMANDS = 4

DEFAULT_ALERT_THRESHOLDS: Mapping[str, float] = {
    "cpu_percent": 80.0,
    "memory_percent": 85.0,
    "error_rate_percent": 5.0,
    "response_time_ms": 5000.0,
    "heartbeat_timeout_s": 120.0,
    "health_score": 50.0,
}

ADMIN_FIELDS = frozenset(
    {
        "name",
        "base_url",
        "healthcheck_endpoint",
        "resource_requirements",
        "deployment",
        "alert_thresholds",
        "auto_restart",
        "labels",
        "metadata",
        "max_concurrent_commands",
    }
)
"""The fields of a description that an admin may set over what the neuron says."""


class Lifecycle(StrEnum):
    """Whether a neuron may take part."""

    PENDING = "PENDING"
    """Registered; waits for an admin's approval."""
    ACTIVE = "ACTIVE"
    """May hold a session."""
    DEACTIVATED = "DEACTIVATED"
    """Shut out until an admin activates it."""


class Presence(StrEnum):
    """Whether a neuron is there, by the database's clock."""

    ONLINE = "ONLINE"
    """It has a session, or sends heartbeats without one, and is in time."""
    SUSPECT = "SUSPECT"
    """Its stream broke, or it is silent for longer than its heartbeat timeout."""
    OFFLINE = "OFFLINE"
    """It left, never came, or was SUSPECT for too long."""


class Activity(StrEnum):
    """What a neuron is doing, as its heartbeat says."""

    UNSPECIFIED = "UNSPECIFIED"
    ACTIVE = "ACTIVE"
    PAUSED = "PAUSED"
    STALLED = "STALLED"
    STOPPING = "STOPPING"


class DependencyState(StrEnum):
    """How a dependency of a neuron is, as its heartbeat says."""

    UP = "UP"
    DEGRADED = "DEGRADED"
    DOWN = "DOWN"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class NeuronDescription:
    """What a neuron says of itself, with defaults filled in.

    Nested values are JSON objects with the contract's field names.
    """

    neuron_id: str
    name: str
    type: str
    language: str = ""
    version: str = ""
    base_url: str = ""
    healthcheck_endpoint: str = ""
    api_endpoints: Sequence[JsonObject] = ()
    capabilities: Sequence[str] = ()
    dependencies: Sequence[str] = ()
    command_types: Sequence[JsonObject] = ()
    resource_requirements: JsonObject = field(default_factory=dict)
    deployment: JsonObject = field(default_factory=dict)
    alert_thresholds: JsonObject = field(default_factory=lambda: dict(DEFAULT_ALERT_THRESHOLDS))
    auto_restart: JsonObject = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: JsonObject = field(default_factory=dict)
    max_concurrent_commands: int = DEFAULT_MAX_CONCURRENT_COMMANDS


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A neuron's current or last session; its stream is open while `open` is true. Of a process
    that pulls there are only the epoch, the instance and the lease.
    """

    session_id: str
    epoch: int
    open: bool
    open_time: datetime | None
    close_time: datetime | None
    instance_id: str
    sdk_name: str
    sdk_version: str
    server_id: str
    peer: str
    lease_expire_time: datetime | None = None
    """None if it is a stream."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a neuron's whole life."""

    requests: int
    failed_requests: int
    response_ms: float
    uptime_s: float

    @property
    def mean_response_ms(self) -> float:
        """The mean response time over all requests; 0 without requests."""
        return self.response_ms / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class NeuronRecord:
    """A neuron as the federation knows it.

    The numbers from `health_score` to `uptime_s` are the last heartbeat's; None where it did not
    say them, or where none ever came.
    """

    description: NeuronDescription
    overridden_fields: Sequence[str]
    lifecycle: Lifecycle
    lifecycle_reason: str
    presence: Presence
    presence_time: datetime
    presence_reason: str
    create_time: datetime
    update_time: datetime
    session: SessionRecord | None
    last_heartbeat_time: datetime | None
    health_score: float | None
    cpu_percent: float | None
    memory_percent: float | None
    error_rate_percent: float | None
    mean_response_ms: float | None
    uptime_s: float | None
    host: JsonObject | None
    totals: Totals

    @property
    def neuron_id(self) -> str:
        """The neuron's name in the fleet."""
        return self.description.neuron_id
