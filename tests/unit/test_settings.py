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
