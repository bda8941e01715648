"""Rollups: metrics added up by minute, hour and day.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"

COLUMNS = """
    series_id bigint NOT NULL,
    bucket_time timestamptz NOT NULL,
    count bigint NOT NULL,
    sum double precision NOT NULL,
    min double precision,
    max double precision,
    bounds double precision[],
    bucket_counts bigint[]
"""


def upgrade() -> None:
    """Makes the tables, and marks what there is already to be added up."""
    for table in ("metric_minutes", "metric_hours", "metric_days"):
        op.execute(f"CREATE TABLE {table} ({COLUMNS}) PARTITION BY RANGE (bucket_time)")
        op.execute(f"CREATE INDEX {table}_series ON {table} (series_id, bucket_time)")
        op.execute(f"CREATE INDEX {table}_time ON {table} (bucket_time)")
    op.execute("CREATE INDEX metric_points_time ON metric_points (point_time)")
    op.execute("CREATE TYPE rollup_level AS ENUM ('POINT', 'MINUTE', 'HOUR', 'DAY')")
    op.execute(
        "CREATE TABLE stale_rollups (level rollup_level NOT NULL, bucket_time timestamptz NOT NULL)"
    )
    op.execute("CREATE INDEX stale_rollups_time ON stale_rollups (level, bucket_time)")
    op.execute(
        "CREATE TABLE rollup_levels (level rollup_level PRIMARY KEY, until_time timestamptz)"
    )
    op.execute("INSERT INTO rollup_levels (level) VALUES ('MINUTE'), ('HOUR'), ('DAY')")
    op.execute(
        "INSERT INTO stale_rollups SELECT DISTINCT 'MINUTE'::rollup_level,"
        " date_bin('1 minute', point_time, '1970-01-01T00:00:00Z') FROM metric_points"
    )
