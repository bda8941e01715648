"""A server's settings, from the environment."""

from __future__ import annotations

import pytest

from federation_server import settings
from federation_server.settings import SettingsError


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
