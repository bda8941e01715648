"""A rollup may be made anew for one neuron alone.

Revision ID: 0017
Revises: 0016
"""

from __future__ import annotations

from alembic import op

revision: str = "0017"
down_revision: str | None = "0016"


def upgrade() -> None:
    """What is marked already stays marked for all neurons."""
    op.execute("ALTER TABLE stale_rollups ADD neuron_id text")
