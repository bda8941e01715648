"""STATE_DIR: the folder of one neuron's token, spool and journal, for one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from neuron_sdk.errors import ConfigError, StateDirInUse


class StateDir:
    """A locked STATE_DIR. The lock ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Make the folder if it is missing, and lock it.

        Raises:
            StateDirInUse: another process has it.
            ConfigError: it cannot be made or written.
        """
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"STATE_DIR {path} cannot be used ({error.strerror}): make it writable for this "
                "user, or set STATE_DIR to another folder"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(self._handle, 20, 0).decode("ascii", "replace").strip()
            os.close(self._handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"STATE_DIR {path} cannot be locked ({error.strerror}): set STATE_DIR to a "
                    "folder on a local disk"
                ) from None
            raise StateDirInUse(
                f"STATE_DIR {path} is in use by process {pid or '(unknown)'}: stop that neuron, "
                "or give this one its own neuron_id (in its code, or NEURON_ID where that says "
                "none) or STATE_DIR"
            ) from None
        try:
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # On a full disk the lock holds all the same; only its owner is not named.

    @property
    def spool(self) -> Path:
        """The SQLite file of spool and journal."""
        return self.path / "spool.sqlite3"

    @property
    def token(self) -> Path:
        """The neuron's token."""
        return self.path / "token"

    @property
    def request(self) -> Path:
        """Of a Register whose token is not kept yet, the request_id."""
        return self.path / "request"

    def release(self) -> None:
        """Unlock it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
