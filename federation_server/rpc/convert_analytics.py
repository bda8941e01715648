"""From what neurons reported, as the store reads it, to the contract's messages."""

from __future__ import annotations

from collections.abc import Sequence

from federation.v1 import analytics_service_pb2 as pb
from federation.v1 import report_pb2
from federation_server.domain.analytics import (
    MetricBucket,
    MetricKind,
    MetricName,
    MetricSeries,
    Severity,
    StoredEvent,
)
from federation_server.rpc.convert import to_struct, to_timestamp

_KIND = {kind: pb.MetricKind.Value(f"METRIC_KIND_{kind.value}") for kind in MetricKind}
_SEVERITY = {
    severity: report_pb2.Severity.Value(f"SEVERITY_{severity.value}") for severity in Severity
}
_MAX_UINT64 = 2**64 - 1


def series_to_proto(series: MetricSeries, group_by: Sequence[str]) -> pb.MetricSeries:
    """A series; `group_by` are the names of its group's values."""
    return pb.MetricSeries(
        group=dict(zip(group_by, series.group, strict=True)),
        kind=_KIND[series.kind],
        unit=series.unit,
        buckets=[_bucket(bucket) for bucket in series.buckets],
    )


def _bucket(bucket: MetricBucket) -> pb.MetricBucket:
    return pb.MetricBucket(
        start_time=to_timestamp(bucket.start_time),
        count=min(bucket.count, _MAX_UINT64),  # counts of many neurons may add up to more
        sum=bucket.sum,
        rate=bucket.rate,
        mean=bucket.mean,
        min=bucket.min,
        max=bucket.max,
        p50=bucket.p50,
        p90=bucket.p90,
        p99=bucket.p99,
    )


def metric_name_to_proto(metric: MetricName) -> pb.MetricName:
    """A metric's name and what else is known of it."""
    return pb.MetricName(
        name=metric.name,
        kind=_KIND[metric.kind],
        unit=metric.unit,
        last_report_time=to_timestamp(metric.last_report_time),
    )


def event_to_proto(event: StoredEvent) -> pb.StoredEvent:
    """An event in the history."""
    return pb.StoredEvent(
        event_id=str(event.event_id),
        neuron_id=event.neuron_id,
        event=report_pb2.ReportedEvent(
            event_time=to_timestamp(event.event_time),
            severity=_SEVERITY[event.severity],
            type=event.type,
            message=event.message,
            attributes=to_struct(event.attributes),
        ),
        receive_time=to_timestamp(event.receive_time),
    )
