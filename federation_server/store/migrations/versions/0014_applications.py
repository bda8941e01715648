"""Neurons that join without a credential, and those of them that wait for an approval.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

from alembic import op

revision: str = "0014"
down_revision: str | None = "0013"


def upgrade() -> None:
    """There are none yet."""
    op.execute(
        "CREATE TABLE applications ("
        " neuron_id text PRIMARY KEY REFERENCES neurons ON DELETE CASCADE,"
        " request_hash bytea NOT NULL)"
    )
    op.execute(
        "CREATE INDEX neurons_pending ON neurons (create_time, neuron_id)"
        " WHERE lifecycle = 'PENDING'"
    )
