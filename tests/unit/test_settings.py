"""A server's settings, from the environment."""

from __future__ import annotations

import pytest

from federation_server import settings
from federation_server.settings import SettingsError


def test_points_that_would_go_before_late_reports_come_are_refused_with_the_settings_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDERATION_LATE_REPORTS", "P10D")
    with pytest.raises(SettingsError, match=r"^FEDERATION_ANALYTICS_RETENTION: must be at least"):
        settings.load()
    monkeypatch.setenv("FEDERATION_ANALYTICS_RETENTION", "P11D")
    assert settings.load().retention["metric_points"].days == 11
