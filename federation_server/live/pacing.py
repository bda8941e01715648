"""Holds the heartbeats of this server's streams within its budget.

`Pacing` counts the streams each second and decides by `domain/pacing.py` how far apart their
heartbeats must be. A Welcome carries what is granted then; who is connected is told by
SessionSettings, so many a second, because those who are told a shorter interval may answer with a
heartbeat at once. Nothing is done for a heartbeat.

The sweeper must not take for silence what a neuron was told. So the register of servers holds the
longest interval that a stream of this server may be keeping: a longer one is granted only after
the register says so (the lease writes it), and a shorter one is registered only after all streams
have been told, and have had time to speak.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import structlog

from federation_server.domain.pacing import grant
from federation_server.live.metrics import Metrics
from federation_server.live.session import Sessions, Settings

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 1.0
TOLD_AT_ONCE = 20
TELL_PAUSE_S = 0.02
"""1,000 streams a second are told: that costs some percent of a core."""

SETTLE_S = 5.0
"""How long after all were told a shorter interval their heartbeats may take to be stored."""


class Pacing:
    """The intervals that this server's streams are told."""

    def __init__(
        self, sessions: Sessions, metrics: Metrics, settings: Settings, *, rate: float
    ) -> None:
        """Grants nothing yet. `settings` are what neurons are told in any case; `rate` is how many
        heartbeats a second this server takes on.
        """
        self._sessions = sessions
        self._metrics = metrics
        self._rate = rate
        self._told_anyway = settings
        self._settings = settings
        self._wanted_s = 0.0
        self._granted_s = 0.0
        self._kept_s = 0.0
        """The longest that a stream may still keep."""
        self._registered_s = 0.0
        self._settled_at = 0.0

    @property
    def settings(self) -> Settings:
        """What a new stream is told."""
        return self._settings

    @property
    def longest(self) -> timedelta:
        """The longest interval that a stream may be keeping because it was told, or soon will."""
        anyway = self._told_anyway.heartbeat_interval or timedelta()
        return max(timedelta(seconds=max(self._wanted_s, self._kept_s)), anyway)

    def to_register(self) -> timedelta | None:
        """The longest interval, or None.

        It is about to be written: from now on the register may say it.
        """
        longest = self.longest
        self._registered_s = min(self._registered_s, longest.total_seconds())
        return longest or None

    def registered(self, interval: timedelta | None) -> None:
        """The register of servers says that now."""
        self._registered_s = interval.total_seconds() if interval is not None else 0.0

    async def run(self) -> None:
        """Counts, decides and tells until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._check()

    async def _check(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._settled_at:
            self._kept_s = self._granted_s
        self._wanted_s = grant(self._wanted_s, len(self._sessions), self._rate)
        # As a timedelta, whose microseconds are what the register can hold.
        wanted = timedelta(seconds=self._wanted_s)
        if self._wanted_s == self._granted_s or wanted.total_seconds() > self._registered_s:
            return
        await self._grant(wanted)

    async def _grant(self, wanted: timedelta) -> None:
        self._granted_s = self._wanted_s
        self._kept_s = max(self._kept_s, self._granted_s)
        self._settled_at = float("inf")
        anyway = self._told_anyway
        self._settings = Settings(
            None if anyway.heartbeat_interval is None else max(anyway.heartbeat_interval, wanted),
            anyway.analytics_interval,
            wanted or None,
        )
        self._metrics.heartbeat_interval.set(self._granted_s)
        log.info(
            "new interval between heartbeats",
            action="pacing_changed",
            interval_s=round(self._granted_s, 3),
            streams=len(self._sessions),
        )
        for number, session in enumerate(self._sessions, start=1):
            if session.end is None:
                session.send(self._settings)
            if number % TOLD_AT_ONCE == 0:
                await asyncio.sleep(TELL_PAUSE_S)
        self._settled_at = asyncio.get_running_loop().time() + SETTLE_S
