"""How often one caller may call: so many a second for each address, neuron or API key.

`live/admission.py` bounds what all callers cost together; here it is one that must not take the
others' share. A limit is the setting of the same name; ten seconds' worth may come at once. Who
calls more often is told when there is room for them again, and has cost the database nothing.

Names that a caller could make up (addresses) may be many: of each limit the `MOST_CALLERS` that
called last are remembered, and who was forgotten begins anew.
"""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from enum import StrEnum

import structlog

from federation_server.domain.access import NeuronIdentity
from federation_server.domain.admission import Bucket
from federation_server.live.metrics import Metrics

log = structlog.get_logger(__name__)

BURST_S = 10.0
"""How many seconds' worth of a rate may come at once."""

MOST_CALLERS = 20_000
LONGEST_S = 30.0
"""How far ahead a caller is told to come again."""

STREAM_RETRY_S = 5.0
"""When to come again who has too many streams open: nobody knows when one will end."""

LOG_INTERVAL_S = 10.0


class Limit(StrEnum):
    """What is limited; each is a setting, and is named so to who meets it."""

    REGISTER_RATE = "REGISTER_RATE"
    """Register without the neuron's own token, by address."""
    FAILED_CREDENTIAL_RATE = "FAILED_CREDENTIAL_RATE"
    """Credentials that are no good, by address."""
    NEURON_CALL_RATE = "NEURON_CALL_RATE"
    """Calls, by neuron and by its token; Register with it among them."""
    ADMIN_CALL_RATE = "ADMIN_CALL_RATE"
    """Calls, by API key."""
    ADMIN_STREAMS = "ADMIN_STREAMS"
    """Streams open at the same time, by API key."""


class Rates:
    """Lets each caller call so often, or says when to come again."""

    def __init__(
        self,
        metrics: Metrics,
        limits: Mapping[Limit, float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody has called yet; `clock` is in seconds."""
        self._limits = limits
        self._clock = clock
        self._buckets: dict[Limit, OrderedDict[str, Bucket]] = {
            limit: OrderedDict() for limit in Limit if limit is not Limit.ADMIN_STREAMS
        }
        self._streams: Counter[str] = Counter()
        self._refused = {limit: metrics.limited.labels(limit=limit.value) for limit in Limit}
        self._logged = -LOG_INTERVAL_S

    def take(self, limit: Limit, caller: str) -> float:
        """0.0 for a caller who may go on, else the seconds after which to come again."""
        now = self._clock()
        wait_s = self._bucket(limit, caller).admit(now)
        if wait_s:
            self._note(limit, caller, now)
        return wait_s

    def take_neuron(self, neuron: NeuronIdentity) -> float:
        """As `take`, for a call that shows a token of that neuron's, which may have been revoked:
        such a one uses up nothing of its neuron's. Once it has proved good the call is `count`ed:
        whoever renews his token has no more calls for it.
        """
        now = self._clock()
        wait_s = self._bucket(Limit.NEURON_CALL_RATE, neuron.neuron_id).look(now)
        if not wait_s:
            return self.take(Limit.NEURON_CALL_RATE, token_of(neuron))
        self._note(Limit.NEURON_CALL_RATE, neuron.neuron_id, now)
        return wait_s

    def count_neuron(self, neuron: NeuronIdentity) -> None:
        """Counts a call that was let through by `take_neuron`, and whose token is good."""
        self.charge(Limit.NEURON_CALL_RATE, neuron.neuron_id, 1)

    def charge(self, limit: Limit, caller: str, calls: float) -> None:
        """Counts a call that was let through as so many more."""
        self._bucket(limit, caller).spend(self._clock(), calls)

    def open_stream(self, key: str) -> float:
        """0.0 for an API key that may have one more stream, which is to be closed; else as `take`
        says.
        """
        if self._streams[key] >= self._limits[Limit.ADMIN_STREAMS]:
            self._note(Limit.ADMIN_STREAMS, key, self._clock())
            return STREAM_RETRY_S
        self._streams[key] += 1
        return 0.0

    def close_stream(self, key: str) -> None:
        """A stream of that API key has ended."""
        self._streams[key] -= 1
        if not self._streams[key]:
            del self._streams[key]

    def resting(self, rate: float) -> Callable[[int], float]:
        """For one stream: a function of how many messages were read since it was called last, which
        answers for how many seconds to read no more.
        """
        bucket, clock = _bucket_of(rate), self._clock
        return lambda messages: bucket.spend(clock(), messages)

    def _bucket(self, limit: Limit, caller: str) -> Bucket:
        buckets = self._buckets[limit]
        bucket = buckets.get(caller)
        if bucket is not None:
            buckets.move_to_end(caller)
            return bucket
        bucket = buckets[caller] = _bucket_of(self._limits[limit])
        if len(buckets) > MOST_CALLERS:
            buckets.popitem(last=False)
        return bucket

    def _note(self, limit: Limit, caller: str, now: float) -> None:
        self._refused[limit].inc()
        if now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            log.warning(
                "one caller calls too often: it is told when to come again",
                action="rate_limited",
                limit=limit.value,
                caller=caller,
            )


def token_of(neuron: NeuronIdentity) -> str:
    """The caller that is a neuron's token, good or not."""
    return f"{neuron.neuron_id} {neuron.generation}"


def _bucket_of(rate: float) -> Bucket:
    burst = max(1.0, rate * BURST_S)
    return Bucket(rate=rate, burst=burst, longest_s=LONGEST_S, uniform=random.uniform)
