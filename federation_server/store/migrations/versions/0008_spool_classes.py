"""What a neuron's spool has dropped, by class, and whether it is in memory.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"


def upgrade() -> None:
    """NULL for what came before: it was not said."""
    op.execute(
        "ALTER TABLE heartbeats"
        " ADD spool_dropped_reports bigint,"
        " ADD spool_dropped_updates bigint,"
        " ADD spool_dropped_error_reports bigint,"
        " ADD spool_shortened_results bigint,"
        " ADD spool_in_memory boolean"
    )
