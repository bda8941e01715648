"""Attempts, cancelling and checkpoints of commands; how far a session's backlog goes.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"

COMMANDS = """
ALTER TABLE commands
    ADD next_attempt_time timestamptz,
    ADD checkpoint jsonb,
    ADD cancel_attempt integer,
    ADD cancel_epoch bigint,
    ADD cancel_time timestamptz,
    ADD retry_of_command_id uuid,
    ADD allow_unadvertised boolean NOT NULL DEFAULT false;
UPDATE commands SET retry_backoff = '1 second' WHERE retry_backoff IS NULL;
ALTER TABLE commands
    ALTER retry_backoff SET NOT NULL,
    ALTER retry_backoff SET DEFAULT '1 second';
CREATE INDEX commands_cancel ON commands (neuron_id)
    WHERE cancel_attempt IS NOT NULL AND (state = 'CANCELLING' OR cancel_epoch IS NULL);
"""

# A session's backlog is what its neuron's spool held when it said Hello: sequences up to this one.
STATES = """
ALTER TABLE neuron_states
    ADD spool_id text NOT NULL DEFAULT '',
    ADD backlog_sequence bigint NOT NULL DEFAULT 0;
"""


def upgrade() -> None:
    """Adds the columns."""
    op.execute(COMMANDS)
    op.execute(STATES)
