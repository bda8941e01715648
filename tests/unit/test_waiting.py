"""The waiting that other tests rest on: it ends, and it says why."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from tests.support.waiting import eventually, eventually_sync


async def test_the_first_true_answer_is_returned() -> None:
    numbers = count()
    assert (
        await eventually(lambda: f"the {n}rd" if (n := next(numbers)) == 3 else None) == "the 3rd"
    )


async def test_a_coroutine_functions_answer_is_awaited() -> None:
    async def check() -> str | None:
        return "there"

    assert await eventually(check) == "there"


async def test_a_failed_assertion_means_not_yet() -> None:
    numbers = count()

    def check() -> bool:
        assert next(numbers) == 3
        return True

    assert await eventually(check)


async def test_a_fact_that_never_comes_fails_with_its_description_and_the_last_answer() -> None:
    with pytest.raises(AssertionError, match=r"three neurons: not within 0\.05 s; last seen: \[\]"):
        await eventually(list[int], within=0.05, describe="three neurons")


async def test_a_check_that_hangs_fails_at_the_deadline() -> None:
    async def check() -> bool:
        await asyncio.Event().wait()
        return True

    with pytest.raises(AssertionError, match="an answer: not within"):
        await eventually(check, within=0.05, describe="an answer")


async def test_another_exception_comes_through_at_once() -> None:
    def check() -> bool:
        raise KeyError("neuron")

    with pytest.raises(KeyError):
        await eventually(check)


async def test_a_checks_own_timeout_is_not_taken_for_the_deadline() -> None:
    def check() -> bool:
        raise TimeoutError("of the check")

    with pytest.raises(TimeoutError, match="of the check"):
        await eventually(check)


def test_the_sync_twin_returns_and_fails_alike() -> None:
    numbers = count()
    assert eventually_sync(lambda: next(numbers) == 2)
    with pytest.raises(AssertionError, match=r"rain: not within 0\.05 s; last seen: False"):
        eventually_sync(lambda: False, within=0.05, describe="rain")


def test_the_sync_twin_shows_the_assertion_that_stayed_false() -> None:
    def check() -> bool:
        raise AssertionError("no neuron is online")

    with pytest.raises(AssertionError, match="no neuron is online") as failure:
        eventually_sync(check, within=0.05)
    assert isinstance(failure.value.__cause__, AssertionError)
