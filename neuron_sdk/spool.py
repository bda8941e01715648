"""The neuron's memory of what the federation has not confirmed: spool and journal, on one thread.

One SQLite file in STATE_DIR, written by one thread, which takes everything that waits into one
transaction. So no other thread ever waits for a disk, and a burst costs one fsync. When the disk
is full or ill the same tables go on in memory, and back to the disk as soon as it takes them; a
damaged file is set aside. Every method may be called by any thread.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from neuron_sdk.errors import ConfigError
from neuron_sdk.logs import get_logger
from neuron_sdk.spool_store import (
    Attempt,
    Execution,
    MessageKind,
    SpooledMessage,
    SpoolStore,
    Verdict,
)

__all__ = [
    "Attempt",
    "Execution",
    "MessageKind",
    "Spool",
    "SpoolState",
    "SpooledMessage",
    "Verdict",
]

_MAX_BATCH = 256
_DISK_RETRY_S = 15.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SpoolState:
    """The spool at one moment."""

    spool_id: str
    first_sequence: int
    """The lowest sequence that it holds; next_sequence if it is empty."""
    next_sequence: int
    pending: int
    pending_bytes: int
    dropped: int
    """Messages dropped since it was made, because it was full."""
    in_memory: bool
    """True while the disk does not take it: what it holds is lost if the process ends."""


class _Job(Generic[T]):
    """Something to do on the store, and where its answer goes."""

    __slots__ = ("appends", "do", "durable", "future", "reads", "waits")

    def __init__(
        self,
        do: Callable[[SpoolStore], T],
        *,
        appends: bool = False,
        durable: bool = False,
        reads: bool = False,
        waits: bool = False,
    ) -> None:
        self.do = do
        self.appends = appends
        self.durable = durable
        self.reads = reads
        """It writes nothing."""
        self.waits = waits
        """It is done again, until it has an answer."""
        self.future: Future[T] = Future()


class Spool:
    """Spool and journal of one neuron."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        interrupted: Callable[[Attempt], bytes],
        not_started: Callable[[Attempt], bytes],
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open or make the file, and end what an earlier process left unfinished.

        Args:
            path: the SQLite file; its folder exists.
            max_bytes: beyond it the oldest reports are dropped.
            interrupted: makes the finish of an attempt that died with an earlier process.
            not_started: makes the finish of an attempt that an earlier process did not start, and
                that nobody delivers again.
            now: seconds since 1970.

        Raises:
            ConfigError: the folder cannot be written, and says so.
        """
        self._path = path
        self._marker = path.with_suffix(".durable")
        self._max_bytes = max_bytes
        self._interrupted = interrupted
        self._not_started = not_started
        self._now = now
        self._in_memory = False
        self._retry_at = 0.0
        self._on_append: Callable[[], None] = lambda: None
        self._on_new_identity: Callable[[], None] = lambda: None
        self._waiting: _Job[Any] | None = None
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._store = self._open_first()
        self.state = self._snapshot()
        """The spool after the last commit."""
        self.carried_over = self._store.carried_over()
        """What an earlier process left to this one to end."""
        self._thread = threading.Thread(target=self._work, name="neuron-spool", daemon=True)
        self._thread.start()

    def listen(self, on_append: Callable[[], None], on_new_identity: Callable[[], None]) -> None:
        """Whom to tell, on the spool's thread, of new messages and of a new spool_id."""
        self._on_append = on_append
        self._on_new_identity = on_new_identity

    # ---- what others call

    def report(self, payload: bytes) -> Future[int]:
        """Append an analytics report."""
        return self._submit(lambda store: store.append(MessageKind.REPORT, payload))

    def accept(
        self, of: Attempt, accepted: bytes, execution: Execution = Execution.AT_LEAST_ONCE
    ) -> Future[Verdict]:
        """Note a delivery that will run, unless it is known."""
        return self._submit(lambda store: store.accept(of, accepted, self._now(), execution))

    def accept_and_start(self, of: Attempt, accepted: bytes, progress: bytes) -> Future[Verdict]:
        """Note a delivery whose handler starts as soon as this is done, unless it is known."""
        return self._submit(
            lambda store: store.accept_and_start(of, accepted, progress, self._now())
        )

    def reject(self, of: Attempt, finish: bytes) -> Future[Verdict]:
        """Note a delivery that will not run, unless it is known."""
        return self._submit(lambda store: store.reject(of, finish, self._now()))

    def start(self, of: Attempt, progress: bytes) -> Future[None]:
        """Note that a handler starts as soon as this is done."""
        return self._submit(lambda store: store.start(of, progress, self._now()))

    def progress(self, of: Attempt, progress: bytes) -> Future[None]:
        """Append a handler's progress."""
        return self._submit(lambda store: store.progress(of, progress))

    def checkpoint(self, of: Attempt, progress: bytes) -> Future[None]:
        """Append a handler's progress that has a checkpoint."""
        return self._submit(lambda store: store.checkpoint(of, progress))

    def finish(self, of: Attempt, finish: bytes) -> Future[None]:
        """Note an attempt's end."""
        return self._submit(lambda store: store.finish(of, finish, self._now()))

    def carry_over(self, of: Attempt) -> Future[None]:
        """Leave a started attempt to the next process to end."""
        return self._submit(lambda store: store.carry_over(of, self._now()))

    def ack(self, sequence: int) -> Future[None]:
        """Forget what the federation has stored."""
        return self._put(_Job(lambda store: store.trim(sequence)))

    def refuse(self, sequence: int, substitute: Callable[[Attempt], bytes]) -> Future[None]:
        """Forget a message that the federation will never take; a finish is replaced."""
        return self._submit(lambda store: store.replace_refused(sequence, substitute, self._now()))

    def renew_identity(self) -> Future[None]:
        """Become another spool, because the federation has seen sequences that this one has not
        given: an old copy of STATE_DIR.
        """
        return self._submit(lambda store: store.renew_identity())

    def read_after(
        self, sequence: int, *, max_count: int, max_bytes: int
    ) -> Future[list[SpooledMessage]]:
        """The next messages to send, in order."""
        return self._put(
            _Job(lambda store: store.read_after(sequence, max_count, max_bytes), reads=True)
        )

    def next_after(
        self, sequence: int, *, max_count: int, max_bytes: int
    ) -> Future[list[SpooledMessage]]:
        """The same, but answered only when there are any, and at once when they are durable. One
        caller can wait: who asks next takes its place.
        """
        return self._put(
            _Job(
                lambda store: store.read_after(sequence, max_count, max_bytes),
                reads=True,
                waits=True,
            )
        )

    def unreported(self, most: int) -> Future[list[Attempt]]:
        """The attempts that have ended and whose end the federation has not confirmed."""
        return self._put(_Job(lambda store: store.unreported(most), reads=True))

    def close(self) -> None:
        """Finish what waits, and close the file. Blocks until it is done."""
        self._jobs.put(None)
        self._thread.join()

    def _submit(self, do: Callable[[SpoolStore], T]) -> Future[T]:
        return self._put(_Job(do, appends=True, durable=True))

    def _put(self, job: _Job[T]) -> Future[T]:
        self._jobs.put(job)
        return job.future

    # ---- the thread

    def _work(self) -> None:
        open_for_work = True
        while open_for_work:
            batch: list[_Job[Any]] = []
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=_DISK_RETRY_S if self._in_memory else None)
                while job is not None and len(batch) < _MAX_BATCH:
                    batch.append(job)
                    job = self._jobs.get_nowait()
                open_for_work = job is not None
                if job is not None:
                    batch.append(job)
            self._return_to_disk(at_once=not open_for_work)
            if batch:
                self._carry_out(batch)
        self._store.connection.close()

    def _carry_out(self, batch: list[_Job[Any]]) -> None:
        before = self._store.spool_id
        appends = any(job.appends for job in batch)
        batch = self._with_waiting(batch, appends=appends)
        try:
            try:
                answers = self._commit(batch)
            except sqlite3.Error as error:
                self._leave_disk(error)
                answers = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - the thread must outlive a bad job
            _log.error("the spool failed", action="spool.failed", error=repr(error))
            self._reload()
            answers = [error] * len(batch)
        self.state = self._snapshot()
        for job, answer in zip(batch, answers, strict=True):
            if job.waits and not answer:
                self._waiting = job
            else:
                _resolve(job.future, answer)
        if self._store.spool_id != before:
            self._on_new_identity()
        if appends:
            self._on_append()

    def _with_waiting(self, batch: list[_Job[Any]], *, appends: bool) -> list[_Job[Any]]:
        """The batch with who waits at its end, where it sees all that is appended before."""
        asking = [job for job in batch if job.waits]
        for job in asking:
            if self._waiting is not None:
                _resolve(self._waiting.future, [])
            self._waiting = job
        if self._waiting is None or not (asking or appends):
            return batch
        waiting, self._waiting = self._waiting, None
        return [*(job for job in batch if not job.waits), waiting]

    def _commit(self, batch: list[_Job[Any]]) -> list[Any]:
        if all(job.reads for job in batch):
            return [job.do(self._store) for job in batch]
        run = self._store.connection.execute
        # A lost acknowledgement is only asked for again: no reason to wait for the disk.
        run(f"PRAGMA synchronous = {'FULL' if any(j.durable for j in batch) else 'NORMAL'}")
        run("BEGIN")
        try:
            answers = [job.do(self._store) for job in batch]
            run("COMMIT")
        except BaseException:
            self._reload()
            raise
        return answers

    def _reload(self) -> None:
        connection = self._store.connection
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._store.load()

    def _snapshot(self) -> SpoolState:
        store = self._store
        return SpoolState(
            spool_id=store.spool_id,
            first_sequence=store.first_sequence,
            next_sequence=store.next_sequence,
            pending=store.pending,
            pending_bytes=store.pending_bytes,
            dropped=store.dropped,
            in_memory=self._in_memory,
        )

    # ---- the file

    def _open_first(self) -> SpoolStore:
        try:
            store = self._open_disk()
            store.connection.execute("BEGIN")
            count = store.recover(self._interrupted, self._not_started, self._now())
            store.connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.DatabaseError) and _is_full(error):
                # A full disk is no reason not to serve.
                store = SpoolStore(_connect(":memory:"), self._max_bytes)
                self._note_leaving(error)
                return store
            raise ConfigError(
                f"STATE_DIR {self._path.parent} cannot hold the neuron's state ({error}): make it "
                "writable for this user, or set STATE_DIR to another folder"
            ) from None
        if count:
            _log.warning(
                "commands died with the last process", action="journal.interrupted", count=count
            )
        return store

    def _open_disk(self) -> SpoolStore:
        known = self._path.exists()
        try:
            store = SpoolStore(self._connect_disk(), self._max_bytes)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # the disk's fault, not the file's
            self._set_aside(error)
            store = SpoolStore(self._connect_disk(), self._max_bytes)
        if known and not self._marker.exists():
            # The last process went on in memory: it gave sequences that this file never saw.
            store.leap()
        self._marker.touch(mode=0o600)
        return store

    def _connect_disk(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        self._path.chmod(0o600)
        connection = _connect(str(self._path))
        # WAL: a commit is one append. The limit keeps a burst from leaving a large file behind.
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA journal_size_limit = 1048576").fetchone()
        return connection

    def _set_aside(self, error: sqlite3.Error) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._now()))
        aside = self._path.with_name(f"{self._path.name}.damaged-{stamp}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(f"{aside}{suffix}")
        _log.error(
            "the spool's file is damaged and was set aside; unsent messages in it are lost",
            action="spool.set_aside",
            file=str(aside),
            error=str(error),
        )

    def _leave_disk(self, error: sqlite3.Error) -> None:
        """Go on without the file: anew if it is damaged, in memory if the disk fails."""
        old = self._store
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED and not self._in_memory:
            with contextlib.suppress(sqlite3.Error):
                old.connection.close()
            self._set_aside(error)
            with contextlib.suppress(sqlite3.Error, OSError):
                self._store = SpoolStore(self._connect_disk(), self._max_bytes)
                return
        memory = _connect(":memory:")
        with contextlib.suppress(sqlite3.Error):
            old.connection.backup(memory)
        try:
            self._store = SpoolStore(memory, self._max_bytes)
        except sqlite3.Error:
            self._store = SpoolStore(_connect(":memory:"), self._max_bytes)
        self._store.handed_out = old.handed_out
        with contextlib.suppress(sqlite3.Error):
            old.connection.close()
        self._note_leaving(error)

    def _note_leaving(self, error: Exception) -> None:
        # Removing a file works on a full disk, where a note could not be written.
        with contextlib.suppress(OSError):
            self._marker.unlink()
        self._in_memory = True
        self._retry_at = time.monotonic() + _DISK_RETRY_S
        _log.error(
            "the disk does not take the spool: it goes on in memory, and is lost if the process "
            "ends; make room in STATE_DIR",
            action="spool.in_memory",
            file=str(self._path),
            error=str(error),
        )

    def _return_to_disk(self, *, at_once: bool) -> None:
        if not self._in_memory or (time.monotonic() < self._retry_at and not at_once):
            return
        self._retry_at = time.monotonic() + _DISK_RETRY_S
        memory = self._store
        try:
            disk = self._connect_disk()
            try:
                memory.connection.backup(disk)
                store = SpoolStore(disk, self._max_bytes)
                self._marker.touch(mode=0o600)
            except BaseException:
                disk.close()
                raise
        except (sqlite3.Error, OSError):
            return
        store.handed_out = memory.handed_out
        memory.connection.close()
        self._store, self._in_memory = store, False
        self.state = self._snapshot()
        _log.info("the spool is on disk again", action="spool.on_disk", file=str(self._path))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    # Has an effect on an empty file alone, and only before WAL writes its first page.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    return connection


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def _resolve(future: Future[Any], answer: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
