"""AnalyticsService: what neurons reported, over time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import analytics_service_pb2 as pb
from federation.v1 import analytics_service_pb2_grpc as pb_grpc
from federation_server.domain.analytics import aligned_buckets, default_bucket_width
from federation_server.domain.rollup import Kept, Level, plan
from federation_server.domain.violation import Violation
from federation_server.rpc import errors, limits
from federation_server.rpc.convert import optional_span, optional_time, to_duration
from federation_server.rpc.convert_analytics import (
    event_to_proto,
    metric_name_to_proto,
    series_to_proto,
)
from federation_server.store import neuron_list
from federation_server.store.analytics import events as reported_events
from federation_server.store.analytics import names as metric_names
from federation_server.store.analytics import query as metrics
from federation_server.store.analytics import rollups
from federation_server.store.analytics.statements import MetricsQuery
from federation_server.store.database import Database, current_time, driver

DEFAULT_SPAN = timedelta(hours=1)
MAX_BUCKETS_OF_A_SERIES = 10_000


class AnalyticsServicer(pb_grpc.AnalyticsServiceServicer):
    """Answers admins' questions about metrics and events."""

    def __init__(self, database: Database, retention: Mapping[str, timedelta]) -> None:
        """Serves from `database`, whose tables keep what they have for so long."""
        self._database = database
        self._retention = retention

    async def QueryMetrics(
        self,
        request: pb.QueryMetricsRequest,
        context: grpc.aio.ServicerContext[pb.QueryMetricsRequest, pb.QueryMetricsResponse],
    ) -> pb.QueryMetricsResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            now = await current_time(connection)
            asked = _query(request, now, await self._kept(connection, now))
            try:
                found, truncated = await metrics.query(connection, asked)
            except metrics.QueryTooSlow as error:
                raise _too_slow() from error
        return pb.QueryMetricsResponse(
            series=[series_to_proto(series, asked.group_by) for series in found],
            truncated=truncated,
            bucket_width=to_duration(asked.bucket_width),
        )

    async def _kept(self, connection: AsyncConnection, now: datetime) -> list[Kept]:
        """What there is of each level, from fine to coarse."""
        until = await rollups.rolled_up_until(await driver(connection))
        kept = [Kept(Level.POINT, now - self._retention["metric_points"], now)]
        for level, table in rollups.TABLES.items():
            since = now - self._retention[table]
            kept.append(Kept(level, since, until.get(level) or since))
        return kept

    async def ListMetricNames(
        self,
        request: pb.ListMetricNamesRequest,
        context: grpc.aio.ServicerContext[pb.ListMetricNamesRequest, pb.ListMetricNamesResponse],
    ) -> pb.ListMetricNamesResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            found, next_page_token = await metric_names.list_metric_names(
                connection,
                prefix=request.prefix,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        return pb.ListMetricNamesResponse(
            metrics=[metric_name_to_proto(metric) for metric in found],
            next_page_token=next_page_token,
        )

    async def ListReportedEvents(
        self,
        request: pb.ListReportedEventsRequest,
        context: grpc.aio.ServicerContext[
            pb.ListReportedEventsRequest, pb.ListReportedEventsResponse
        ],
    ) -> pb.ListReportedEventsResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            found, next_page_token = await reported_events.list_reported_events(
                connection,
                filter_text=request.filter,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        answer = pb.ListReportedEventsResponse(next_page_token=next_page_token)
        for event in found:
            answer.events.append(event_to_proto(event))
            await asyncio.sleep(0)  # a large one takes long; nobody else is to wait for them all
        return answer


def _query(request: pb.QueryMetricsRequest, now: datetime, kept: Sequence[Kept]) -> MetricsQuery:
    """What a checked request asks for, with defaults filled in.

    Raises:
        errors.Refused: the span is empty, or has too many buckets.
        FilterError: the filter cannot be understood.
    """
    end_time = optional_time(request, "end_time") or now
    start_time = optional_time(request, "start_time") or end_time - DEFAULT_SPAN
    if start_time >= end_time:
        raise errors.invalid_fields([Violation("start_time", "must be before end_time")])
    width = optional_span(request, "bucket_width") or default_bucket_width(end_time - start_time)
    buckets = aligned_buckets(start_time, end_time, width)
    if buckets > MAX_BUCKETS_OF_A_SERIES:
        words = f"makes {buckets} buckets, more than {MAX_BUCKETS_OF_A_SERIES}: widen it"
        raise errors.invalid_fields([Violation("bucket_width", words)])
    return MetricsQuery(
        name=request.name,
        neurons=neuron_list.matching(request.filter),
        labels=request.labels,
        start_time=start_time,
        end_time=end_time,
        bucket_width=width,
        group_by=list(dict.fromkeys(request.group_by)),
        segments=plan(start_time, end_time, width, kept),
    )


def _too_slow() -> errors.Refused:
    words = (
        f"asks for too much: PostgreSQL worked on it for {metrics.TIMEOUT_S} s;"
        " begin later, or let the filter match fewer neurons"
    )
    return errors.invalid_fields([Violation("start_time", words, too_large=True)])
