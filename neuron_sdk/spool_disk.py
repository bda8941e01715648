"""The spool's file: opened, set aside when it is damaged, copied to memory and back.

Beside the file lies an empty one, the mark: it is there while all that was given a sequence is in
the file. A process that goes on in memory removes it, and the next one leaps.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import time
from pathlib import Path

from neuron_sdk.logs import get_logger

MOST_SET_ASIDE = 3

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What SQLite makes of EDQUOT and EFBIG, which it does not tell from a disk that is broken.
_CANNOT_WRITE = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC)

_log = get_logger(__name__)


class SpoolDisk:
    """The file of one spool, and what lies beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = path.with_suffix(".durable")

    def connect(self) -> sqlite3.Connection:
        """Open the file; makes it, empty, if there is none.

        Raises:
            sqlite3.Error, OSError: it cannot be opened.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.touch(mode=0o600)
        self.path.chmod(0o600)
        connection = _connect(str(self.path))
        try:
            _vacuum_in_steps(connection)
            # WAL: a commit is one append. The limit keeps a burst from leaving a large file behind.
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("PRAGMA journal_size_limit = 1048576").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def read(self) -> sqlite3.Connection:
        """What the file holds, in memory. Nothing is written.

        Raises:
            sqlite3.Error: it cannot be read.
        """
        memory = connect_memory()
        try:
            if self.path.exists():
                with contextlib.closing(_connect(str(self.path))) as disk:
                    disk.backup(memory)
        except BaseException:
            memory.close()
            raise
        return memory

    @property
    def exists(self) -> bool:
        """Whether there is a file."""
        return self.path.exists()

    @property
    def complete(self) -> bool:
        """Whether every sequence that was given is known to the file."""
        return self._mark.exists()

    def mark_complete(self) -> None:
        """Note that it is."""
        self._mark.touch(mode=0o600)

    def mark_incomplete(self) -> None:
        """Note that it is not: by removing a file, which works on a full disk."""
        with contextlib.suppress(OSError):
            self._mark.unlink()

    def set_aside(self, error: Exception) -> None:
        """Move the file out of the way, for whoever wants to look. The oldest such files go."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}-{time.time_ns() % 10**9:09}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + suffix).rename(f"{aside}{suffix}")
        _log.error(
            "the spool's file is damaged and was set aside; unsent messages in it are lost",
            action="spool.set_aside",
            file=str(aside),
            error=str(error),
        )
        copies = self.path.parent.glob(f"{self.path.name}.damaged-*")
        known = sorted(copy for copy in copies if not copy.name.endswith(("-wal", "-shm")))
        for old in known[:-MOST_SET_ASIDE]:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    old.with_name(old.name + suffix).unlink()


def connect_memory() -> sqlite3.Connection:
    """An empty database in memory."""
    connection = _connect(":memory:")
    _vacuum_in_steps(connection)
    return connection


def _vacuum_in_steps(connection: sqlite3.Connection) -> None:
    if not connection.execute("PRAGMA page_count").fetchone()[0]:
        # Has an effect on an empty file alone, and only before WAL writes its first page.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")


def is_damage(error: Exception) -> bool:
    """Whether the file is at fault, and not the disk."""
    if isinstance(error, sqlite3.OperationalError) or not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in _DAMAGED


def is_full(error: Exception) -> bool:
    """Whether the disk has no room."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_FULL or code in _CANNOT_WRITE


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        # STATE_DIR belongs to one process, so WAL's index need not be a file of its own: without
        # one the spool can be read on a full disk.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
