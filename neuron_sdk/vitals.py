"""A neuron's state at one moment: what heartbeats carry and the local HTTP pages show."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from neuron_sdk.dependencies import DependencyChecks, DependencyResult
from neuron_sdk.health import HealthInputs, HealthReport, assess, within_score
from neuron_sdk.logs import get_logger
from neuron_sdk.metrics import ApplicationWindow, Metrics
from neuron_sdk.points import Point
from neuron_sdk.spool import SpoolState
from neuron_sdk.system import HostSample, ProcessSample, SystemProbe, SystemSample
from neuron_sdk.version import __version__

RUNTIME = f"{platform.python_implementation()} {platform.python_version()}"
_MIN_SAMPLE_AGE_S = 2.0

HealthFunction = Callable[[HealthInputs], float]

_log = get_logger(__name__)


class Activity(StrEnum):
    """What a neuron is doing; named as in the contract."""

    ACTIVE = "ACTIVE"
    PAUSED = "PAUSED"
    STALLED = "STALLED"
    STOPPING = "STOPPING"


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a heartbeat says."""

    time: float
    uptime_s: float
    health_score: float
    activity: Activity
    application: ApplicationWindow
    system: SystemSample | None
    process: ProcessSample | None
    host: HostSample | None
    dependencies: tuple[DependencyResult, ...]
    spool: SpoolState
    running_commands: int
    service_version: str
    sdk_version: str = __version__
    runtime: str = RUNTIME


class VitalSigns:
    """Takes a neuron's vitals. `refresh` may block, everything else answers at once."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        checks: DependencyChecks,
        health: HealthFunction,
        alert_score: float,
        service_version: str,
    ) -> None:
        """`health` makes the score; below `alert_score` the neuron counts as unhealthy."""
        self.metrics = metrics
        self.checks = checks
        self.probe = SystemProbe()
        self._health = health
        self._alert_score = alert_score
        self.disk_path = Path("/")
        """On the disk that matters; the neuron's STATE_DIR once it is known."""
        self.spool_in_memory: Callable[[], bool] = lambda: False
        """Whether the disk does not take the spool; the runtime's answer once there is one."""
        self._service_version = service_version
        self._started = time.monotonic()
        self._refreshing = threading.Lock()
        self._sampled_at = -_MIN_SAMPLE_AGE_S
        self._system: SystemSample | None = None
        self._process: ProcessSample | None = None
        self._host: HostSample | None = None
        self._window: ApplicationWindow | None = None
        self._score = 100.0

    @property
    def uptime_s(self) -> float:
        """Seconds since the neuron started."""
        return time.monotonic() - self._started

    def refresh(self) -> None:
        """Read the host and make the score anew. Blocks if the host does, or the service's own
        health function; who comes meanwhile goes on at once with what was known before.
        """
        if not self._refreshing.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            # Processor use means nothing over a shorter time, and many may ask for /health.
            if now - self._sampled_at >= _MIN_SAMPLE_AGE_S:
                self._sampled_at = now
                self._system = self.probe.sample(self.disk_path)
                self._process = self.probe.process()
                self._host = self._host or self.probe.host()
            self._score = within_score(float(self._health(self._inputs())))
        except Exception:  # noqa: BLE001 - logged, and counts as unwell
            _log.exception("the neuron cannot tell its health", action="health.failed")
            self._score = 0.0
        finally:
            self._refreshing.release()

    def take(self, activity: Activity, spool: SpoolState, running_commands: int) -> Vitals:
        """What is known, for a heartbeat. Begins a new window of the service's own load."""
        self._window = self.metrics.take_window(time.monotonic())
        return Vitals(
            time=time.time(),
            uptime_s=self.uptime_s,
            health_score=self._score,
            activity=activity,
            application=self._window,
            system=self._system,
            process=self._process,
            host=self._host,
            dependencies=self.checks.status(),
            spool=spool,
            running_commands=running_commands,
            service_version=self._service_version,
        )

    def report(self) -> HealthReport:
        """What `/health` and the command health_check answer. May block, as `refresh`."""
        self.refresh()
        return assess(
            self._score,
            uptime=self.uptime_s,
            dependencies=self.checks.status(),
            alert_score=self._alert_score,
            spool_in_memory=self.spool_in_memory(),
        )

    def gauges(self) -> list[Point]:
        """The built-in gauges of a report."""
        gauges = []
        if (system := self._system) is not None:
            gauges.append(Point("system.cpu_percent", "gauge", "%", {}, system.cpu_percent))
            gauges.append(Point("system.memory_percent", "gauge", "%", {}, system.memory_percent))
        if (process := self._process) is not None:
            gauges.append(Point("process.rss_bytes", "gauge", "bytes", {}, process.rss_bytes))
        return gauges

    def _inputs(self) -> HealthInputs:
        system, window = self._system, self._window
        return HealthInputs(
            cpu_percent=system.cpu_percent if system else 0.0,
            memory_percent=system.memory_percent if system else 0.0,
            error_rate_percent=window.error_rate_percent if window else 0.0,
            mean_response_ms=window.mean_response_ms if window else 0.0,
            dependencies=self.checks.status(),
        )
