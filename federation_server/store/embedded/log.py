"""PostgreSQL's log file: written by its processes, bounded by us, quoted when a start fails."""

import contextlib
import os
import shutil
import threading
from pathlib import Path

LARGEST = 8 * 1024 * 1024
"""Bytes at which the log becomes `server.log.1`, replacing the one before."""

LOOK_EVERY = 60.0
"""Seconds between looks at its size."""

_COMPLAINTS = ("FATAL:", "PANIC:", "error:", "ERROR:")
"""What marks the line that says why, most of all the server's, then initdb's."""


class BoundedLog:
    """An append-only file that children write to. A thread keeps it bounded until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._closed = threading.Event()
        self.bound()
        threading.Thread(
            target=self._bound_now_and_then, name="log of postgres", daemon=True
        ).start()

    def fileno(self) -> int:
        return self._file

    def bound(self, largest: int = LARGEST) -> None:
        """Move the log aside when it is large.

        It is copied and cut, since its writers keep it open: what they add in between is lost.
        """
        if self.path.stat().st_size > largest:
            with contextlib.suppress(OSError):  # on a full disk it is better to lose the old lines
                shutil.copyfile(self.path, self.path.with_name(self.path.name + ".1"))
            os.truncate(self.path, 0)

    def _bound_now_and_then(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            self.bound()

    def mark(self) -> int:
        """A place to read from later: the end as it is now."""
        return self.path.stat().st_size

    def read_since(self, mark: int) -> str:
        """All that was written since `mark`."""
        with self.path.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")

    def complaint_since(self, mark: int) -> str:
        """The last line since `mark` that complains, without its prefix; else the last line."""
        spoken = [line.strip() for line in self.read_since(mark).split("\n") if line.strip()]
        for sign in _COMPLAINTS:
            for line in reversed(spoken):
                if sign in line:
                    return line.partition(sign)[2].strip()
        return spoken[-1] if spoken else "it said nothing"

    def close(self) -> None:
        """Stop bounding it and close our descriptor."""
        if not self._closed.is_set():
            self._closed.set()
            os.close(self._file)
