"""How often the neuron speaks: its own settings, and the federation's, which win."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionIntervals:
    """What SessionSettings of the contract says, in seconds; None: as the neuron likes."""

    heartbeat: float | None = None
    analytics: float | None = None
    min_heartbeat: float | None = None
    """Holds whatever the interval is."""


class Intervals:
    """The intervals in effect. Belongs to the control loop; `changed` wakes who waits for one."""

    def __init__(self, heartbeat: float, analytics: float) -> None:
        """The neuron's own, in seconds."""
        self.own_heartbeat = heartbeat
        self.own_analytics = analytics
        self._said = SessionIntervals()
        self.changed = asyncio.Event()

    @property
    def heartbeat(self) -> float:
        """Seconds between two heartbeats."""
        interval = self._said.heartbeat or self.own_heartbeat
        return max(interval, self._said.min_heartbeat or 0.0)

    @property
    def analytics(self) -> float:
        """Seconds between two reports."""
        return self._said.analytics or self.own_analytics

    def set_own(self, *, heartbeat: float | None = None, analytics: float | None = None) -> None:
        """Change the neuron's own; in effect where the federation says nothing."""
        self.own_heartbeat = heartbeat or self.own_heartbeat
        self.own_analytics = analytics or self.own_analytics
        self._tell()

    def obey(self, said: SessionIntervals) -> None:
        """Take the federation's word: its last one holds, also where it says nothing."""
        self._said = said
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def wait(self, due: float) -> bool:
        """Wait until the loop's clock shows `due`, or an interval changes.

        Returns:
            True when it is due, False when something has changed.
        """
        left = due - asyncio.get_running_loop().time()
        if left <= 0:
            return True
        try:
            async with asyncio.timeout(left):
                await self.changed.wait()
        except TimeoutError:
            return True
        return False
