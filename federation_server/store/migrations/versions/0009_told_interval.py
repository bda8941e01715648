"""What each server has told its streams of how far apart their heartbeats may be.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"


def upgrade() -> None:
    """Adds the column."""
    op.execute("ALTER TABLE servers ADD heartbeat_interval interval")
