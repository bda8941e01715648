"""A short campaign: what `make fuzz` does for as long as one likes.

Its seed is another one each time, so that each run of the suite tries something new. The first
line that it prints, which pytest shows when it fails, makes the same choices again.
"""

from __future__ import annotations

import random

import pytest

from tests.fuzz.campaign import fuzz

SECONDS = 25.0


@pytest.mark.timeout(300)
def test_whatever_is_sent_nothing_fails_sticks_or_grows() -> None:
    fuzz(SECONDS, random.SystemRandom().randrange(10**6), print)
