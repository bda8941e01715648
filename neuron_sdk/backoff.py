"""How long to wait before coming back: full-jitter exponential backoff, with no clock of its own.

Source: Marc Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Growing random waits: uniform between 0 and min(most_s, first_s * 2^n)."""

    __slots__ = ("_first_s", "_most_s", "_opened_at", "_stable_s", "_tries", "_uniform")

    def __init__(
        self,
        *,
        first_s: float = 0.5,
        most_s: float = 60.0,
        stable_s: float = 10.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`uniform(low, high)` draws a number. A success counts once it has lasted `stable_s`:
        else a server that takes sessions and drops them at once would be stormed.
        """
        self._first_s = first_s
        self._most_s = most_s
        self._stable_s = stable_s
        self._uniform = uniform
        self._tries = 0
        self._opened_at: float | None = None

    def opened(self, now: float) -> None:
        """A session is open since `now` (seconds of a monotonic clock)."""
        self._opened_at = now

    def next_s(self, now: float, *, at_least: float = 0.0) -> float:
        """The next wait in seconds, after a failure or a session's end at `now`.

        A wait that the federation asked for (`at_least`) is kept and jittered upwards, so that
        those who were told the same number do not return in the same moment.
        """
        if self._opened_at is not None and now - self._opened_at >= self._stable_s:
            self._tries = 0
        self._opened_at = None
        limit = min(self._most_s, self._first_s * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return at_least + self._uniform(0.0, max(limit, at_least * 0.1))

    def turn_s(self, told_s: float) -> float:
        """The wait for a turn that a federation, which is there and busy, has given this neuron.

        It is this neuron's alone and says how long the line is, so it counts as no failure and
        is jittered only a little: a wait that has grown in an outage would add to it for nothing.
        """
        return told_s + self._uniform(0.0, max(self._first_s, told_s * 0.05))
