"""A short soak: what `make soak` does for an hour, for long enough to meet every fault."""

from __future__ import annotations

import random

import pytest

from tests.support.soak import soak

SECONDS = 100.0


@pytest.mark.timeout(400)
async def test_whatever_is_killed_cut_or_stopped_every_command_ends_and_the_books_agree() -> None:
    # Another seed each time: it is printed, and `make soak ARGS="--seed …"` takes it.
    await soak(SECONDS, random.SystemRandom().randrange(10**6), print)
