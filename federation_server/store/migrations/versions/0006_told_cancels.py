"""Cancels that a session was told and has not answered, for a session whose answer was lost.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"

# Which of those that were told have been answered was not noted until now; all of them have been
# told in sessions that end with the servers of the older version.
COMMANDS = """
UPDATE commands SET cancel_attempt = NULL, cancel_epoch = NULL
WHERE cancel_epoch IS NOT NULL AND state <> 'CANCELLING';
CREATE INDEX commands_told ON commands (neuron_id, cancel_epoch)
    WHERE cancel_attempt IS NOT NULL;
"""


def upgrade() -> None:
    """Adds the index."""
    op.execute(COMMANDS)
