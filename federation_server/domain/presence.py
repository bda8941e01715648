"""When a neuron goes down.

A neuron comes up by what it does: it opens a session, or sends a heartbeat. It goes down

    - at once to SUSPECT when its stream is lost, and to OFFLINE `offline_after` later;
    - to SUSPECT after `heartbeat_timeout` of silence, and to OFFLINE after twice that, on an open
      stream and without one; on an open stream whose server has told it how far apart heartbeats
      must be, not before TOLD_INTERVALS of those;
    - at once to OFFLINE when it says Goodbye.

`judge` is the rule for a moment in between; `store/presence.py` says the same in SQL. While a
server is in doubt of itself (`doubt.py`) what silence would do to a neuron waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from federation_server.domain.neuron import Presence

TOLD_INTERVALS = 3
"""So many intervals that it was told may a neuron be silent: two heartbeats may be lost."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What is known of a neuron that is not OFFLINE."""

    presence: Presence
    presence_time: datetime
    session_open: bool
    session_open_time: datetime | None
    session_close_time: datetime | None
    last_heartbeat_time: datetime | None
    heartbeat_timeout: timedelta
    told_interval: timedelta | None
    """The longest between two heartbeats that the server of its last stream may have told it."""


def judge(signs: Signs, now: datetime, *, offline_after: timedelta) -> Presence:
    """The presence that the neuron should have now."""
    if signs.presence is Presence.OFFLINE:
        return Presence.OFFLINE
    if signs.presence is Presence.SUSPECT and _stream_lost(signs):
        over = now - signs.presence_time >= offline_after
        return Presence.OFFLINE if over else Presence.SUSPECT
    heard = [signs.last_heartbeat_time, signs.session_open_time if signs.session_open else None]
    times = [time for time in heard if time is not None]
    if not times:
        return signs.presence
    silence = now - max(times)
    told = signs.told_interval if signs.session_open else None
    if silence >= silent_until_offline(signs.heartbeat_timeout, told):
        return Presence.OFFLINE
    if silence >= _patience(signs.heartbeat_timeout, told):
        return Presence.SUSPECT
    return signs.presence


def silent_until_offline(
    heartbeat_timeout: timedelta, told_interval: timedelta | None
) -> timedelta:
    """How long a neuron may be silent on an open stream until it is OFFLINE; the arguments are as
    in Signs.
    """
    return 2 * _patience(heartbeat_timeout, told_interval)


def _patience(heartbeat_timeout: timedelta, told_interval: timedelta | None) -> timedelta:
    return max(heartbeat_timeout, TOLD_INTERVALS * (told_interval or timedelta()))


def _stream_lost(signs: Signs) -> bool:
    """The session has closed, and no heartbeat without a stream has come since."""
    if signs.session_open or signs.session_close_time is None:
        return False
    return (
        signs.last_heartbeat_time is None or signs.session_close_time >= signs.last_heartbeat_time
    )
