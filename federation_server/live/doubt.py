"""This process's doubt of itself: what it measures, and how it says so.

A task of its own measures how late the event loop is. Whoever is about to act on what was not
heard asks at that very moment (`look`, `frozen`), so that a process that stood still finds that out
first, in whatever order its timers go off. What others find (PostgreSQL is late, many streams were
lost) they `notice` here. Every change is logged and shown as a metric; the lease publishes it to
the other servers, and health has a service "presence" for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Protocol

import structlog

from federation_server.domain.doubt import Cause, Doubt
from federation_server.live.metrics import Metrics

log = structlog.get_logger(__name__)

TICK_S = 0.5


class FrozenObserver(Protocol):
    """Is told when this server ceases to mark neurons down, and when it begins again."""

    def __call__(self, *, frozen: bool) -> Awaitable[None]:
        """Nobody is marked down, or whoever is silent is."""


class SelfDoubt:
    """Why this server does not trust what it has not heard, if it does not."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        patience: timedelta,
        flush_lag: Callable[[], float],
        on_change: FrozenObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`flush_lag` says for how many seconds what was handed to the writer has waited;
        `on_change` is awaited whenever marking neurons down ceases or begins again.
        """
        self._metrics = metrics
        self._flush_lag = flush_lag
        self._on_change = on_change
        self._clock = clock
        self._doubt = Doubt(patience)
        self._ticked = clock()
        self._said: frozenset[Cause] = frozenset()
        self.sweeping = False
        """This server marks neurons down, unless it is in doubt."""
        for cause in Cause:
            metrics.presence_frozen.labels(cause=cause.value).set(0)

    def start(self) -> None:
        """The server begins to serve."""
        self._ticked = self._clock()
        self.notice(Cause.JUST_STARTED)

    async def run(self) -> None:
        """Measures how late the event loop is, until it is cancelled."""
        self._ticked = self._clock()
        told = None
        while True:
            frozen = self.frozen()
            self._ticked = self._clock()
            if frozen is not told:
                told = frozen
                await self._on_change(frozen=frozen)
            await asyncio.sleep(TICK_S)

    def notice(self, cause: Cause) -> None:
        """There is that cause now."""
        self._doubt.notice(cause, self._clock())
        self._say()

    def measured(self, cause: Cause, lag_s: float) -> None:
        """Something took that long: too long, perhaps."""
        self._doubt.measured(cause, lag_s, self._clock())
        self._say()

    def lift(self, cause: Cause) -> None:
        """That cause does not count any more."""
        self._doubt.lift(cause)
        self._say()

    def look(self) -> Mapping[Cause, float]:
        """The causes that count now, each with how many seconds ago it began."""
        now = self._clock()
        self._doubt.measured(Cause.LOOP_LAG, now - self._ticked - TICK_S, now)
        self._doubt.measured(Cause.FLUSH_LAG, self._flush_lag(), now)
        self._say()
        return {cause: now - since for cause, since in self._doubt.causes(now).items()}

    def frozen(self) -> bool:
        """Nobody may be marked down, as things are now."""
        self.look()
        return self._doubt.frozen(self._clock())

    def _say(self) -> None:
        causes = frozenset(self._doubt.causes(self._clock()))
        if causes == self._said:
            return
        before, self._said = self._said, causes
        for cause in causes ^ before:
            self._metrics.presence_frozen.labels(cause=cause.value).set(cause in causes)
        names = [cause.value for cause in Cause if cause in causes]
        if not causes:
            log.info("in no doubt of itself any more", action="presence_resumed")
        elif causes <= {Cause.JUST_STARTED}:
            log.info("marks nobody down for now", action="presence_frozen", causes=names)
        else:
            log.warning("in doubt of itself", action="presence_frozen", causes=names)
