"""The neuron's memory of what the federation has not confirmed: spool and journal, on one thread.

One SQLite file in STATE_DIR, written by one thread, which takes everything that waits into one
transaction. So no other thread ever waits for a disk, and a burst costs one fsync. When the disk
is full or ill the same tables go on in memory, and back to the disk as soon as it takes them; a
damaged file is set aside. What waits is bounded in bytes: see `SpoolStore` for what is dropped.
Every method may be called by any thread.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from neuron_sdk.errors import ConfigError
from neuron_sdk.logs import get_logger
from neuron_sdk.spool_disk import SpoolDisk, connect_memory, is_damage, is_full
from neuron_sdk.spool_schema import MessageKind
from neuron_sdk.spool_store import Attempt, Execution, SpooledMessage, SpoolStore, Verdict

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

T = TypeVar("T")
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SpoolState:
    """The spool at one moment."""

    spool_id: str
    first_sequence: int
    """The lowest sequence that it holds; next_sequence if it is empty."""
    next_sequence: int
    known_sequence: int
    """The last sequence that a process before this one can have given."""
    handed_out: int
    """The last sequence that this process has read, to send it."""
    pending: int
    pending_bytes: int
    dropped: int
    """Messages dropped since it was made, because it was full; by class, as `Dropped` has them:"""
    dropped_reports: int
    dropped_updates: int
    dropped_error_reports: int
    shortened_results: int
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
        shortened: Callable[[bytes], bytes],
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open or make the file, and end what an earlier process left unfinished.

        Args:
            path: the SQLite file; its folder exists.
            max_bytes: beyond it messages are dropped, class after class: see `SpoolStore`.
            interrupted: makes the finish of an attempt that died with an earlier process.
            not_started: makes the finish of an attempt that an earlier process did not start, and
                that nobody delivers again.
            shortened: makes of a finish one without its response.
            now: seconds since 1970.

        Raises:
            ConfigError: the folder cannot be written, and says so.
        """
        self._disk = SpoolDisk(path)
        self._max_bytes = max_bytes
        self._interrupted = interrupted
        self._not_started = not_started
        self._shortened = shortened
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
        """Append an analytics report; the first to be dropped."""
        return self._submit(lambda store: store.append(MessageKind.REPORT, payload))

    def report_errors(self, payload: bytes) -> Future[int]:
        """Append a report of events of severity ERROR and above; the last to be dropped."""
        return self._submit(lambda store: store.append(MessageKind.ERROR_REPORT, payload))

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

    def renew_identity(self, mark: int) -> Future[None]:
        """Become another spool, because the federation has seen sequences that this one has not
        given, up to `mark`: an old copy of STATE_DIR. Forgets what was waiting in the copy, which
        the federation has from the original, and keeps what this process has added.
        """
        return self._submit(lambda store: store.renew_identity(mark))

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
        answers = self._answers(batch)
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

    def _answers(self, batch: list[_Job[Any]]) -> list[Any]:
        """What each job answers, or the exception that it ends with: no other one's."""
        try:
            try:
                return self._commit(batch)
            except sqlite3.Error as error:
                self._leave_disk(error)
                return self._commit(batch)
        except Exception as error:  # noqa: BLE001 - the thread must outlive a bad job
            if len(batch) > 1:  # nothing of it was done, and one of them is to blame
                return [answer for job in batch for answer in self._answers([job])]
            _log.error("the spool failed", action="spool.failed", error=repr(error))
            self._reload()
            return [error]

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
            known_sequence=store.known_sequence,
            handed_out=store.handed_out,
            pending=store.pending,
            pending_bytes=store.pending_bytes,
            dropped=store.dropped.messages,
            **asdict(store.dropped),
            in_memory=self._in_memory,
        )

    # ---- the file

    def _open_first(self) -> SpoolStore:
        try:
            try:
                return self._recovered(self._open_disk())
            except (sqlite3.Error, OSError) as error:
                if not is_full(error):
                    raise
                # A full disk is no reason not to serve, and none to forget what the file holds.
                store = self._recovered(self._read_disk())
                self._note_leaving(error)
                return store
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"STATE_DIR {self._disk.path.parent} cannot hold the neuron's state ({error}): "
                "make it writable for this user, or set STATE_DIR to another folder"
            ) from None

    def _recovered(self, store: SpoolStore) -> SpoolStore:
        """The store, after what an earlier process left unfinished in it was ended."""
        try:
            store.connection.execute("BEGIN")
            count = store.recover(self._interrupted, self._not_started, self._now())
            store.connection.execute("COMMIT")
        except BaseException:
            store.connection.close()
            raise
        if count:
            _log.warning(
                "commands died with the last process", action="journal.interrupted", count=count
            )
        return store

    def _open_disk(self) -> SpoolStore:
        known = self._disk.exists
        try:
            store = self._store_of(self._disk.connect())
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._disk.set_aside(error)
            known, store = False, self._store_of(self._disk.connect())
        try:
            self._leap_if_behind(store, known=known)
            self._disk.mark_complete()
        except BaseException:
            store.connection.close()
            raise
        return store

    def _read_disk(self) -> SpoolStore:
        known = self._disk.exists
        try:
            store = self._store_of(self._disk.read())
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._disk.set_aside(error)
            known, store = False, self._store_of(connect_memory())
        self._leap_if_behind(store, known=known)
        return store

    def _leap_if_behind(self, store: SpoolStore, *, known: bool) -> None:
        if known and not self._disk.complete:
            # The last process went on in memory: it gave sequences that this file never saw.
            store.leap(self._now())

    def _store_of(self, connection: sqlite3.Connection) -> SpoolStore:
        try:
            return SpoolStore(connection, self._max_bytes, self._shortened)
        except BaseException:
            connection.close()
            raise

    def _leave_disk(self, error: sqlite3.Error) -> None:
        """Go on without the file: anew if it is damaged, in memory if the disk fails."""
        old = self._store
        if is_damage(error) and not self._in_memory:
            with contextlib.suppress(sqlite3.Error):
                old.connection.close()
            self._disk.set_aside(error)
            try:
                self._store = self._store_of(self._disk.connect())
            except (sqlite3.Error, OSError) as also:
                self._store = self._store_of(connect_memory())
                self._note_leaving(also)
            return
        memory = connect_memory()
        try:
            old.connection.backup(memory)
            self._store = self._store_of(memory)
            self._store.go_on_for(old)
        except sqlite3.Error as unreadable:
            # Out of the way of what will be written there once the disk is well again.
            self._disk.set_aside(unreadable)
            self._store = self._store_of(connect_memory())
        with contextlib.suppress(sqlite3.Error):
            old.connection.close()
        self._note_leaving(error)

    def _note_leaving(self, error: Exception) -> None:
        self._disk.mark_incomplete()
        self._in_memory = True
        self._retry_at = time.monotonic() + _DISK_RETRY_S
        _log.error(
            "the disk does not take the spool: it goes on in memory, and is lost if the process "
            "ends; make room in STATE_DIR",
            action="spool.in_memory",
            file=str(self._disk.path),
            error=str(error),
        )

    def _return_to_disk(self, *, at_once: bool) -> None:
        if not self._in_memory or (time.monotonic() < self._retry_at and not at_once):
            return
        self._retry_at = time.monotonic() + _DISK_RETRY_S
        memory = self._store
        try:
            disk = self._disk.connect()
            try:
                memory.connection.backup(disk)
                store = self._store_of(disk)
                self._disk.mark_complete()
            except BaseException:
                disk.close()
                raise
        except (sqlite3.Error, OSError) as error:
            if is_damage(error):
                self._disk.set_aside(error)
            return
        store.go_on_for(memory)
        memory.connection.close()
        self._store, self._in_memory = store, False
        self.state = self._snapshot()
        _log.info("the spool is on disk again", action="spool.on_disk", file=str(self._disk.path))


def _resolve(future: Future[Any], answer: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
