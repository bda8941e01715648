"""Metrics put straight into the store, and a served AnalyticsService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeAlias

from sqlalchemy import func, insert

from federation.v1 import analytics_service_pb2_grpc as pb_grpc
from federation_server.domain.analytics import Histogram, MetricKind
from federation_server.domain.rollup import Level
from federation_server.rpc.analytics import AnalyticsServicer
from federation_server.settings import Settings
from federation_server.store import presence
from federation_server.store.analytics import rollups
from federation_server.store.database import Database, driver
from federation_server.store.pipeline import pipeline
from federation_server.store.schema import metric_points, metric_series
from tests.support.servers import serving

Analytics: TypeAlias = "pb_grpc.AnalyticsServiceAsyncStub"  # a name for type checkers only


@asynccontextmanager
async def serving_analytics(database: Database) -> AsyncIterator[Analytics]:
    """AnalyticsService, served."""
    servicer = AnalyticsServicer(database, Settings().retention)
    async with serving(
        lambda server: pb_grpc.add_AnalyticsServiceServicer_to_server(servicer, server)
    ) as channel:
        yield pb_grpc.AnalyticsServiceStub(channel)


async def report(
    database: Database,
    neuron_id: str,
    name: str,
    kind: MetricKind,
    points: Mapping[datetime, float | Histogram],
    *,
    labels: Mapping[str, str] | None = None,
    unit: str = "",
    last_report_time: datetime | None = None,
) -> None:
    """A metric of a neuron with those points, in a series for each set of bounds."""
    async with database.begin() as connection:
        series_ids = {}
        for bounds in {_bounds(value) for value in points.values()} or {()}:
            series = insert(metric_series).values(
                neuron_id=neuron_id,
                name=name,
                kind=kind,
                labels=dict(labels or {}),
                unit=unit,
                last_report_time=last_report_time or func.now(),
                bounds=list(bounds),
            )
            made = await connection.execute(series.returning(metric_series.c.series_id))
            series_ids[bounds] = made.scalar_one()
        for time, value in points.items():
            row = {"series_id": series_ids[_bounds(value)], "point_time": time, **_columns(value)}
            await connection.execute(insert(metric_points).values(row))
        async with pipeline(await driver(connection)) as send:
            rollups.mark(send, Level.MINUTE, map(rollups.Mark, points))


async def roll_up(database: Database, *, now: datetime | None = None) -> int:
    """Adds up all that has ended by then (now: by PostgreSQL's clock); says how many buckets."""
    async with await database.connect("test") as connection:
        return await rollups.roll_up(connection, now or await presence.clock(connection))


def _bounds(value: float | Histogram) -> tuple[float, ...]:
    return tuple(value.bounds) if isinstance(value, Histogram) else ()


def _columns(value: float | Histogram) -> dict[str, Any]:
    if not isinstance(value, Histogram):
        return {"value": value}
    names = ("count", "sum", "min", "max", "bucket_counts")
    return {name: getattr(value, name) for name in names}
