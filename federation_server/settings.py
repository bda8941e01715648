"""Every setting of a server, from the environment.

Names are FEDERATION_ and the field's name in capitals; DATABASE_URL and ADMIN_API_KEY go without
the prefix. Spans are written as "30s", "5m", "2h" or "1d", as seconds ("30") or as ISO 8601
("PT30S").
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from federation_server.domain import span

_OF_CLIENTS = {
    "FEDERATION_ADMIN_KEY",
    "FEDERATION_CA_FILE",
    "FEDERATION_CLIENT_CERT_FILE",
    "FEDERATION_CLIENT_KEY_FILE",
    "FEDERATION_SERVER",
    "FEDERATION_URL",
}
"""Variables that the command line and neurons read."""

MASK = "**********"
"""Stands for a secret."""


def _span(value: object, iso_8601: ValidatorFunctionWrapHandler) -> object:
    if not isinstance(value, str):
        return iso_8601(value)
    if value.replace(".", "", 1).isdigit():
        return iso_8601(float(value))
    if (length := span.read(value)) is not None:
        return length
    try:
        return iso_8601(value)
    except ValidationError:
        raise PydanticCustomError("span", "must be a length of time: 30s, 5m, 2h or 1d") from None


AnySpan = Annotated[timedelta, WrapValidator(_span)]


def _at_least(least: timedelta, most: timedelta = timedelta.max) -> AfterValidator:
    def check(value: timedelta) -> timedelta:
        if value < least:
            raise PydanticCustomError("span", f"must be at least {span.write(least)}")
        if value > most:
            raise PydanticCustomError("span", f"must be at most {span.write(most)}")
        return value

    return AfterValidator(check)


Span = Annotated[AnySpan, _at_least(timedelta(milliseconds=1))]
Days = Annotated[AnySpan, _at_least(timedelta(days=1))]


class SettingsError(ValueError):
    """A setting is wrong; the message names it and says what is wrong with it."""


def default_data_dir() -> Path:
    """Where the embedded PostgreSQL and the admin key lie unless somebody says otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/federation")
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/federation"
    data_home = os.environ.get("XDG_DATA_HOME")
    return (Path(data_home) if data_home else Path.home() / ".local/share") / "federation"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the gRPC port speaks TLS with, as PEM files that are renewed where they lie."""

    certificate: Path
    key: Path
    client_ca: Path | None
    """Whose certificates clients must have; None: they need none."""


class Settings(BaseSettings):
    """What a server can be told. The defaults serve a first deployment on one host."""

    model_config = SettingsConfigDict(
        env_prefix="FEDERATION_",
        env_ignore_empty=True,  # as if it were not set: a data folder "" would be the working one
        extra="ignore",
        populate_by_name=True,
        frozen=True,
    )

    # where
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="The PostgreSQL to use; unset: the embedded one.",
    )
    migration_url: SecretStr | None = Field(
        default=None,
        description="The same PostgreSQL as another role, which `federation migrate` uses and which"
        " may act as DATABASE_URL's; unset: that role itself.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Where the embedded PostgreSQL and the admin key lie.",
    )
    host: str = Field(default="127.0.0.1", description="The address of the gRPC port.")
    port: int = Field(default=50051, ge=0, le=65535, description="The gRPC port.")
    metrics_host: str = Field(default="127.0.0.1", description="The address of /metrics.")
    metrics_port: int = Field(
        default=9464, ge=0, le=65535, description="The port of /metrics; 0: any free one."
    )
    insecure: bool = Field(
        default=False, description="Serve plaintext beyond loopback. Tokens are readable then."
    )
    tls_cert_file: Path | None = Field(
        default=None,
        description="The certificate (PEM, with its chain) of the gRPC port; unset: plaintext. It "
        "is renewed where it lies, and used from the next connection on.",
    )
    tls_key_file: Path | None = Field(
        default=None, description="Its private key; may be the same file. Set both or none."
    )
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="The CAs whose certificates clients must show, beside their tokens and keys; "
        "unset: they need none.",
    )

    # access
    admin_api_key: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("ADMIN_API_KEY", "admin_api_key"),
        description="The first admin key; unset: one is made at the first start.",
    )
    token_ttl: Span = Field(
        default=timedelta(hours=24), description="How long a neuron's token lives."
    )
    token_renewal: Annotated[AnySpan, _at_least(timedelta())] = Field(
        default=timedelta(days=30),
        description="How long after its token has expired a neuron can still register with it.",
    )
    enrollment: Literal["token", "approve", "open"] = Field(
        default="token",
        description="Who may join: who has an enrollment token; or anybody else as well, once an "
        "admin has approved it; or anybody, which is for development.",
    )
    open_to_anyone: bool = Field(
        default=False, description="Serve open enrollment beyond loopback. Anybody joins then."
    )
    pending_retention: Annotated[AnySpan, _at_least(timedelta(hours=1))] = Field(
        default=timedelta(days=7),
        description="How long a neuron waits for its approval before it is forgotten.",
    )

    # neurons
    heartbeat_interval: Span | None = Field(
        default=None, description="What neurons are told to keep; unset: as they like."
    )
    analytics_interval: Span | None = Field(
        default=None, description="What neurons are told to keep; unset: as they like."
    )
    heartbeat_rate: Annotated[float, Field(gt=0)] = Field(
        default=1000.0,
        description="How many heartbeats a second a server takes on: with more streams than that "
        "many it tells them to keep n / rate seconds between two.",
    )
    admission_rate: Annotated[float, Field(gt=0)] = Field(
        default=400.0,
        description="How many new streams a second a server takes on; of registrations, half of "
        "it. Who comes beyond it is told when to come again.",
    )
    admission_burst: Annotated[int, Field(ge=1)] = Field(
        default=2000, description="How many new streams at once a server takes on before that."
    )
    register_rate: Annotated[float, Field(gt=0)] = Field(
        default=500.0,
        description="How many calls of Register a second an address may make that do not show the "
        "neuron's own token; one that is refused for its credentials counts as 50. Of this and of "
        "the following rates, ten seconds' worth may come at once.",
    )
    failed_credential_rate: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="How many credentials a second that are no good are answered to an address by "
        "what is wrong with them. Good ones are let in always.",
    )
    neuron_call_rate: Annotated[float, Field(gt=0)] = Field(
        default=100.0, description="How many calls a second a neuron may make."
    )
    neuron_message_rate: Annotated[float, Field(gt=0)] = Field(
        default=2000.0,
        description="How many messages a second are read of a neuron's stream; the others wait.",
    )
    admin_call_rate: Annotated[float, Field(gt=0)] = Field(
        default=2000.0, description="How many calls a second an API key may make."
    )
    admin_streams: Annotated[int, Field(ge=1)] = Field(
        default=1000,
        description="How many answers of one API key that are streams (WatchCommand, "
        "ExecuteCommand) may be open at the same time on a server.",
    )
    silent_stream_after: Span = Field(
        default=timedelta(hours=1),
        description="A stream on which its neuron says nothing for that long is ended, but not "
        "before the neuron is OFFLINE for its silence.",
    )
    offline_after: Span = Field(
        default=timedelta(seconds=30),
        description="A lost stream makes a neuron OFFLINE after this long.",
    )
    mass_offline_after: Span = Field(
        default=timedelta(minutes=3),
        description="The same, if so many streams were lost at once that it is rather the network.",
    )
    command_lost_after: Span = Field(
        default=timedelta(minutes=15),
        description="A command that a neuron has, and whose time is over, ends as OUTCOME_UNKNOWN "
        "once the neuron has been OFFLINE for this long.",
    )
    presence_patience: Annotated[AnySpan, _at_least(timedelta())] = Field(
        default=timedelta(seconds=30),
        description="How long a server that has just started, or was late, marks nobody down.",
    )

    # writing and keeping
    flush_interval: Span = Field(
        default=timedelta(milliseconds=50),
        description="How long a heartbeat may wait for others to be written with.",
    )
    heartbeat_retention: Days = Field(
        default=timedelta(days=7), description="How long heartbeats are kept. Whole days."
    )
    analytics_retention: Days = Field(
        default=timedelta(days=8),
        description="How long metric points are kept as they were reported, at least a day longer "
        "than FEDERATION_LATE_REPORTS. Whole days, as the following.",
    )
    minute_retention: Days = Field(
        default=timedelta(days=31),
        description="How long metrics are kept added up by minute, at least a day longer than "
        "FEDERATION_LATE_REPORTS.",
    )
    hour_retention: Days = Field(
        default=timedelta(days=400),
        description="How long metrics are kept added up by hour, at least as those by minute.",
    )
    day_retention: Days = Field(
        default=timedelta(days=1830), description="How long metrics are kept added up by day."
    )
    event_retention: Days = Field(
        default=timedelta(days=30), description="How long reported events are kept."
    )
    audit_retention: Days = Field(
        default=timedelta(days=400),
        description="How long the audit log is kept. Whole months: one goes when all of it is "
        "older.",
    )
    late_reports: Annotated[AnySpan, _at_least(timedelta(days=1), timedelta(days=30))] = Field(
        default=timedelta(days=7),
        description="How far back a report that comes late may be placed in time.",
    )

    # running
    drain_timeout: Span = Field(
        default=timedelta(seconds=10), description="How long a server that stops drains."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="The least level that is logged."
    )
    log_format: Literal["json", "console"] | None = Field(
        default=None, description="How log lines look; unset: for people on a terminal, else JSON."
    )

    @model_validator(mode="after")
    def _what_is_added_up_outlives_late_reports(self) -> Self:
        # A minute is made anew from all its points whenever a late one comes, an hour from all its
        # minutes, a day from all its hours.
        least = self.late_reports + timedelta(days=1)
        for name in ("analytics_retention", "minute_retention", "hour_retention"):
            if getattr(self, name) < least:
                words = "must be at least a day longer than FEDERATION_LATE_REPORTS"
                raise PydanticCustomError("retention", words, {"field": name})
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        certificate, key = "FEDERATION_TLS_CERT_FILE", "FEDERATION_TLS_KEY_FILE"
        missing, because = "", ""
        if self.tls_key_file and not self.tls_cert_file:
            missing, because = "tls_cert_file", key
        elif self.tls_cert_file and not self.tls_key_file:
            missing, because = "tls_key_file", certificate
        elif self.tls_client_ca_file and not self.tls_cert_file:
            missing, because = "tls_cert_file", "FEDERATION_TLS_CLIENT_CA_FILE"
        if missing:
            words = f"must be set where {because} is; `federation tls init` makes all of them"
            raise PydanticCustomError("tls", words, {"field": missing})
        return self

    @property
    def tls(self) -> TlsFiles | None:
        """What the gRPC port speaks TLS with; None: it speaks plaintext."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return TlsFiles(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)

    @property
    def retention(self) -> dict[str, timedelta]:
        """How long each partitioned table keeps what it has."""
        return {
            "heartbeats": self.heartbeat_retention,
            "metric_points": self.analytics_retention,
            "metric_minutes": self.minute_retention,
            "metric_hours": self.hour_retention,
            "metric_days": self.day_retention,
            "reported_events": self.event_retention,
            "audit_entries": self.audit_retention,
        }

    @property
    def address(self) -> str:
        """The gRPC address, for people and clients."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether this machine alone reaches the gRPC port."""
        return self.host in {"127.0.0.1", "localhost", "::1", "[::1]"}

    @property
    def local_url(self) -> str:
        """How clients on this machine reach the gRPC port."""
        everywhere = self.host in {"0.0.0.0", "::", "[::]"}
        host = "localhost" if everywhere else self.host
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        plain = "" if self.loopback or everywhere else "federation://"
        return f"{plain if self.tls is None else 'federations://'}{host}:{self.port}"

    @property
    def admin_key_file(self) -> Path:
        """Where the admin key is kept that was made at the first start."""
        return self.data_dir / "admin.key"


def load(**overrides: object) -> Settings:
    """The settings from the environment, with what the command line says over them.

    Raises:
        SettingsError: a setting is wrong; one line for each.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as error:
        raise SettingsError("; ".join(_lines(error))) from None


@dataclass(frozen=True)
class Shown:
    """A setting, as anybody may see it."""

    variable: str
    value: str | int | float | bool | None
    """Spans as "30s"; of a secret that there is one, of a URL all but the password."""
    source: Literal["environment", "default"]
    description: str


def shown(settings: Settings) -> list[Shown]:
    """Every setting, with no secret in it."""
    values = settings.model_dump(mode="json")  # in which secrets are masked
    for name in ("database_url", "migration_url"):
        url: SecretStr | None = getattr(settings, name)
        values[name] = None if url is None else mask_url(url.get_secret_value())
    values |= {name: span.write(value) for name, value in settings if isinstance(value, timedelta)}
    return [
        Shown(
            variable=_variable(name),
            value=values[name],
            source="environment" if name in settings.model_fields_set else "default",
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def mask_url(url: str) -> str:
    """A URL without its password. Rather too much is masked than too little: a name or a password
    that is not written as a URL wants it may hold any character.
    """
    if not re.match(r"[\w+.-]+://", url):
        return MASK
    url = re.sub(r"://([^:]*):.*@", rf"://\1:{MASK}@", url, flags=re.DOTALL)
    return re.sub(r"(?i)(password=)[^&]*", rf"\1{MASK}", url)


def mistyped(environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is no setting, and nearly one. Others are somebody else's: the
    clients', or those that Kubernetes makes for a service of that name.
    """
    known = [_variable(name) for name in Settings.model_fields]
    lines = []
    for name in environment:
        if name.startswith("FEDERATION_") and name not in {*known, *_OF_CLIENTS}:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            lines += [f"{name} is no setting, and has no effect: {near}?" for near in nearest]
    return lines


def _variable(name: str) -> str:
    """The environment variable of a setting."""
    upper = name.upper()
    return upper if upper in {"DATABASE_URL", "ADMIN_API_KEY"} else f"FEDERATION_{upper}"


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors(include_input=False, include_url=False):
        place = fault["loc"][0] if fault["loc"] else fault["ctx"]["field"]
        text = fault["msg"]
        lines.append(f"{_variable(str(place))}: {text[:1].lower()}{text[1:]}")
    return lines
