"""What was counted of processes that were heard before the last one: two that take turns are not
counted anew each time.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

from alembic import op

revision: str = "0013"
down_revision: str | None = "0012"


def upgrade() -> None:
    """Each is [instance_id, requests, failed requests, response ms, uptime s], newest first."""
    op.execute("ALTER TABLE neuron_states ADD counted_before jsonb NOT NULL DEFAULT '[]'")
    op.execute("ALTER TABLE neuron_states ALTER counted_before DROP DEFAULT")
