"""Every setting of a running neuron, and how the environment fills what code leaves out.

`NeuronConfig` holds what differs from one deployment to the next; what the service is (type,
capabilities, commands) belongs to `Neuron`. Nothing is read when a module is imported: `resolve`
reads the environment when the neuron starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from neuron_sdk.description import check_neuron_id, check_text, check_type
from neuron_sdk.errors import ConfigError
from neuron_sdk.tls import CA_FILE, CERT_FILE, KEY_FILE, TlsFiles, is_loopback

DEFAULT_PORT = 50051
DEFAULT_REFUSAL_RETRY = 60.0
SCHEMES = {"federations": True, "grpcs": True, "federation": False, "grpc": False}
"""Each scheme of a federation's address: whether it means TLS."""
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronConfig:
    """Settings of a running neuron. None means: from the environment, else the default."""

    neuron_id: str | None = None
    """The neuron's name in the fleet. Environment: NEURON_ID. No default."""
    name: str | None = None
    """A name for people. Environment: NEURON_NAME. Default: the neuron_id."""
    type: str | None = None
    """The kind of service. Environment: NEURON_TYPE. No default."""
    federation_url: str | None = None
    """"federations://host:port" (or grpcs://) for TLS, "federation://host:port" (or grpc://) for
    plaintext. Without a scheme it is TLS, but for loopback without one of the following three
    files. Environment: FEDERATION_URL. Default: localhost:50051."""
    ca_file: Path | None = None
    """The CAs (PEM) that the federation's certificate may be from. Environment:
    FEDERATION_CA_FILE. Default: those that gRPC trusts by itself."""
    client_cert_file: Path | None = None
    """The neuron's own certificate (PEM), for a federation that asks for one. Environment:
    FEDERATION_CLIENT_CERT_FILE. Default: none."""
    client_key_file: Path | None = None
    """Its private key (PEM). Environment: FEDERATION_CLIENT_KEY_FILE. Default: none."""
    enrollment_token: str | None = None
    """"fet_…", to register the first time. Environment: ENROLLMENT_TOKEN. Default: none."""
    heartbeat_interval: float | None = None
    """Seconds between heartbeats, unless the federation says another, 1 to 86400. Environment:
    HEARTBEAT_INTERVAL. Default: 60."""
    analytics_interval: float | None = None
    """Seconds between analytics reports, as above. Environment: ANALYTICS_INTERVAL.
    Default: 300."""
    log_level: str | None = None
    """DEBUG, INFO, WARNING, ERROR or CRITICAL. Environment: LOG_LEVEL. Default: INFO."""
    log_file: Path | None = None
    """Where logs go. Environment: LOG_FILE. Default: standard error."""
    metrics_enabled: bool | None = None
    """Whether /health, /status and /metrics are served. Environment: METRICS_ENABLED.
    Default: yes."""
    metrics_host: str | None = None
    """The address they are served on. Environment: METRICS_HOST. Default: 127.0.0.1."""
    metrics_port: int | None = None
    """Their TCP port, 0 to 65535; 0 takes a free one. Environment: METRICS_PORT. Default: 8080."""
    state_dir: Path | None = None
    """The folder of token, spool and journal, for this neuron alone. Environment: STATE_DIR.
    Default: $XDG_STATE_HOME or ~/.local/state, /neuron/<neuron_id>."""
    stop_grace: float | None = None
    """Seconds that running commands get to end when the neuron stops. Environment: STOP_GRACE.
    Default: 10."""
    refusal_retry: float | None = None
    """Seconds, at the least, until a neuron asks again that was refused for a reason that only a
    person can change: not enrolled, deactivated, its id in use. Environment: REFUSAL_RETRY.
    Default: 60."""
    spool_max_bytes: int | None = None
    """Bytes of unacknowledged messages that are kept. Beyond it messages are dropped, each class
    from its oldest on: reports; then updates of commands that later ones have overtaken; then
    reports of events of severity ERROR and above. Commands' results are never dropped: they may
    come to twice as much, beyond which they are kept without the response (the command ends as
    FAILED, RESPONSE_LOST), and no further command is taken. Environment: SPOOL_MAX_BYTES.
    Default: 64 MiB; at least 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`NeuronConfig` with every question answered; what the SDK itself works with."""

    neuron_id: str
    name: str
    type: str
    target: str
    tls: TlsFiles | None
    """None: plaintext."""
    enrollment_token: str
    heartbeat_interval: float
    analytics_interval: float
    log_level: str
    log_file: Path | None
    metrics_enabled: bool
    metrics_host: str
    metrics_port: int
    state_dir: Path
    stop_grace: float
    refusal_retry: float
    spool_max_bytes: int
    overruled: tuple[str, ...]
    """The variables that say something else than the code, whose word counts."""


# What the environment may say, and how it is read. Each reader takes the text and the variable.
_Reader = Callable[[Any, str], Any]


def resolve(config: NeuronConfig, environment: Mapping[str, str] | None = None) -> Settings:
    """Answer every open question of `config` from the environment and the defaults.

    Args:
        config: what code has said.
        environment: os.environ unless given.

    Raises:
        ConfigError: a value is missing or cannot be used; the text names the variable.
    """
    source = _Source(config, os.environ if environment is None else environment)
    neuron_id = source.required("neuron_id", check_neuron_id, "processor-001")
    address = source.optional(
        "federation_url", "FEDERATION_URL", read_url, Address(f"localhost:{DEFAULT_PORT}")
    )
    return Settings(
        neuron_id=neuron_id,
        type=source.required("type", check_type, "data-processor"),
        name=source.optional("name", "NEURON_NAME", lambda v, s: check_text(v, s, 256), neuron_id),
        target=address.target,
        tls=_tls(source, address),
        enrollment_token=source.optional("enrollment_token", "ENROLLMENT_TOKEN", _read_token, ""),
        heartbeat_interval=source.optional(
            "heartbeat_interval", "HEARTBEAT_INTERVAL", read_interval, 60.0
        ),
        analytics_interval=source.optional(
            "analytics_interval", "ANALYTICS_INTERVAL", read_interval, 300.0
        ),
        log_level=source.optional("log_level", "LOG_LEVEL", read_log_level, "INFO"),
        log_file=source.optional("log_file", "LOG_FILE", _read_path, None),
        metrics_enabled=source.optional("metrics_enabled", "METRICS_ENABLED", _read_bool, True),
        metrics_host=source.optional(
            "metrics_host", "METRICS_HOST", lambda v, s: check_text(v, s, 253), "127.0.0.1"
        ),
        metrics_port=source.optional("metrics_port", "METRICS_PORT", _integer(0, 65_535), 8080),
        state_dir=source.optional("state_dir", "STATE_DIR", _read_path, None)
        or _default_state_dir(source.environment) / neuron_id,
        stop_grace=source.optional("stop_grace", "STOP_GRACE", _number(0, 86_400), 10.0),
        refusal_retry=source.optional(
            "refusal_retry", "REFUSAL_RETRY", _number(0.1, 86_400), DEFAULT_REFUSAL_RETRY
        ),
        spool_max_bytes=source.optional(
            "spool_max_bytes", "SPOOL_MAX_BYTES", _integer(2**20, 2**40), 64 * 2**20
        ),
        overruled=tuple(source.overruled),
    )


def merge(config: NeuronConfig | None, **arguments: Any) -> NeuronConfig:
    """`config` with those arguments of `Neuron` that are not None in place of its own."""
    known = {field.name for field in fields(NeuronConfig)}
    said = {name: value for name, value in arguments.items() if value is not None}
    unknown = ", ".join(sorted(said.keys() - known))
    if unknown:
        raise ConfigError(f"no such setting: {unknown}")
    return replace(config or NeuronConfig(), **said)


class _Source:
    """One question at a time: first code, then the environment, then the default."""

    def __init__(self, config: NeuronConfig, environment: Mapping[str, str]) -> None:
        self.config = config
        self.environment = environment
        self.overruled: list[str] = []

    def optional(self, field: str, variable: str, read: _Reader, default: Any) -> Any:
        said = getattr(self.config, field)
        text = self.environment.get(variable, "").strip()
        if said is not None:
            if text and text != str(said):
                self.overruled.append(variable)
            return read(said, field)
        return read(text, variable) if text else default

    def required(self, field: str, read: _Reader, example: str) -> str:
        variable = field.upper() if field.startswith("neuron_") else f"NEURON_{field.upper()}"
        value: str | None = self.optional(field, variable, read, None)
        if value is None:
            raise ConfigError(
                f"{variable} is not set: set it, for example {variable}={example}, "
                f"or give {field}={example!r} to Neuron(…)"
            )
        return value


@dataclass(frozen=True, slots=True)
class Address:
    """Where a federation answers."""

    target: str
    """"host:port"."""
    tls: bool | None = None
    """What its scheme says; None without one."""


def _tls(source: _Source, address: Address) -> TlsFiles | None:
    """What TLS needs; None for plaintext.

    Raises:
        ConfigError: a file cannot be used.
    """
    files = TlsFiles(
        source.optional("ca_file", CA_FILE, _read_path, None),
        source.optional("client_cert_file", CERT_FILE, _read_path, None),
        source.optional("client_key_file", KEY_FILE, _read_path, None),
    )
    own_machine = files == TlsFiles() and is_loopback(address.target)
    if address.tls is False or (address.tls is None and own_machine):
        return None
    files.check()
    return files


def read_url(value: object, setting: str) -> Address:
    """A federation's address. Raises ConfigError, which names `setting`."""
    wrong = ConfigError(
        f"{setting} {value!r} is not an address: use host:port, grpc://host:port, or "
        f"federations://host:port for TLS, for example grpc://localhost:{DEFAULT_PORT}"
    )
    if not isinstance(value, str):
        raise wrong
    scheme, separator, address = value.rstrip("/").rpartition("://")
    if separator and scheme not in SCHEMES:
        raise wrong
    host, colon, port = address.rpartition(":")
    if not colon or host.endswith(":") or (":" in host and not host.startswith("[")):
        if ":" in address and not address.startswith("["):
            raise wrong
        host, port = address, str(DEFAULT_PORT)
    bad_host = not host or any(c in host for c in "/@? #") or not host.isprintable()
    if bad_host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
        raise wrong
    return Address(f"{host}:{port}", SCHEMES.get(scheme))


def read_interval(value: float | str, setting: str) -> float:
    """Seconds from 1 to 86400. Raises ConfigError, which names `setting`."""
    return _number(1, 86_400)(value, setting)


def read_log_level(value: object, setting: str) -> str:
    """A log level, upper-case. Raises ConfigError, which names `setting`."""
    level = value.upper() if isinstance(value, str) else ""
    if level not in LOG_LEVELS:
        raise ConfigError(f"{setting} {value!r}: use one of {', '.join(LOG_LEVELS)}")
    return level


def _number(low: float, high: float) -> Callable[[float | str, str], float]:
    def read(value: float | str, setting: str) -> float:
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            number = float("nan")
        if not low <= number <= high:
            raise ConfigError(f"{setting} {value!r}: use a number from {low:g} to {high:g}")
        return number

    return read


def _integer(low: int, high: int) -> Callable[[float | str, str], int]:
    def read(value: float | str, setting: str) -> int:
        number = _number(low, high)(value, setting)
        if not number.is_integer():
            raise ConfigError(f"{setting} {value!r}: use a whole number from {low} to {high}")
        return int(number)

    return read


def _read_bool(value: bool | str, setting: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    answer = words.get(str(value).lower())
    if answer is None:
        raise ConfigError(f"{setting} {value!r}: use true or false")
    return answer


def _read_path(value: str | Path, setting: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except (TypeError, RuntimeError, ValueError):
        raise ConfigError(f"{setting} {value!r}: give the path of a file or folder") from None


def _read_token(value: object, setting: str) -> str:
    # The value is a secret: it is never part of the message.
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise ConfigError(f"{setting} holds characters that no token has: copy it again")
    if len(value) > 4096:
        raise ConfigError(f"{setting} is too long for a token: copy it again")
    return value


def _default_state_dir(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_STATE_HOME", "")
    if base and Path(base).is_absolute():
        return Path(base) / "neuron"
    try:
        return Path.home() / ".local" / "state" / "neuron"
    except RuntimeError:
        raise ConfigError(
            "STATE_DIR is not set, and this user has no home folder: set STATE_DIR to a folder "
            "that only this neuron uses"
        ) from None
