"""API keys that admins make, rotate and see the use of.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

from alembic import op

revision: str = "0015"
down_revision: str | None = "0014"


def upgrade() -> None:
    """The defaults stay: a server of the version before makes its first key without them."""
    op.execute(
        "ALTER TABLE api_keys"
        " ADD description text NOT NULL DEFAULT '',"
        " ADD creator text NOT NULL DEFAULT '',"
        " ADD request_id text,"
        " ADD request_hash bytea,"
        " ADD last_use_time timestamptz"
    )
    op.execute("CREATE UNIQUE INDEX api_keys_request ON api_keys (creator, request_id)")
    op.execute(
        "CREATE TABLE api_key_old_secrets ("
        " secret_hash bytea PRIMARY KEY,"
        " api_key_id uuid NOT NULL REFERENCES api_keys ON DELETE CASCADE,"
        " expire_time timestamptz NOT NULL)"
    )
    op.execute("CREATE INDEX api_key_old_secrets_key ON api_key_old_secrets (api_key_id)")
