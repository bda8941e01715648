"""What a neuron says of itself when it registers: plain values, checked when it is built.

The limits are those of NeuronDescription in the contract. A mistake raises ConfigError here, in
the developer's hands, and not later in a server's answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuron_sdk.errors import ConfigError

_NEURON_ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
_TYPE = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_METHOD = re.compile(r"[A-Z]{1,16}")
_CHARACTERS = (
    "lower-case letters, digits, '.', '_' and '-', beginning and ending with a letter or digit"
)

DEFAULT_MAX_CONCURRENT_COMMANDS = 4


@dataclass(frozen=True, slots=True)
class ApiEndpoint:
    """One route of the service's own HTTP API."""

    path: str
    """The path, beginning with "/". At most 1024 characters."""
    method: str = "GET"
    """The HTTP method, upper-case."""
    description: str = ""
    """What it does, for people. At most 1024 characters."""


@dataclass(frozen=True, slots=True)
class ResourceRequirements:
    """What the service wants of its host; 0 means not said."""

    cpu_cores: float = 0.0
    """Processor cores. 0 to 100000."""
    memory_bytes: int = 0
    """Main memory, in bytes."""
    storage_bytes: int = 0
    """Disk space, in bytes."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """How the service is deployed."""

    type: str = ""
    """For example "systemd", "docker", "kubernetes". At most 64 characters."""
    image: str = ""
    """The container image, if any. At most 512 characters."""
    ports: tuple[int, ...] = ()
    """Ports that the service listens on, each 1 to 65535. At most 64."""


@dataclass(frozen=True, slots=True)
class AlertThresholds:
    """When the service counts as unwell; 0 means the federation's default."""

    cpu_percent: float = 0.0
    """Processor use above this is an alert. Default: 80."""
    memory_percent: float = 0.0
    """Memory use above this is an alert. Default: 85."""
    error_rate_percent: float = 0.0
    """A share of failed requests above this is an alert. Default: 5."""
    response_time_ms: float = 0.0
    """A mean response time above this is an alert, in milliseconds. Default: 5000."""
    heartbeat_timeout: float = 0.0
    """Silence for longer than this is SUSPECT, in seconds, 1 to 86400. Default: 120, or twice the
    heartbeat interval if that is more."""
    health_score: float = 0.0
    """A health score below this is an alert. Default: 50."""


@dataclass(frozen=True, slots=True)
class AutoRestart:
    """Whether a supervisor (systemd, Docker, …) restarts the service when it ends."""

    enabled: bool = False
    """True if somebody restarts it."""
    max_attempts: int = 0
    """How often at the most, 0 to 1000; 0 means without limit."""


@dataclass(frozen=True, slots=True)
class CommandTypeInfo:
    """A command that the neuron accepts, as it is advertised."""

    type: str
    description: str
    data_schema: Mapping[str, Any] | None
    control: bool


@dataclass(frozen=True, slots=True)
class NeuronDescription:
    """Everything that Register carries: NeuronDescription of the contract."""

    neuron_id: str
    type: str
    name: str = ""
    version: str = ""
    base_url: str = ""
    healthcheck_endpoint: str = ""
    api_endpoints: tuple[ApiEndpoint, ...] = ()
    capabilities: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    command_types: tuple[CommandTypeInfo, ...] = ()
    resource_requirements: ResourceRequirements | None = None
    deployment: Deployment | None = None
    alert_thresholds: AlertThresholds | None = None
    auto_restart: AutoRestart | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    max_concurrent_commands: int = DEFAULT_MAX_CONCURRENT_COMMANDS
    language: str = "python"


def check_neuron_id(value: str, setting: str) -> str:
    """`value` if it can name a neuron. Raises ConfigError, which names `setting`."""
    if not _NEURON_ID.fullmatch(value):
        raise ConfigError(f"{setting} {value!r} cannot name a neuron: use 1 to 128 {_CHARACTERS}")
    return value


def check_type(value: str, setting: str) -> str:
    """`value` if it can be a neuron's type. Raises ConfigError, which names `setting`."""
    if not _TYPE.fullmatch(value):
        raise ConfigError(f"{setting} {value!r} cannot be a type: use 1 to 64 {_CHARACTERS}")
    return value


def check_text(value: object, setting: str, limit: int) -> str:
    """`value` if it is a text that fits. Raises ConfigError, which names `setting`."""
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        raise ConfigError(f"{setting}: use a string of at most {limit} characters, without NUL")
    return value


def check_names(values: Iterable[str], setting: str) -> tuple[str, ...]:
    """Capabilities or dependencies, in their order. Raises ConfigError, which names `setting`."""
    if isinstance(values, str):
        raise ConfigError(f"{setting}: give a list of strings, not the string {values!r}")
    names = tuple(values)
    for name in names:
        if not check_text(name, setting, 128):
            raise ConfigError(f"{setting}: an empty string names nothing; remove it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{setting}: {twice!r} is there twice; remove one")
    if len(names) > 128:
        raise ConfigError(f"{setting}: {len(names)} are too many; use at most 128")
    return names


def check_labels(labels: Mapping[Any, str]) -> dict[str, str]:
    """The labels. Raises ConfigError, which names the bad key."""
    if len(labels) > 64:
        raise ConfigError(f"labels: {len(labels)} are too many; use at most 64")
    for key, value in labels.items():
        if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
            raise ConfigError(
                f"labels: {key!r} cannot be a key; use 1 to 63 lower-case letters and digits, "
                "inside also '.', '_', '/' and '-'"
            )
        check_text(value, f"labels[{key!r}]", 256)
    return dict(labels)


def check_endpoints(endpoints: Sequence[ApiEndpoint]) -> tuple[ApiEndpoint, ...]:
    """The service's routes. Raises ConfigError, which names the bad one."""
    if len(endpoints) > 256:
        raise ConfigError(f"api_endpoints: {len(endpoints)} are too many; use at most 256")
    for endpoint in endpoints:
        check_text(endpoint.path, "api_endpoints: path", 1024)
        check_text(endpoint.description, f"api_endpoints: description of {endpoint.path}", 1024)
        if not endpoint.path.startswith("/"):
            raise ConfigError(f"api_endpoints: path {endpoint.path!r} must begin with '/'")
        if not _METHOD.fullmatch(endpoint.method):
            raise ConfigError(
                f"api_endpoints: method {endpoint.method!r} of {endpoint.path}: "
                "use upper-case letters, such as 'POST'"
            )
    return tuple(endpoints)


def check_base_url(value: str) -> str:
    """An http or https URL, or nothing. Raises ConfigError."""
    check_text(value, "base_url", 2048)
    if value and not value.startswith(("http://", "https://")):
        raise ConfigError(f"base_url {value!r}: begin with 'http://' or 'https://'")
    return value


def check_range(value: object, setting: str, low: float, high: float) -> None:
    """Raises ConfigError, which names `setting`, unless low <= value <= high."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise ConfigError(f"{setting} {value!r}: use a number from {low:g} to {high:g}")


def check_extras(
    resources: ResourceRequirements | None,
    deployment: Deployment | None,
    thresholds: AlertThresholds | None,
    restart: AutoRestart | None,
) -> None:
    """Raises ConfigError, which names the bad field of one of these."""
    if resources:
        check_range(resources.cpu_cores, "resource_requirements.cpu_cores", 0, 100_000)
        check_range(resources.memory_bytes, "resource_requirements.memory_bytes", 0, 2**63)
        check_range(resources.storage_bytes, "resource_requirements.storage_bytes", 0, 2**63)
    if deployment:
        check_text(deployment.type, "deployment.type", 64)
        check_text(deployment.image, "deployment.image", 512)
        check_range(len(deployment.ports), "deployment.ports: their number", 0, 64)
        for port in deployment.ports:
            check_range(port, "deployment.ports", 1, 65_535)
    if thresholds:
        for name in ("cpu_percent", "memory_percent", "error_rate_percent", "health_score"):
            check_range(getattr(thresholds, name), f"alert_thresholds.{name}", 0, 100)
        check_range(thresholds.response_time_ms, "alert_thresholds.response_time_ms", 0, 86_400_000)
        if thresholds.heartbeat_timeout:
            check_range(
                thresholds.heartbeat_timeout, "alert_thresholds.heartbeat_timeout", 1, 86_400
            )
    if restart:
        check_range(restart.max_attempts, "auto_restart.max_attempts", 0, 1000)
