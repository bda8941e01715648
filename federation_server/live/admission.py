"""How many new streams and registrations this server takes on, so that a herd does not trample it.

Each costs a transaction and some milliseconds of the one loop that serves everybody. What is
beyond the rate is refused before any of that: the gate (`rpc/auth.py`) asks here before it asks
the database. Register has a bucket of its own, because anybody may call it, and a storm of it must
not keep out neurons that come back.

A rate is a guess at what a host can do. Where the guess is too high, or PostgreSQL is slow, what
has been let in piles up; so nobody is let in either while `MOST_UNDER_WAY` of the same kind are
being served.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

import structlog

from federation_server.domain.admission import Bucket
from federation_server.live.metrics import Metrics

log = structlog.get_logger(__name__)

MOST_UNDER_WAY = 256
"""Streams: at two milliseconds each they are served within a second, before anybody gives up."""

REGISTER_SHARE = 0.5
"""A registration costs about twice what a stream does. It has that share of each number here."""

LONGEST_S = 30.0
"""How far ahead turns are given."""

LOG_INTERVAL_S = 10.0


class Entry(StrEnum):
    """What asks to be let in."""

    CONNECT = "connect"
    REGISTER = "register"


class Admission:
    """Lets in, or says when to come again."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        rate: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes on `rate` streams a second, and `burst` at once; `clock` is in seconds."""
        self._clock = clock
        shares = {Entry.CONNECT: 1.0, Entry.REGISTER: REGISTER_SHARE}
        self._buckets = {
            entry: Bucket(
                rate=rate * share,
                burst=max(1.0, burst * share),
                longest_s=LONGEST_S,
                uniform=random.uniform,
            )
            for entry, share in shares.items()
        }
        self._most_under_way = {entry: MOST_UNDER_WAY * share for entry, share in shares.items()}
        self._refused = {
            entry: metrics.admission_refused.labels(kind=entry.value) for entry in Entry
        }
        self._under_way = Counter[Entry]()
        self._logged = -LOG_INTERVAL_S

    def admit(self, entry: Entry) -> float:
        """0.0 for one who may come in, else the seconds after which to come again."""
        now = self._clock()
        bucket = self._buckets[entry]
        behind = self._under_way[entry]
        crowded = behind >= self._most_under_way[entry]
        wait_s = bucket.put_off(now, behind=behind) if crowded else bucket.admit(now)
        if wait_s:
            self._refused[entry].inc()
            if now - self._logged >= LOG_INTERVAL_S:
                self._logged = now
                log.warning(
                    "too many at once: they are told when to come again",
                    action="admission_refused",
                    kind=entry.value,
                    under_way=behind,
                    wait_s=round(wait_s, 1),
                )
        return wait_s

    @contextmanager
    def under_way(self, entry: Entry) -> Iterator[None]:
        """For the block in which one who was let in is being served."""
        self._under_way[entry] += 1
        try:
            yield
        finally:
            self._under_way[entry] -= 1
