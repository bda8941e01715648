"""A short soak: what `make soak` does for an hour, for long enough to meet every fault.

Its seed is another one each time, so that each run of the suite tries something new: what the
processes make of a seed differs anyway. It is the first line that the test prints, which pytest
shows when it fails; `make soak ARGS="--seconds 120 --seed …"` makes the same choices again.
"""

from __future__ import annotations

import random

import pytest

from tests.support.soak import soak

SECONDS = 120.0


@pytest.mark.timeout(400)
async def test_whatever_is_killed_cut_or_stopped_every_command_ends_and_the_books_agree() -> None:
    await soak(SECONDS, random.SystemRandom().randrange(10**6), print)
