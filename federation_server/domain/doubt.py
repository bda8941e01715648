"""When a server must not blame its neurons: it may be ill itself.

A neuron is marked down because nothing was heard of it, and a server that was late did not listen.
So each server watches itself, and remembers what it has noticed: a `Doubt`. A cause counts from
when it was first noticed until `patience` after it was last noticed, so that the neurons have time
to be heard again. Meanwhile

    - a server that sweeps marks nobody down at all;
    - another one's neurons are left alone by the server that sweeps.

MASS_DISCONNECT alone is about neurons and not about a server: it defers only those whose streams
were lost together (`MassDisconnects`), and not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum


class Cause(StrEnum):
    """Why a server does not trust what it has not heard."""

    JUST_STARTED = "JUST_STARTED"
    """It has just started, or just begun to sweep: the neurons need time to come."""
    LOOP_LAG = "LOOP_LAG"
    """Its process stood still, or was too busy to listen."""
    FLUSH_LAG = "FLUSH_LAG"
    """What its neurons sent waits to be written."""
    DATABASE_LAG = "DATABASE_LAG"
    """PostgreSQL was away, stood still, or answers late."""
    MASS_DISCONNECT = "MASS_DISCONNECT"
    """So many streams were lost at once that it is rather the network, or their server."""


OWN_CAUSES = frozenset(Cause) - {Cause.MASS_DISCONNECT}
"""Those that are about the server itself, and so about all its neurons."""

MOST_LAG_S: Mapping[Cause, float] = {
    Cause.LOOP_LAG: 2.0,
    Cause.FLUSH_LAG: 3.0,
    Cause.DATABASE_LAG: 2.0,
}
"""How late is still well. Far above what load does to a server, and below any neuron's
heartbeat_timeout that is in earnest."""

MASS_WITHIN = timedelta(seconds=10)
"""Streams that are lost within this count as lost together."""

MASS_LEAST = 5
"""So few lost streams are never a mass: in a small fleet one host that fails is a large share."""

MASS_SHARE = 1 / 3
"""A larger share than this of a server's streams is."""


class Doubt:
    """What a server has noticed of itself. `now` is in seconds, by a clock that never goes back."""

    def __init__(self, patience: timedelta) -> None:
        """In doubt of nothing; `patience` is how long a cause counts after it was last noticed."""
        self._patience_s = patience.total_seconds()
        self._since: dict[Cause, float] = {}
        self._noticed: dict[Cause, float] = {}

    def notice(self, cause: Cause, now: float) -> None:
        """There is that cause now."""
        if cause not in self.causes(now):
            self._since[cause] = now
        self._noticed[cause] = now

    def measured(self, cause: Cause, lag_s: float, now: float) -> None:
        """Notices the cause if that is too late."""
        if lag_s > MOST_LAG_S[cause]:
            self.notice(cause, now)

    def lift(self, cause: Cause) -> None:
        """That cause does not count any more."""
        self._noticed.pop(cause, None)

    def causes(self, now: float) -> dict[Cause, float]:
        """The causes that count, in the order of `Cause`, each with when it began."""
        return {
            cause: self._since[cause]
            for cause in Cause
            if cause in self._noticed and now - self._noticed[cause] <= self._patience_s
        }

    def frozen(self, now: float) -> bool:
        """Nobody may be marked down."""
        return not OWN_CAUSES.isdisjoint(self.causes(now))


@dataclass(frozen=True, slots=True)
class Loss:
    """Streams of one server that were lost together, and whose neurons have not come back."""

    server_id: str
    first: datetime
    last: datetime
    """They were lost between these, both included."""
    lost: int
    """The most within MASS_WITHIN."""
    open: int
    """The server's streams that are open."""

    @property
    def is_mass(self) -> bool:
        """So many of those that were open that it is hardly the neurons."""
        return self.lost >= MASS_LEAST and self.lost > MASS_SHARE * (self.lost + self.open)


class MassDisconnects:
    """The losses whose neurons are not OFFLINE yet although their time is over."""

    def __init__(self, patience: timedelta, offline_after: timedelta) -> None:
        """A loss counts until `patience` after so many of its neurons have come back that it is no
        mass any more, and `offline_after` its end at the most.
        """
        self._patience = patience
        self._offline_after = offline_after
        self._losses: dict[str, tuple[Loss, datetime]] = {}

    def take(self, found: Iterable[Loss], now: datetime) -> list[Loss]:
        """The losses that count, given those that there are now."""
        for loss in found:
            if loss.is_mass:
                before, _ = self._losses.get(loss.server_id, (loss, now))
                first, last = min(before.first, loss.first), max(before.last, loss.last)
                self._losses[loss.server_id] = (replace(loss, first=first, last=last), now)
        self._losses = {
            server_id: (loss, noticed)
            for server_id, (loss, noticed) in self._losses.items()
            if now - noticed <= self._patience and now - loss.last < self._offline_after
        }
        return [loss for loss, _ in self._losses.values()]
