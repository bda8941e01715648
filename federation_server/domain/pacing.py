"""How far apart a server's neurons must keep their heartbeats.

A server takes on so many heartbeats a second. `n` streams stay within that if each waits
`n / rate` seconds between two; the rule is that of Nomad's servers for their clients.
"""

from __future__ import annotations

LEAST_S = 1.0
"""A shorter interval is not asked for: so few streams are no danger."""

ROOM = 1.25
"""By how much an interval is longer than it must be when it is granted."""


def grant(granted_s: float, streams: int, rate: float) -> float:
    """The least interval between two heartbeats of a stream, in seconds; 0.0 for none.

    `granted_s`, the one in effect, stays while it does: it is replaced once the streams need a
    longer one, and again once they need one that is shorter by more than ROOM². So a fleet must
    grow by a quarter, or lose a fifth, before it hears anything, and nothing flaps.
    """
    needed_s = streams / rate
    if granted_s / ROOM**2 <= needed_s <= granted_s:
        return granted_s
    wanted_s = needed_s * ROOM
    return wanted_s if wanted_s >= LEAST_S else 0.0
