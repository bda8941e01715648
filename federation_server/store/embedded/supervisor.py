"""The embedded PostgreSQL: makes the cluster once, starts it, notices its death, stops it.

It promises: one starter for a data folder; no PostgreSQL left when we end, even by SIGKILL; the
same data at the next start, whatever was killed in between. Everything but `exited` blocks: call it
from a thread if there is a loop to keep.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from federation_server.store.embedded.cluster import (
    check_version,
    make_cluster,
    postmaster,
    retire_predecessor,
)
from federation_server.store.embedded.errors import (
    DataDirectoryUnusable,
    EmbeddedPostgresError,
    start_failure,
)
from federation_server.store.embedded.home import Account, DataDirectoryLock, Home
from federation_server.store.embedded.log import BoundedLog
from federation_server.store.embedded.process import Child, Watch
from federation_server.store.embedded.programs import Programs, programs_for
from federation_server.store.embedded.role import (
    DATABASE,
    ROLE,
    SUPERUSER,
    make_role_and_database,
)

PORT = 5432
"""Only part of the socket's name: nothing listens on TCP."""

STOP_WITHIN = 30.0
"""Seconds for PostgreSQL's orderly stop (it writes a checkpoint), before patience ends."""

TAKE_OVER_WITHIN = 20.0
"""Seconds for processes of an earlier run, whose starter was killed, to leave our data."""

START_WITHIN = 300.0
"""Seconds to become ready: recovery after a crash replays up to `max_wal_size`."""

_POLL_EVERY = 0.01

_PREDECESSOR_THERE = ("lock file", "pre-existing shared memory block")
"""What PostgreSQL says when processes of an earlier run still work on its data."""


class EmbeddedPostgres:
    """A PostgreSQL of our own in `data_dir`, reached only through a Unix socket in a 0700 folder.

    As root it runs as user `postgres`, else `nobody`. Use it as a context manager, or call `start`
    and `stop`. After an unexpected death (`wait`, `exited`) `start` starts it again; the data
    folder stays locked until `stop`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Touch nothing yet.

        data_dir: made if it is missing, with its parents.
        settings: the server's, for this run, before its files': {"fsync": "off"} for a test.
        watch: how PostgreSQL notices our end; the best that this system has unless given.
        """
        self._home = Home(Path(os.path.realpath(data_dir.expanduser())))
        self._settings = dict(settings or {})
        self._watch = watch or Watch.best()
        self._turn = threading.RLock()  # a stop waits for the start that is under way
        self._lock: DataDirectoryLock | None = None
        self._log: BoundedLog | None = None
        self._child: Child | None = None
        self._pid: int | None = None
        self._stopping = False

    @property
    def log_file(self) -> Path:
        """Where PostgreSQL's messages are."""
        return self._home.log

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None before the first start and after `stop`."""
        return self._pid

    @property
    def returncode(self) -> int | None:
        """None while it runs and before; else its exit status, negative for a signal."""
        return None if self._child is None else self._child.returncode

    @property
    def died(self) -> bool:
        """Whether it has ended though nobody called `stop`."""
        return self.returncode is not None and not self._stopping

    def url(self, database: str = DATABASE, *, user: str = ROLE) -> str:
        """A SQLAlchemy URL for psycopg 3. Only the supervisor, and tests, have to be SUPERUSER."""
        query = {"host": str(self._home.socket_folder), "port": str(PORT)}
        return URL.create(
            "postgresql+psycopg", username=user, database=database, query=query
        ).render_as_string(hide_password=False)

    def dsn(self, database: str = DATABASE, *, user: str = ROLE) -> str:
        """The same in libpq's form, for psycopg and psql."""
        host = str(self._home.socket_folder)
        return make_conninfo(host=host, port=PORT, user=user, dbname=database)

    def start(self) -> str:
        """Return its URL once the database `federation` answers. A running one stays as it is.

        Raises DataDirectoryInUse, DataDirectoryUnusable, PostgresNotInstalled, PostgresStartFailed.
        """
        with self._turn:
            if self._child is not None and self._child.returncode is None:
                return self.url()
            self._stopping = False
            try:
                with self._os_errors_told():
                    self._start()
            except BaseException:
                self.stop()
                raise
            return self.url()

    def stop(self) -> None:
        """Stop it in order and free the data folder. The second call does nothing."""
        self._stopping = True
        with self._turn:
            if self._child is not None:
                self._stop_child(self._child)
                with contextlib.suppress(OSError):
                    self._home.socket_folder.rmdir()
            self._pid = None
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def wait(self, within: float | None = None) -> int:
        """Block until it has ended, by `stop` or on its own, and return the exit status.

        Raises TimeoutError after `within` seconds, RuntimeError before the first start.
        """
        return self._started_child().wait(within)

    async def exited(self) -> int:
        """The same for asyncio, with no thread. Cancelling it leaves PostgreSQL alone."""
        return await asyncio.wrap_future(self._started_child().exit)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _started_child(self) -> Child:
        if self._child is None:
            raise RuntimeError("the embedded PostgreSQL was never started")
        return self._child

    @contextlib.contextmanager
    def _os_errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataDirectoryUnusable.from_os_error(self._home.data_dir, error) from error

    def _start(self) -> None:
        home = self._home
        home.make_folder()
        self._lock = self._lock or DataDirectoryLock(home)
        account = home.account()
        home.check_reach(account)
        log = self._log = self._log or BoundedLog(home.log)
        home.clear_unfinished()
        programs = programs_for(account, home)

        def run(command: Sequence[str | Path]) -> None:
            mark = log.mark()
            child = Child(command, account=account, watch=self._watch, output=log.fileno())
            if child.wait() != 0:
                raise self._failure(log.complaint_since(mark))

        if not home.cluster.exists():
            durable = self._settings.get("fsync") != "off"
            make_cluster(home, programs, account, run, durable=durable)
        check_version(home, programs)
        home.make_socket_folder(account)
        self._launch(programs, account, log)
        self._make_database()

    def _launch(self, programs: Programs, account: Account, log: BoundedLog) -> None:
        """Start the server; while processes of an earlier run work on its data, try again."""
        command: list[str | Path] = [programs.postgres, "-D", self._home.cluster]
        for name, value in (self._settings | self._fixed_settings()).items():
            command += ["-c", f"{name}={value}"]
        patience_ends = time.monotonic() + TAKE_OVER_WITHIN
        while True:
            retire_predecessor(self._home)
            mark = log.mark()
            self._child = Child(command, account=account, watch=self._watch, output=log.fileno())
            if self._becomes_ready(self._child):
                return
            # Not only in the last complaint: the predecessor's processes write to the same log.
            said = log.read_since(mark)
            predecessor_there = any(sign in said for sign in _PREDECESSOR_THERE)
            if not predecessor_there or time.monotonic() > patience_ends:
                raise self._failure(log.complaint_since(mark))
            time.sleep(0.1)

    def _fixed_settings(self) -> dict[str, str]:
        socket_folder = str(self._home.socket_folder)
        return {
            "listen_addresses": "",
            "port": str(PORT),
            # PostgreSQL reads a list: quoted, a comma or a blank in the path is only a character.
            "unix_socket_directories": '"' + socket_folder.replace('"', '""') + '"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
            "log_destination": "stderr",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }

    def _becomes_ready(self, child: Child) -> bool:
        """Wait until it takes connections (True) or has ended (False)."""
        deadline = time.monotonic() + START_WITHIN
        while child.returncode is None:
            pid, state = postmaster(self._home)
            if state == "ready" and pid is not None and _is_of(child, pid):
                self._pid = pid
                return True
            if time.monotonic() > deadline:
                raise self._failure(f"it was not ready after {START_WITHIN:.0f} s")
            time.sleep(_POLL_EVERY)
        return False

    def _make_database(self) -> None:
        try:
            make_role_and_database(lambda database: self.dsn(database, user=SUPERUSER))
        except psycopg.Error as error:
            raise self._failure(str(error).partition("\n")[0]) from error

    def _failure(self, reason: str) -> EmbeddedPostgresError:
        return start_failure(self._home.data_dir, reason, self._home.log)

    def _stop_child(self, child: Child) -> None:
        """Fast shutdown; if that hangs, immediate shutdown (recovery follows); then SIGKILL."""
        for number, patience in ((signal.SIGINT, STOP_WITHIN), (signal.SIGQUIT, 5.0)):
            child.signal(number)
            with contextlib.suppress(TimeoutError):
                child.wait(patience)
                return
        for pid in {child.pid, self._pid or child.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def _is_of(child: Child, pid: int) -> bool:
    """Whether `pid` is the child or, behind a guard, the guard's: a stale file names neither."""
    if pid == child.pid:
        return True
    try:
        return psutil.Process(pid).ppid() == child.pid
    except psutil.NoSuchProcess:
        return False
