"""The spool's tables: made in an empty database, brought up to date in an older one."""

from __future__ import annotations

import sqlite3
import uuid
from enum import IntEnum

FORMAT = 2

# The counts in meta are since the spool was made; see `Dropped`.
_SCHEMA = """
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    spool_id TEXT NOT NULL,
    next_sequence INTEGER NOT NULL,
    dropped_reports INTEGER NOT NULL DEFAULT 0,
    dropped_updates INTEGER NOT NULL DEFAULT 0,
    dropped_error_reports INTEGER NOT NULL DEFAULT 0,
    shortened_results INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    command_id TEXT,
    attempt INTEGER,
    payload BLOB NOT NULL
);
CREATE INDEX outbox_kind ON outbox (kind, sequence);
CREATE INDEX outbox_attempt ON outbox (command_id, attempt, sequence)
    WHERE command_id IS NOT NULL;
CREATE TABLE journal (
    command_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    finish BLOB,
    finish_sequence INTEGER,
    change_time REAL NOT NULL,
    PRIMARY KEY (command_id, attempt)
);
CREATE INDEX journal_time ON journal (change_time);
"""

# Format 1 dropped reports alone, whatever they held.
_FROM_1 = """
ALTER TABLE meta RENAME COLUMN dropped TO dropped_reports;
ALTER TABLE meta ADD COLUMN dropped_updates INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN dropped_error_reports INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN shortened_results INTEGER NOT NULL DEFAULT 0;
CREATE INDEX outbox_attempt ON outbox (command_id, attempt, sequence)
    WHERE command_id IS NOT NULL;
"""


class MessageKind(IntEnum):
    """What a durable message is. Stored."""

    REPORT = 1
    ACCEPTED = 2
    PROGRESS = 3
    FINISH = 4
    CHECKPOINT = 5
    """Progress with a checkpoint, which no progress without one may replace."""
    ERROR_REPORT = 6
    """A report of events of severity ERROR and above, and of nothing else."""

    @property
    def is_report(self) -> bool:
        """Whether it is an AnalyticsReport; else it is a CommandUpdate."""
        return self in (MessageKind.REPORT, MessageKind.ERROR_REPORT)


def prepare(connection: sqlite3.Connection) -> None:
    """Check the tables, and make what is missing of them, in one transaction.

    Raises:
        sqlite3.DatabaseError: they are damaged, or of an unknown format.
    """
    run = connection.execute
    found = run("PRAGMA user_version").fetchone()[0]
    if found == 0 and not run("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        columns, spool_id = "id, spool_id, next_sequence", uuid.uuid4().hex
        _change(connection, f"{_SCHEMA} INSERT INTO meta ({columns}) VALUES (1, '{spool_id}', 1);")  # noqa: S608 - our own id
        return
    if found not in (1, FORMAT):
        raise sqlite3.DatabaseError(f"unknown format {found}")
    problem = run("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(f"damaged: {problem}")
    if found == 1:
        _change(connection, _FROM_1)


def _change(connection: sqlite3.Connection, statements: str) -> None:
    try:
        connection.executescript(f"BEGIN; {statements} PRAGMA user_version = {FORMAT}; COMMIT;")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
