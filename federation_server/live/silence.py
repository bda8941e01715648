"""Ends the streams whose neurons say nothing, or read nothing, for too long.

A connection that is dead is found by keepalive (`rpc/server.py`). Here the connection lives, and
answers pings, but nobody behind it does anything: the service hangs, or it is no service at all. A
stream only counts what it reads and writes; once in a while all of them are looked at.

No stream is ended whose neuron need not have spoken yet: it is OFFLINE for its silence before.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import structlog

from federation_server.domain.presence import silent_until_offline
from federation_server.live.metrics import Metrics
from federation_server.live.pacing import Pacing
from federation_server.live.session import Session, SessionEnd, Sessions

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 5.0

STALLED_AFTER_S = 60.0
"""How long a neuron may take to read one message."""


@dataclass(slots=True)
class _Seen:
    """What a session had read and written, and since when no more."""

    heard: int
    heard_at: float
    written: int
    written_at: float


class Silence:
    """Looks at the streams of this server."""

    def __init__(
        self, sessions: Sessions, metrics: Metrics, pacing: Pacing, *, silent_after: timedelta
    ) -> None:
        """Ends nothing before `run`. `pacing` knows what streams were told."""
        self._sessions = sessions
        self._pacing = pacing
        self._silent_after = silent_after
        self._given_up = {
            cause: metrics.streams_given_up.labels(cause=cause) for cause in ("silent", "stalled")
        }
        self._seen: dict[Session, _Seen] = {}

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._look(asyncio.get_running_loop().time())

    def _look(self, now: float) -> None:
        seen: dict[Session, _Seen] = {}
        told = self._pacing.longest
        for session in self._sessions:
            if session.end is not None:
                continue
            last = self._seen.get(session)
            if last is None:
                last = _Seen(session.heard, now, session.written, now)
            if session.heard != last.heard:
                last.heard, last.heard_at = session.heard, now
            if session.written != last.written or not session.writing:
                last.written, last.written_at = session.written, now
            seen[session] = last
            if now - last.written_at > STALLED_AFTER_S:
                self._end(session, "stalled", f"nothing was read for {STALLED_AFTER_S:g} s")
            elif now - last.heard_at > (may_be_s := self._may_be_silent_s(session, told)):
                self._end(session, "silent", f"no message came for {may_be_s:g} s")
        self._seen = seen

    def _may_be_silent_s(self, session: Session, told: timedelta) -> float:
        until_offline = silent_until_offline(session.heartbeat_timeout, told)
        return max(self._silent_after, until_offline).total_seconds()

    def _end(self, session: Session, cause: str, detail: str) -> None:
        self._given_up[cause].inc()
        log.warning(
            "a stream on which nothing happens is ended",
            action="stream_given_up",
            cause=cause,
            neuron_id=session.neuron_id,
            epoch=session.epoch,
        )
        session.finish(SessionEnd.PROTOCOL_VIOLATION, detail)
