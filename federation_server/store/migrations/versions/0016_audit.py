"""The audit log, which only grows.

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

from alembic import op

revision: str = "0016"
down_revision: str | None = "0015"

# The trigger for rows is PostgreSQL's to copy to each partition; the one for TRUNCATE is made with
# the partition (store/partitions.py).
AUDIT = """
CREATE SEQUENCE audit_entry_ids;
CREATE TABLE audit_entries (
    entry_time timestamptz NOT NULL DEFAULT now(),
    entry_id bigint NOT NULL DEFAULT nextval('audit_entry_ids'),
    actor text NOT NULL,
    role text NOT NULL,
    api_key_id text NOT NULL,
    peer text NOT NULL,
    method text NOT NULL,
    object_type text NOT NULL,
    object_id text NOT NULL,
    neuron_id text NOT NULL,
    before jsonb,
    after jsonb,
    outcome text NOT NULL,
    reason text NOT NULL,
    count bigint NOT NULL,
    request_id text NOT NULL,
    call_id text NOT NULL,
    server_id text NOT NULL,
    PRIMARY KEY (entry_time, entry_id)
) PARTITION BY RANGE (entry_time);
CREATE INDEX audit_entries_neuron ON audit_entries (neuron_id, entry_time);

CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only: % of % is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER audit_rows_stay BEFORE UPDATE OR DELETE ON audit_entries
    FOR EACH ROW EXECUTE FUNCTION refuse_audit_change();
CREATE TRIGGER audit_stays BEFORE TRUNCATE ON audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change();
"""


def upgrade() -> None:
    """Makes the table, its guards, and nothing to look back on."""
    op.execute(AUDIT)
