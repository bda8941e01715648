"""A series is found by a hash of its labels, of twice 64 bits: 16 labels of 256 characters do not
fit a row of a B-tree.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"


def upgrade() -> None:
    """Replaces the key of `metric_series`."""
    op.execute(
        "ALTER TABLE metric_series DROP CONSTRAINT metric_series_neuron_id_name_kind_labels_key"
    )
    op.execute(
        "CREATE UNIQUE INDEX metric_series_key ON metric_series"
        " (neuron_id, name, kind, jsonb_hash_extended(labels, 0), jsonb_hash_extended(labels, 1))"
    )
