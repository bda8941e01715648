"""How long to wait before trying again: full-jitter exponential backoff.

Source: Marc Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Gives growing random waits: uniform between 0 and min(most_s, first_s * 2^n)."""

    __slots__ = ("_first_s", "_most_s", "_random", "_tries")

    def __init__(
        self,
        *,
        first_s: float,
        most_s: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`uniform(low, high)` draws a number."""
        self._first_s = first_s
        self._most_s = most_s
        self._random = uniform
        self._tries = 0

    def next_s(self) -> float:
        """The next wait, in seconds."""
        limit = min(self._most_s, self._first_s * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return self._random(0.0, limit)

    def reset(self) -> None:
        """Begins anew, after a success."""
        self._tries = 0
