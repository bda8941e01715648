"""What a server doubts of itself, beside its lease.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"


def upgrade() -> None:
    """Adds the columns. Servers of the version before doubt nothing."""
    op.execute(
        "CREATE TYPE doubt_cause AS ENUM"
        " ('JUST_STARTED', 'LOOP_LAG', 'FLUSH_LAG', 'DATABASE_LAG', 'MASS_DISCONNECT')"
    )
    op.execute("ALTER TABLE servers ADD COLUMN doubt_causes doubt_cause[] NOT NULL DEFAULT '{}'")
    op.execute("ALTER TABLE servers ADD COLUMN doubt_time timestamptz")
    op.execute("ALTER TABLE servers ADD COLUMN sweeping boolean NOT NULL DEFAULT false")
