"""Which metrics there are."""

from __future__ import annotations

from sqlalchemy import Text, func, select
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.analytics import MetricName
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import metric_series


async def list_metric_names(
    connection: AsyncConnection, *, prefix: str, page_size: int, page_token: str
) -> tuple[list[MetricName], str]:
    """A page of the metrics whose names begin so, by name and kind, and the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    stored = metric_series.c
    newest_first = (stored.last_report_time.desc(), stored.series_id)
    units = func.array_agg(aggregate_order_by(stored.unit, *newest_first), type_=ARRAY(Text))
    metrics = (
        select(
            stored.name,
            stored.kind,
            units[1].label("unit"),
            func.max(stored.last_report_time).label("last_report_time"),
        )
        .where(stored.name.startswith(prefix, autoescape=True))
        .group_by(stored.name, stored.kind)
        .subquery("metrics")
    )
    asked = page(page_size, page_token, "metric_names", prefix)
    keys = [SortKey(metrics.c.name), SortKey(metrics.c.kind)]
    rows, next_page_token = await asked.read(connection, select(metrics), keys)
    return [MetricName(*row) for row in rows], next_page_token
