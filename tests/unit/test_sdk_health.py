"""The default health score and the status that follows from it."""

from __future__ import annotations

import math

import pytest

from neuron_sdk.dependencies import DependencyResult, DependencyState
from neuron_sdk.health import HealthInputs, assess, default_health_score


def score(cpu: float = 0, memory: float = 0, errors: float = 0) -> float:
    return default_health_score(
        HealthInputs(cpu_percent=cpu, memory_percent=memory, error_rate_percent=errors)
    )


@pytest.mark.parametrize(
    ("cpu", "expected"), [(0, 100), (60, 100), (60.1, 90), (80, 90), (80.1, 80), (100, 80)]
)
def test_processor_use_above_60_costs_10_and_above_80_costs_20(cpu: float, expected: float) -> None:
    assert score(cpu=cpu) == expected


@pytest.mark.parametrize(
    ("memory", "expected"), [(70, 100), (70.1, 90), (85, 90), (85.1, 80), (100, 80)]
)
def test_memory_use_above_70_costs_10_and_above_85_costs_20(memory: float, expected: float) -> None:
    assert score(memory=memory) == expected


@pytest.mark.parametrize(
    ("errors", "expected"), [(2, 100), (2.1, 90), (5, 90), (5.1, 75), (100, 75)]
)
def test_an_error_rate_above_2_costs_10_and_above_5_costs_25(
    errors: float, expected: float
) -> None:
    assert score(errors=errors) == expected


def test_all_deductions_add_up() -> None:
    assert score(cpu=100, memory=100, errors=100) == 35


def dependency(state: DependencyState, *, required: bool) -> tuple[DependencyResult, ...]:
    return (DependencyResult("postgresql", state, required=required),)


@pytest.mark.parametrize(
    ("points", "status"),
    [(100, "healthy"), (80, "healthy"), (79.9, "degraded"), (50, "degraded"), (49.9, "unhealthy")],
)
def test_the_status_follows_the_score(points: float, status: str) -> None:
    assert assess(points, uptime=1.0).status == status


def test_the_neurons_own_alert_threshold_decides_what_is_unhealthy() -> None:
    assert assess(70, uptime=1.0, alert_score=75).status == "unhealthy"
    assert assess(30, uptime=1.0, alert_score=20).status == "degraded"


@pytest.mark.parametrize(
    ("state", "required", "status"),
    [
        (DependencyState.UP, True, "healthy"),
        (DependencyState.UNKNOWN, True, "healthy"),
        (DependencyState.DEGRADED, True, "degraded"),
        (DependencyState.DEGRADED, False, "degraded"),
        (DependencyState.DOWN, False, "degraded"),
        (DependencyState.DOWN, True, "unhealthy"),
    ],
)
def test_only_a_required_dependency_that_is_down_makes_a_neuron_unhealthy(
    state: DependencyState, required: bool, status: str
) -> None:
    found = dependency(state, required=required)
    assert assess(100, uptime=1.0, dependencies=found).status == status


@pytest.mark.parametrize(("given", "kept"), [(math.nan, 0), (-5, 0), (math.inf, 100), (101, 100)])
def test_a_score_of_the_services_own_is_brought_into_range(given: float, kept: float) -> None:
    assert assess(given, uptime=1.0).score == kept


def test_a_spool_that_the_disk_does_not_take_makes_a_neuron_degraded() -> None:
    report = assess(100, uptime=1.0, spool_in_memory=True)
    assert (report.status, report.spool_in_memory) == ("degraded", True)
    assert assess(10, uptime=1.0, spool_in_memory=True).status == "unhealthy"
