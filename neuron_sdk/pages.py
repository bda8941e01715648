"""Serves a neuron's own pages, if it is to: the one place that loads HTTP and prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neuron_sdk.config import Settings
from neuron_sdk.http import StatusServer
from neuron_sdk.logs import get_logger
from neuron_sdk.prometheus import build_registry
from neuron_sdk.vitals import VitalSigns

_log = get_logger(__name__)


def serve_pages(
    settings: Settings, vitals: VitalSigns, status: Callable[[], Mapping[str, object]]
) -> tuple[StatusServer, int] | None:
    """Begin to serve; returns the server and its port. None if it cannot, and the log says why."""
    server = StatusServer(
        settings.metrics_host,
        settings.metrics_port,
        health=vitals.report,
        status=status,
        registry=build_registry(
            vitals.metrics, vitals.probe, disk_path=settings.state_dir, health=vitals.report
        ),
    )
    try:
        port = server.start()
    except OSError as error:
        _log.error(
            "the neuron goes on without /health, /status and /metrics: set METRICS_PORT to a "
            "free port, or to 0 for any",
            action="http.off",
            error=str(error),
        )
        return None
    _log.info(
        "serving /health, /status and /metrics",
        action="http.started",
        host=settings.metrics_host,
        port=port,
    )
    return server, port
