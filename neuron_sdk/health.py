"""How well a neuron is: the default health score, and what it means for `/health`.

Pure rules: no clock, no I/O. A service may replace the score by a function of its own from
`HealthInputs` to 0 to 100; the rule that makes a status of it stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from neuron_sdk.dependencies import DependencyResult, DependencyState

HealthStatus = Literal["healthy", "degraded", "unhealthy"]

DEFAULT_ALERT_SCORE = 50.0
"""A health score below this is an alert: AlertThresholds.health_score by default."""

DEGRADED_SCORE = 80.0
"""A health score below this is worth a look."""


@dataclass(frozen=True, slots=True)
class HealthInputs:
    """What a health score is made from."""

    cpu_percent: float
    """Use of the host's processors, 0 to 100."""
    memory_percent: float
    """Use of the host's memory, 0 to 100."""
    error_rate_percent: float
    """The share of requests that failed in the last window, 0 to 100."""
    mean_response_ms: float = 0.0
    """The mean response time in the last window."""
    dependencies: tuple[DependencyResult, ...] = ()
    """What the service needs, as last checked."""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What `/health` answers."""

    status: HealthStatus
    score: float
    """0 to 100."""
    uptime: float
    """Seconds since the process started."""
    dependencies: tuple[DependencyResult, ...] = ()
    spool_in_memory: bool = False
    """True while the disk does not take the spool: what waits is lost if the process ends."""


def default_health_score(inputs: HealthInputs) -> float:
    """100, less what is wrong with the host and the requests; never below 0."""
    score = 100.0
    score -= _deduction(inputs.cpu_percent, (80, 20), (60, 10))
    score -= _deduction(inputs.memory_percent, (85, 20), (70, 10))
    score -= _deduction(inputs.error_rate_percent, (5, 25), (2, 10))
    return max(0.0, score)


def assess(
    score: float,
    *,
    uptime: float,
    dependencies: tuple[DependencyResult, ...] = (),
    alert_score: float = DEFAULT_ALERT_SCORE,
    spool_in_memory: bool = False,
) -> HealthReport:
    """Judge a neuron by its score and by what it needs.

    Unhealthy: the score is below `alert_score`, or a required dependency is DOWN. Degraded: the
    score is below `DEGRADED_SCORE`, any dependency is DOWN or DEGRADED, or the disk does not take
    the spool. UNKNOWN alone changes nothing: it says that the check failed, not the dependency.

    Args:
        score: what the health function answered; what is not a number counts as 0.
        uptime: seconds since the process started.
        dependencies: as last checked.
        alert_score: the neuron's alert threshold, 0 to 100.
        spool_in_memory: whether the disk does not take the spool.
    """
    score = within_score(score)
    down = {found.required for found in dependencies if found.state is DependencyState.DOWN}
    limping = any(found.state is DependencyState.DEGRADED for found in dependencies)
    status: HealthStatus = "healthy"
    if score < alert_score or True in down:
        status = "unhealthy"
    elif score < DEGRADED_SCORE or down or limping or spool_in_memory:
        status = "degraded"
    return HealthReport(status, score, uptime, dependencies, spool_in_memory)


def within_score(score: float) -> float:
    """A score as the contract allows it: 0 to 100, and 0 for what is not a number."""
    return 0.0 if math.isnan(score) else min(max(score, 0.0), 100.0)


def _deduction(value: float, *steps: tuple[float, float]) -> float:
    """What the first step (threshold, points) that the value exceeds takes away."""
    return next((points for threshold, points in steps if value > threshold), 0.0)
