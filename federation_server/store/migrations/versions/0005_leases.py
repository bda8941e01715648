"""Sessions without a stream: a lease in its place.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"


def upgrade() -> None:
    """Adds the columns."""
    op.execute(
        "ALTER TABLE neuron_states ADD lease_duration interval, ADD lease_expire_time timestamptz"
    )
