"""Where the embedded PostgreSQL lives, who runs it there, and the lock against a second starter.

    DATA_DIR/server.lock                held while we run; holds our process id
    DATA_DIR/postgres/data              the cluster (owned by PostgreSQL's account, 0700)
    DATA_DIR/postgres/socket            its Unix socket; a folder in /tmp if this path is too long
    DATA_DIR/postgres/server.log        what PostgreSQL says, bounded
    DATA_DIR/postgres/programs-VERSION  copies, if its account cannot read the installed ones

Folders that were there before us are never chmodded: where one is in the way, the error names it.
"""

import fcntl
import hashlib
import os
import pwd
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from federation_server.store.embedded.errors import (
    OWN_SERVER,
    DataDirectoryInUse,
    DataDirectoryUnusable,
)

ROOT = 0

_SERVICE_ACCOUNTS = ("postgres", "nobody")
"""Who runs PostgreSQL when we are root, as which it refuses to run: the first that exists."""

_LONGEST_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes in `sockaddr_un.sun_path`, less the closing zero."""

_SOCKET_NAME = ".s.PGSQL.5432"

_LET_GO_WITHIN = 1.0
"""Seconds for a holder that was killed just now to be gone with its lock."""

UNFINISHED = ".unfinished"
"""Suffix of what is being made. It is renamed when whole: what still bears it is rubbish."""


@dataclass(frozen=True)
class Account:
    """The operating system's user that PostgreSQL runs as."""

    uid: int
    gid: int

    @property
    def is_ours(self) -> bool:
        return self.uid == os.geteuid()

    def may_traverse(self, folder: Path) -> bool:
        return self._may(folder, 0o1)

    def may_read(self, file: Path) -> bool:
        return self._may(file, 0o4)

    def _may(self, path: Path, bit: int) -> bool:
        about = path.stat()
        if self.uid == ROOT:
            return True
        if about.st_uid == self.uid:
            return bool(about.st_mode & bit << 6)
        if about.st_gid == self.gid:
            return bool(about.st_mode & bit << 3)
        return bool(about.st_mode & bit)


@dataclass(frozen=True)
class Home:
    """The folders of one embedded PostgreSQL under one (absolute) data folder."""

    data_dir: Path

    @property
    def folder(self) -> Path:
        return self.data_dir / "postgres"

    @property
    def cluster(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def lock(self) -> Path:
        return self.data_dir / "server.lock"

    @property
    def socket_folder(self) -> Path:
        """Always the same for a data folder: nothing to look up, and nothing piles up."""
        folder = self.folder / "socket"
        fits = len(os.fsencode(folder / _SOCKET_NAME)) <= _LONGEST_SOCKET_PATH
        if fits and "," not in str(folder):  # to libpq a comma begins another host
            return folder
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        # Not the user's TMPDIR, which can be too long itself, or closed to PostgreSQL's account.
        return Path("/tmp") / f"federation-{digest}"  # noqa: S108 - `make_socket_folder` checks it

    def account(self) -> Account:
        """Who runs PostgreSQL: we, or if we are root the cluster's owner or a service account."""
        if os.geteuid() != ROOT:
            return self._known(os.geteuid())
        if self.cluster.exists() and self.cluster.stat().st_uid != ROOT:
            return self._known(self.cluster.stat().st_uid)
        for name in _SERVICE_ACCOUNTS:
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue
            return Account(entry.pw_uid, entry.pw_gid)
        raise DataDirectoryUnusable(
            self.data_dir,
            "PostgreSQL does not run as root, and there is no user postgres or nobody to run it",
            f"start as an ordinary user, or {OWN_SERVER}",
        )

    def _known(self, uid: int) -> Account:
        try:
            return Account(uid, pwd.getpwuid(uid).pw_gid)
        except KeyError:
            raise DataDirectoryUnusable(
                self.data_dir,
                f"PostgreSQL needs a user with a name, and user id {uid} has none in /etc/passwd",
                f"add it there, or {OWN_SERVER}",
            ) from None

    def make_folder(self) -> None:
        """Make the folders down to `folder`. Root leaves them passable for PostgreSQL's account."""
        mode = 0o711 if os.geteuid() == ROOT else 0o700
        for folder in (*reversed(self.folder.parents), self.folder):
            if folder.is_dir():
                continue
            folder.mkdir()
            folder.chmod(mode)  # the umask may have taken more

    def check_reach(self, account: Account) -> None:
        """Raise DataDirectoryUnusable, naming the obstacle, if `account` cannot get to `folder`."""
        for folder in (*reversed(self.folder.parents), self.folder):
            if not account.may_traverse(folder):
                raise DataDirectoryUnusable(
                    self.data_dir,
                    f"PostgreSQL runs as user {pwd.getpwuid(account.uid).pw_name} here,"
                    f" who may not pass through {folder}",
                    "set FEDERATION_DATA_DIR to a folder that every user may pass through",
                )

    def make_socket_folder(self, account: Account) -> Path:
        """The socket's folder, 0700 and `account`'s: whoever may enter it needs no password."""
        folder = self.socket_folder
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            about = folder.lstat()
            owners = (account.uid, os.geteuid())
            if not stat.S_ISDIR(about.st_mode) or about.st_uid not in owners:
                raise DataDirectoryUnusable(
                    self.data_dir,
                    f"{folder}, the place for its socket, belongs to somebody else",
                    "set FEDERATION_DATA_DIR to a folder with a shorter path",
                ) from None
        folder.chmod(0o700)
        hand_over(folder, account)
        return folder

    def clear_unfinished(self) -> None:
        """Remove what a starter that was killed half way has left."""
        for rubbish in self.folder.glob(f"*{UNFINISHED}"):
            # An initdb whose starter was killed a moment ago is perhaps tidying up in there itself.
            deadline = time.monotonic() + 5
            while rubbish.exists() and time.monotonic() < deadline:
                shutil.rmtree(rubbish, ignore_errors=True)
            if rubbish.exists():
                shutil.rmtree(rubbish)


def hand_over(path: Path, account: Account) -> None:
    """Make `account` the owner, which only root can and only root needs to."""
    if not account.is_ours:
        os.chown(path, account.uid, account.gid)


class DataDirectoryLock:
    """An exclusive lock on the data folder. The kernel frees it however the process ends."""

    def __init__(self, home: Home) -> None:
        """Take the lock, or raise DataDirectoryInUse with the holder's process id."""
        self._file = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._locked():
            written = os.pread(self._file, 32, 0).strip()
            os.close(self._file)
            holder = int(written) if written.isdigit() else None
            raise DataDirectoryInUse(home.data_dir, holder)
        # The file stays for ever: to remove it would let two processes lock two files of one name.
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def _locked(self) -> bool:
        deadline = time.monotonic() + _LET_GO_WITHIN
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
            else:
                return True

    def release(self) -> None:
        """Give it back. The second call does nothing."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def files_below(folder: Path) -> Iterator[Path]:
    """Every folder and file below `folder`, itself first."""
    yield folder
    yield from folder.rglob("*")
