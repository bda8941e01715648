"""Batches: the same command for many neurons.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"

BATCHES = """
CREATE TABLE command_batches (
    batch_id uuid PRIMARY KEY,
    issuer text NOT NULL,
    request_id text,
    request_hash bytea NOT NULL,
    filter text NOT NULL,
    type text NOT NULL,
    data jsonb NOT NULL,
    max_in_flight integer NOT NULL,
    matched_count integer NOT NULL,
    skipped_count integer NOT NULL,
    create_time timestamptz NOT NULL,
    cancel_time timestamptz,
    cancel_reason text NOT NULL DEFAULT '',
    holding boolean NOT NULL
);
CREATE UNIQUE INDEX command_batches_request ON command_batches (issuer, request_id);
CREATE INDEX command_batches_create_time ON command_batches (create_time, batch_id);
CREATE INDEX command_batches_holding ON command_batches (batch_id) WHERE holding;
"""

COMMANDS = """
ALTER TABLE commands
    ADD batch_id uuid REFERENCES command_batches,
    ADD held boolean NOT NULL DEFAULT false;
CREATE INDEX commands_batch ON commands (batch_id, state) WHERE batch_id IS NOT NULL;
"""


def upgrade() -> None:
    """Makes the table, and lets commands be part of it."""
    op.execute(BATCHES)
    op.execute(COMMANDS)
