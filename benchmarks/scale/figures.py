"""A server's own numbers as it publishes them, and lines through points."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import Served


@dataclass(frozen=True, slots=True)
class Published:
    """What /metrics says at one moment."""

    heartbeats: int
    """Stored by this process since its start."""
    streams: int
    refused: int
    flush_failures: int
    flushes: dict[float, float]
    """How many flushes took at most so many seconds."""

    def flush_p99_ms(self, since: Published) -> float:
        """The bound of the histogram's bucket that holds the 99th percentile since then."""
        counts = {bound: count - since.flushes[bound] for bound, count in self.flushes.items()}
        total = counts[float("inf")]
        return next(
            (1000 * bound for bound, count in sorted(counts.items()) if count >= 0.99 * total), 0.0
        )

    def slow_flushes(self, since: Published, bound_s: float) -> str:
        """How many flushes since then took longer than so many seconds, of how many."""
        total = self.flushes[float("inf")] - since.flushes[float("inf")]
        quick = self.flushes[bound_s] - since.flushes[bound_s]
        return f"{total - quick:.0f} of {total:.0f}"


def published(served: Served) -> Published:
    """Asks the server's /metrics."""
    url = f"http://127.0.0.1:{served.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def number(name: str) -> int:
        return int(families[f"federation_{name}"].samples[0].value)

    return Published(
        heartbeats=number("heartbeats"),
        streams=number("streams"),
        refused=number("refused"),
        flush_failures=number("flush_failures"),
        flushes={
            float(sample.labels["le"]): sample.value
            for sample in families["federation_flush_seconds"].samples
            if sample.name.endswith("_bucket")
        },
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the points; 0 through less than two."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
