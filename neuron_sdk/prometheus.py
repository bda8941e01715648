"""Everything a neuron measures, as Prometheus reads it.

The built-in series begin with `neuron_`; the service's own keep their names, with "." turned
into "_". The registry is private: nothing of a host program's own registry shows up in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from neuron_sdk.health import HealthReport
from neuron_sdk.metrics import HistogramValue, Metrics, Point
from neuron_sdk.system import SystemProbe

_BUILT_IN = {"requests", "failed_requests", "response_ms"}


def build_registry(
    metrics: Metrics, probe: SystemProbe, *, disk_path: Path, health: Callable[[], HealthReport]
) -> CollectorRegistry:
    """A registry that reads everything at the moment it is asked.

    Args:
        metrics: the service's own counts.
        probe: asked for host and process.
        disk_path: on the disk that matters, as in `SystemProbe.sample`.
        health: answers how the neuron is now.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_NeuronCollector(metrics, probe, disk_path, health))
    return registry


class _NeuronCollector(Collector):
    def __init__(
        self,
        metrics: Metrics,
        probe: SystemProbe,
        disk_path: Path,
        health: Callable[[], HealthReport],
    ) -> None:
        self._metrics = metrics
        self._probe = probe
        self._disk_path = disk_path
        self._health = health

    def collect(self) -> Iterator[Metric]:
        built_in = [*self._of_the_neuron(), *self._of_the_host(), *self._of_the_process()]
        yield from built_in
        yield from _families(self._metrics.totals(), taken={family.name for family in built_in})

    def _of_the_neuron(self) -> Iterator[Metric]:
        metrics, report = self._metrics, self._health()
        yield _gauge("health_score", "How well the neuron feels, 0 to 100", report.score)
        yield _gauge("uptime_seconds", "Time since the process started", report.uptime)
        up = GaugeMetricFamily(
            "neuron_dependency_up", "1 if the dependency is UP", labels=["dependency"]
        )
        for found in report.dependencies:
            up.add_metric([found.name], float(found.state.value == "UP"))
        yield up
        yield _gauge("active_connections", "Requests open now", metrics.active_connections)
        yield _gauge("queue_size", "Work that waits now", metrics.queue_size)
        yield _counter("ignored_values", "Values no series can hold", metrics.ignored_values)
        yield _counter(
            "dropped_values", "Values beyond the limit of series", metrics.dropped_values
        )

    def _of_the_host(self) -> Iterator[Metric]:
        host = self._probe.sample(self._disk_path)
        yield _gauge("host_cpu_percent", "Use of all processors", host.cpu_percent)
        yield _gauge("host_memory_percent", "Use of main memory", host.memory_percent)
        yield _gauge("host_memory_used_bytes", "Main memory in use", host.memory_used_bytes)
        yield _gauge("host_disk_percent", "Use of the state's disk", host.disk_percent)
        yield _gauge("host_disk_used_bytes", "Space in use on that disk", host.disk_used_bytes)
        yield _counter("host_network_received_bytes", "Received", host.network_received_bytes)
        yield _counter("host_network_sent_bytes", "Sent", host.network_sent_bytes)

    def _of_the_process(self) -> Iterator[Metric]:
        process = self._probe.process()
        yield _gauge("process_threads", "Threads", process.threads)
        yield _gauge("process_resident_memory_bytes", "Resident memory", process.rss_bytes)
        yield _gauge("process_open_files", "Open files and sockets", process.open_files)
        yield _gauge("process_cpu_percent", "Use of one core", process.cpu_percent)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"neuron_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    family = Metric(f"neuron_{name}", text, "counter")
    family.add_sample(f"neuron_{name}_total", {}, value)
    return family


def _families(points: Iterable[Point], taken: set[str]) -> Iterator[Metric]:
    """The points, those of one name together; a name that is taken gets a number."""
    families: dict[str, Metric] = {}
    for point in points:
        family = families.get(point.name)
        if family is None:
            name = _free_name(_metric_name(point), taken)
            family = Metric(name, point.unit and f"In {point.unit}", point.kind)
            families[point.name] = family
        _add_samples(family, point)
    yield from families.values()


def _metric_name(point: Point) -> str:
    name = point.name.replace(".", "_")
    if point.name in _BUILT_IN:
        name = f"neuron_{name}"
    return name.removesuffix("_total") if point.kind == "counter" else name


def _add_samples(family: Metric, point: Point) -> None:
    labels = _label_names(point)
    value = point.value
    if not isinstance(value, HistogramValue):
        suffix = "_total" if point.kind == "counter" else ""
        family.add_sample(f"{family.name}{suffix}", labels, value)
        return
    seen = 0
    bounds = [*map(str, value.bounds), "+Inf"]
    for bound, count in zip(bounds, value.bucket_counts, strict=True):
        seen += count
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, seen)
    family.add_sample(f"{family.name}_count", labels, seen)
    family.add_sample(f"{family.name}_sum", labels, value.sum)


def _label_names(point: Point) -> dict[str, str]:
    """Labels as Prometheus allows them; "le" belongs to a histogram's buckets."""
    taken = {"le"}
    labels: dict[str, str] = {}
    for key, value in point.labels.items():
        name = re.sub(r"[^a-z0-9_]", "_", key)
        labels[_free_name(f"_{name}" if name[0].isdigit() else name, taken)] = value
    return labels


def _free_name(name: str, taken: set[str]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free)
    return free
