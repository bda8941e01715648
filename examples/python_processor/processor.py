"""Carries out requests, whoever they come from: reads, caches, processes and counts them."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec

from neuron_sdk import Neuron

from .cache import Cache
from .processing import ProcessingError, Request, Result, process
from .web import Answer, problem


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the processor has done since the process started."""

    uptime_seconds: float
    requests: int
    failures: int
    """Requests that could not be carried out, whoever's fault it was."""
    cache_hits: int
    cache_entries: int
    records_processed: int
    by_operation: dict[str, int] = field(default_factory=dict)


class Processor:
    """Every method may be called by any thread."""

    def __init__(self, neuron: Neuron) -> None:
        """The neuron gets the numbers."""
        self._neuron = neuron
        self._cache = Cache()
        self._decoder = msgspec.json.Decoder(Request)
        self._records_per_request = neuron.histogram(
            "records_per_request", bounds=(1, 10, 100, 1_000, 10_000), unit="records"
        )
        self._cache_entries = neuron.gauge("cache_entries")
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._requests = 0
        self._failures = 0
        self._cache_hits = 0
        self._records = 0
        self._by_operation: dict[str, int] = {}

    def answer(self, body: bytes) -> Answer:
        """Answer an HTTP request's body. What is wrong with it is a 4xx that says what."""
        # A 4xx is the client's failure: to the neuron it is a request that went well. What
        # raises here is the service's own, and counts as failed.
        with self._neuron.measure():
            key = hashlib.sha256(body).digest()
            known = self._cache.get(key)
            if known is not None:
                self._count_cache_hit()
                return Answer(HTTPStatus.OK, known)
            try:
                result = self.run(self._decoder.decode(body))
            except ProcessingError as error:
                return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self._count_failure()
                return problem(HTTPStatus.BAD_REQUEST, f"the body does not fit: {error}")
            encoded = msgspec.json.encode(result)
            self._cache.put(key, encoded)
            self._cache_entries.set(len(self._cache))
            return Answer(HTTPStatus.OK, encoded)

    def run(self, request: Request) -> Result:
        """Carry out one request.

        Raises:
            ProcessingError: it cannot be carried out on these records.
        """
        try:
            result = process(request)
        except ProcessingError:
            self._count_failure()
            raise
        self._count(result)
        return result

    def clear_cache(self) -> int:
        """Forget every result; returns how many there were."""
        removed = self._cache.clear()
        self._cache_entries.set(0)
        return removed

    def statistics(self) -> Statistics:
        """What has been done so far."""
        with self._lock:
            return Statistics(
                uptime_seconds=round(time.monotonic() - self._started, 3),
                requests=self._requests,
                failures=self._failures,
                cache_hits=self._cache_hits,
                cache_entries=len(self._cache),
                records_processed=self._records,
                by_operation=dict(self._by_operation),
            )

    def _count(self, result: Result) -> None:
        operation, records = result.operation, result.input_records
        with self._lock:
            self._requests += 1
            self._records += records
            self._by_operation[operation] = self._by_operation.get(operation, 0) + 1
        self._records_per_request.observe(records)
        labels = {"operation": operation}
        self._neuron.counter("records_processed", unit="records", labels=labels).add(records)

    def _count_failure(self) -> None:
        with self._lock:
            self._requests += 1
            self._failures += 1
        self._neuron.counter("refused_requests").add()

    def _count_cache_hit(self) -> None:
        with self._lock:
            self._requests += 1
            self._cache_hits += 1
        self._neuron.counter("cache_hits").add()
