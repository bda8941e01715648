"""A histogram's bounds belong to its series: no point repeats them, and none of them is compared.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision: str = "0012"
down_revision: str | None = "0011"

_POINTS = ("metric_points", "metric_minutes", "metric_hours", "metric_days")


def upgrade() -> None:
    """A series whose points have had several bounds becomes one for each of these."""
    op.execute("ALTER TABLE metric_series ADD bounds double precision[] NOT NULL DEFAULT '{}'")
    op.execute("ALTER TABLE metric_series ALTER bounds DROP DEFAULT")
    op.execute("DROP INDEX metric_series_key")
    found = " UNION ".join(
        f"SELECT series_id, bounds FROM {table} WHERE bounds IS NOT NULL" for table in _POINTS
    )
    op.execute(
        "CREATE TEMPORARY TABLE bounds_of_series ON COMMIT DROP AS"
        " SELECT series_id, bounds, series_id AS new_id,"
        " row_number() OVER (PARTITION BY series_id ORDER BY bounds) AS place"
        f" FROM ({found}) AS f"
    )
    op.execute(
        "UPDATE metric_series s SET bounds = b.bounds FROM bounds_of_series b"
        " WHERE b.series_id = s.series_id AND b.place = 1"
    )
    op.execute(
        "UPDATE bounds_of_series"
        " SET new_id = nextval(pg_get_serial_sequence('metric_series', 'series_id'))"
        " WHERE place > 1"
    )
    op.execute(
        "INSERT INTO metric_series"
        " (series_id, neuron_id, name, kind, labels, unit, last_report_time, places, bounds)"
        " OVERRIDING SYSTEM VALUE"
        " SELECT b.new_id, neuron_id, name, kind, labels, unit, last_report_time, 0, b.bounds"
        " FROM bounds_of_series b JOIN metric_series s USING (series_id) WHERE b.place > 1"
    )
    for table in _POINTS:
        op.execute(
            f"UPDATE {table} p SET series_id = b.new_id FROM bounds_of_series b"
            " WHERE b.series_id = p.series_id AND b.bounds = p.bounds AND b.place > 1"
        )
        op.execute(f"ALTER TABLE {table} DROP bounds")
    op.execute("ALTER TABLE metric_series DROP places")
    op.execute(
        "CREATE UNIQUE INDEX metric_series_key ON metric_series (neuron_id, name, kind,"
        " jsonb_hash_extended(labels, 0), jsonb_hash_extended(labels, 1),"
        " hash_array_extended(bounds, 0), hash_array_extended(bounds, 1))"
    )
