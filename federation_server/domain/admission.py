"""Who may come in now, where everybody may come at once.

A token bucket lets in `burst` at once and `rate` a second after that. Whom it does not let in it
gives a turn: the moment when there is a token for them, after the turns that others were given
before. So a herd that is sent away comes back one by one, at the rate at which it is let in, and
not as a herd.

A turn is advice: whoever comes while there is a token gets it, and who finds none at their turn
gets another one. No line is kept of names that a caller could make up.
"""

from __future__ import annotations

from collections.abc import Callable

JITTER = 0.02
"""Up to this share of a wait is added to it: the turns are apart already."""

_ROUNDING = 1e-9
"""Sums of floats may miss a whole token by that."""


class Bucket:
    """Lets in at most `burst + rate * t` in any `t` seconds."""

    __slots__ = ("_burst", "_last_turn", "_longest_s", "_rate", "_time", "_tokens", "_uniform")

    def __init__(
        self,
        *,
        rate: float,
        burst: float,
        longest_s: float,
        uniform: Callable[[float, float], float],
    ) -> None:
        """Full.

        Args:
            rate: tokens a second.
            burst: how many tokens it holds; at least 1.
            longest_s: how far ahead turns are given. Callers that do not wait for theirs would
                otherwise push everybody else's into the far future.
            uniform: `uniform(low, high)` draws a number.
        """
        self._rate = rate
        self._burst = burst
        self._longest_s = longest_s
        self._uniform = uniform
        self._tokens = float(burst)
        self._time: float | None = None
        self._last_turn = float("-inf")

    def admit(self, now: float) -> float:
        """Lets a caller in, at `now` seconds of a clock that never goes back.

        Returns 0.0 for one who is let in, else the seconds after which to come again.
        """
        wait = self.look(now)
        if not wait:
            self._tokens -= 1.0
        return wait

    def look(self, now: float) -> float:
        """As `admit`, for a caller whose token is taken later (`spend`), or not at all."""
        self._fill(now)
        if self._tokens >= 1.0 - _ROUNDING:
            return 0.0
        return self._turn(now, ahead=1.0 - self._tokens)

    def put_off(self, now: float, *, behind: int) -> float:
        """A turn, in seconds from `now`, for a caller who is not let in whatever the tokens say,
        because so many are still being served who came before.
        """
        self._fill(now)
        return self._turn(now, ahead=behind + 1.0)

    def spend(self, now: float, tokens: float) -> float:
        """Takes that many tokens, whether they are there or not. Returns the seconds after which
        none is owed.
        """
        self._fill(now)
        self._tokens -= tokens
        return max(0.0, -self._tokens / self._rate)

    def _turn(self, now: float, *, ahead: float) -> float:
        step = 1.0 / self._rate
        wait = max(step * ahead, self._last_turn + step - now)
        if wait > self._longest_s:  # no more turns: somewhere in the second half of all
            return self._uniform(self._longest_s / 2, self._longest_s)
        self._last_turn = now + wait
        return wait + self._uniform(0.0, max(step, wait * JITTER))

    def _fill(self, now: float) -> None:
        since = now if self._time is None else self._time
        self._tokens = min(self._burst, self._tokens + (now - since) * self._rate)
        self._time = now
