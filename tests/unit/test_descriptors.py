"""How many connections are left: it is said before there is none."""

from __future__ import annotations

import resource

import pytest
from structlog.testing import capture_logs

from federation_server.live.descriptors import Descriptors, raise_limit
from federation_server.live.metrics import Metrics


def test_that_few_are_left_is_said_once_and_again_after_there_were_more() -> None:
    metrics = Metrics()
    one = Descriptors(metrics)
    with capture_logs() as logs:
        for count in (10, 89, 91, 95, 100, 60, 92):
            one.note(count, 100)
    assert [(line["action"], line["open"]) for line in logs] == [
        ("descriptors_few", 91),
        ("descriptors_few", 92),
    ]
    assert metrics.registry.get_sample_value("federation_open_files") == 92
    assert metrics.registry.get_sample_value("federation_open_files_limit") == 100


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, 4096), (4096, 4096)),
        ((4096, 4096), None),
        ((1024, resource.RLIM_INFINITY), (1 << 20, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
        ((1024, 1 << 30), (1 << 20, 1 << 30)),
    ],
)
def test_the_limit_is_raised_to_the_hard_one_within_reason_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], raised: tuple[int, int] | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: asked.append(wanted))
    raise_limit()
    assert asked == ([raised] if raised else [])


def test_macos_takes_no_more_than_its_own_most_although_it_says_unlimited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > 10_240:
            raise ValueError("current limit exceeds maximum limit")
        asked.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_limit()
    assert asked == [(10_240, resource.RLIM_INFINITY)]
