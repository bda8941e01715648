"""How many places a series' histograms have at the most, so that a query need not count them.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"

_KEPT = ("metric_points", "metric_minutes", "metric_hours", "metric_days")


def upgrade() -> None:
    """0 for what is no histogram."""
    op.execute("ALTER TABLE metric_series ADD places integer NOT NULL DEFAULT 0")
    op.execute("ALTER TABLE metric_series ALTER places DROP DEFAULT")
    found = " UNION ALL ".join(
        f"SELECT series_id, cardinality(bucket_counts) AS places FROM {table}"
        " WHERE bucket_counts IS NOT NULL"
        for table in _KEPT
    )
    op.execute(
        "UPDATE metric_series s SET places = b.places"
        f" FROM (SELECT series_id, max(places) AS places FROM ({found}) f GROUP BY 1) b"
        " WHERE b.series_id = s.series_id"
    )
