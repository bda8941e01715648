"""A server's settings, from the environment."""

from __future__ import annotations

import json
import re
from datetime import timedelta

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from federation_server import cli, settings
from federation_server.domain import span
from federation_server.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("ANALYTICS_RETENTION", "metric_points"),
        ("MINUTE_RETENTION", "metric_minutes"),
        ("HOUR_RETENTION", "metric_hours"),
    ],
)
def test_what_would_go_before_late_reports_come_is_refused_with_the_settings_name(
    monkeypatch: pytest.MonkeyPatch, name: str, table: str
) -> None:
    monkeypatch.setenv("FEDERATION_LATE_REPORTS", "P10D")
    for each in ("ANALYTICS", "MINUTE", "HOUR"):
        monkeypatch.setenv(f"FEDERATION_{each}_RETENTION", "P11D")
    assert settings.load().retention[table].days == 11
    monkeypatch.setenv(f"FEDERATION_{name}", "P10D")
    with pytest.raises(SettingsError, match=f"^FEDERATION_{name}: must be at least a day longer"):
        settings.load()


@pytest.mark.parametrize(
    ("given", "missing"),
    [("CERT_FILE", "KEY_FILE"), ("KEY_FILE", "CERT_FILE"), ("CLIENT_CA_FILE", "CERT_FILE")],
)
def test_half_of_tls_is_refused_with_the_name_of_the_other_half(
    monkeypatch: pytest.MonkeyPatch, given: str, missing: str
) -> None:
    monkeypatch.setenv(f"FEDERATION_TLS_{given}", "/x")
    because = f"^FEDERATION_TLS_{missing}: must be set where FEDERATION_TLS_{given} is"
    with pytest.raises(SettingsError, match=because):
        settings.load()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "federations://127.0.0.1:50051"),
        ("fed.example", "federations://fed.example:50051"),
        ("0.0.0.0", "federations://localhost:50051"),
        ("::", "federations://localhost:50051"),
        ("::1", "federations://[::1]:50051"),
    ],
)
def test_clients_on_this_machine_call_a_tls_server_by_a_name_that_its_certificate_can_have(
    host: str, url: str
) -> None:
    assert settings.load(host=host, tls_cert_file="/c", tls_key_file="/k").local_url == url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "127.0.0.1:50051"),
        ("0.0.0.0", "localhost:50051"),
        ("::", "localhost:50051"),
        ("10.0.0.5", "federation://10.0.0.5:50051"),
        ("fed.example", "federation://fed.example:50051"),
    ],
)
def test_clients_on_this_machine_call_a_plaintext_server_by_what_they_take_for_plaintext(
    host: str, url: str
) -> None:
    assert settings.load(host=host, insecure=True).local_url == url


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("45s", 45.0),
        ("1h30m", 5400.0),
        ("50ms", 0.05),
        ("1d", 86400.0),
        ("45", 45.0),
        ("0.05", 0.05),
        ("PT45S", 45.0),
        ("P1D", 86400.0),
    ],
)
def test_a_span_is_written_with_its_unit_or_as_seconds_or_as_iso_8601(
    monkeypatch: pytest.MonkeyPatch, written: str, seconds: float
) -> None:
    spans = [name for name, value in settings.load() if isinstance(value, timedelta)]
    short = [name for name in spans if not name.endswith(("retention", "late_reports"))]
    assert len(short) >= 8
    for name in short:
        monkeypatch.setenv(f"FEDERATION_{name.upper()}", written)
    held = settings.load()
    assert {getattr(held, name).total_seconds() for name in short} == {seconds}


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        ("TOKEN_TTL", "soon", "must be a length of time: 30s, 5m, 2h or 1d"),
        ("TOKEN_TTL", "0", "must be at least 1ms"),
        ("TOKEN_RENEWAL", "-1s", "must be a length of time: 30s, 5m, 2h or 1d"),
        ("EVENT_RETENTION", "1h", "must be at least 1d"),
        ("LATE_REPORTS", "31d", "must be at most 30d"),
        ("TOKEN_TTL", "9" * 12 + "w", "must be a length of time: 30s, 5m, 2h or 1d"),
    ],
)
def test_a_span_that_cannot_be_is_said_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, name: str, written: str, said: str
) -> None:
    monkeypatch.setenv(f"FEDERATION_{name}", written)
    with pytest.raises(SettingsError, match=f"^FEDERATION_{name}: {said}$"):
        settings.load()


@pytest.mark.parametrize("written", ["400d", "36h", "90s", "50ms", "0s", "1500ms", "0.5ms"])
def test_a_span_is_shown_as_it_can_be_set(written: str) -> None:
    length = span.read(written)
    assert length is not None
    assert span.write(length) == written


def test_a_variable_that_is_nearly_a_setting_is_named_with_it() -> None:
    environment = dict.fromkeys(
        ("FEDERATION_TOKEN_TLL", "FEDERATION_TOKEN_TTL", "FEDERATION_SERVER"), "1"
    )
    of_kubernetes = {"FEDERATION_SERVICE_HOST": "x", "FEDERATION_PORT_50051_TCP_ADDR": "x"}
    (line,) = settings.mistyped(environment | of_kubernetes)
    assert "FEDERATION_TOKEN_TLL is no setting" in line
    assert line.endswith(" FEDERATION_TOKEN_TTL?")


def test_a_setting_that_is_empty_is_as_if_it_were_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    default = settings.load()
    for name in ("FEDERATION_DATA_DIR", "FEDERATION_PORT", "FEDERATION_HOST", "DATABASE_URL"):
        monkeypatch.setenv(name, "")
    assert settings.load() == default


SECRET = "sw0rd-f1sh"

URLS = {
    "postgresql://fed:sw0rd-f1sh@db:5432/federation": "postgresql://fed:**********@db:5432/federation",
    "postgresql://fed:sw0rd-f1sh/@x:y@db/f": "postgresql://fed:**********@db/f",
    "postgresql://fed@corp:sw0rd-f1sh@db/f": "postgresql://fed@corp:**********@db/f",
    "postgresql://corp/fed:sw0rd-f1sh@db/f": "postgresql://corp/fed:**********@db/f",
    "postgresql://fed@db:5432/f": "postgresql://fed@db:5432/f",
    "postgresql://:sw0rd-f1sh@db/f": "postgresql://:**********@db/f",
    "postgresql://fed@db/f?password=sw0rd-f1sh&x=1": "postgresql://fed@db/f?password=**********&x=1",
    "postgresql://fed@/f?host=/run/db": "postgresql://fed@/f?host=/run/db",
    "host=db password=sw0rd-f1sh": "**********",
    "sw0rd-f1sh": "**********",
}


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_shown_without_its_password(url: str) -> None:
    assert settings.mask_url(url) == URLS[url]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_config_show_has_every_setting_and_its_source_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://fed:{SECRET}@db/federation")
    monkeypatch.setenv("FEDERATION_MIGRATION_URL", f"postgresql://other:{SECRET}@db/federation")
    monkeypatch.setenv("ADMIN_API_KEY", SECRET)
    monkeypatch.setenv("FEDERATION_OFFLINE_AFTER", "45")
    result = CliRunner().invoke(cli.app, ["config", "show", *form])
    assert result.exit_code == 0
    assert SECRET not in result.output
    if form:
        shown = json.loads(result.stdout)
        assert shown["DATABASE_URL"] == {
            "value": "postgresql://fed:**********@db/federation",
            "source": "environment",
        }
        assert shown["ADMIN_API_KEY"]["value"] == "**********"
        assert shown["FEDERATION_OFFLINE_AFTER"] == {"value": "45s", "source": "environment"}
        assert shown["FEDERATION_PORT"] == {"value": 50051, "source": "default"}
        assert len(shown) == len(Settings.model_fields)
    else:
        lines = [line.split() for line in result.stdout.splitlines()]
        assert ["FEDERATION_PORT", "50051", "default"] in lines
        assert ["FEDERATION_INSECURE", "false", "default"] in lines


def test_a_setting_that_is_wrong_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDERATION_PORT", SECRET)
    result = CliRunner().invoke(cli.app, ["config", "show"])
    assert result.exit_code == 2
    assert "FEDERATION_PORT" in result.output
    assert SECRET not in result.output


def test_the_text_of_the_settings_has_no_secret() -> None:
    secret = SecretStr(SECRET)
    held = Settings(database_url=secret, migration_url=secret, admin_api_key=secret)
    assert SECRET not in f"{held!r} {held} {held.model_dump()} {held.model_dump_json()}"


def test_every_secret_that_the_server_reads_is_masked_by_its_type() -> None:
    plain = {
        name
        for name, field in Settings.model_fields.items()
        if re.search("secret|password|key|token|url", name) and "SecretStr" not in str(field)
    }
    assert plain == {
        "token_ttl",
        "token_renewal",
        "tls_key_file",
    }
