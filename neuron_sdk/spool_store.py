"""The spool and the journal as SQL on one SQLite connection: no thread, no policy on failures.

outbox: durable messages by sequence, until they are acknowledged. journal: every command attempt
that was taken, and its finish. A command's step (accepted, started, finished) and its update go
into one transaction, which the caller opens and commits.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum

from neuron_sdk.spool_schema import MessageKind, prepare

MAX_JOURNAL_ENTRIES = 10_000
MAX_JOURNAL_AGE_S = 7 * 86_400.0
MAX_JOURNAL_BYTES = 32 * 2**20

MAX_SEQUENCE = 2**63 - 1
"""What SQLite's integers hold."""

# Where the sequences leap to when the file may be behind what the federation has seen. Gaps are
# allowed, giving a number twice is not: the second message would be taken for a replay. By the
# clock, because a leap in memory leaves no trace: the next process must leap further.
SEQUENCE_LEAP = 2**32
SEQUENCES_PER_SECOND = 2**20

# What is dropped when the spool is full, class after class, each from its oldest on. A step of a
# command is overtaken once a later one of the same attempt says as much; a checkpoint only by
# another one. Results are in no class.
_OVERTAKEN = """
SELECT o.sequence FROM outbox o WHERE o.kind IN (2, 3, 5) AND EXISTS (
    SELECT 1 FROM outbox n
    WHERE n.command_id = o.command_id AND n.attempt = o.attempt AND n.sequence > o.sequence
        AND (o.kind <> 5 OR n.kind = 5)
) LIMIT 1
"""
_OLDEST = "SELECT sequence FROM outbox WHERE kind = %d ORDER BY sequence LIMIT 1"
_DROPPED_IN_TURN = (
    ("dropped_reports", _OLDEST % MessageKind.REPORT),
    ("dropped_updates", _OVERTAKEN),
    ("dropped_error_reports", _OLDEST % MessageKind.ERROR_REPORT),
)


class _Step(IntEnum):
    """How far the journal knows an attempt. Stored."""

    ACCEPTED = 1
    STARTED = 2
    FINISHED = 3
    CARRIED_OVER = 4
    """It ends in the next process of this neuron: a restart."""
    ACCEPTED_ONCE = 5
    """Accepted, and AT_MOST_ONCE. A step and no column, so that the format stays as it is."""


class Execution(StrEnum):
    """What is done with a command whose fate is unknown."""

    AT_LEAST_ONCE = "AT_LEAST_ONCE"
    """It is delivered again."""
    AT_MOST_ONCE = "AT_MOST_ONCE"
    """It is never delivered again."""


class Verdict(StrEnum):
    """What the journal says to a delivery."""

    NEW = "NEW"
    """Never seen; it is noted now."""
    RUNNING = "RUNNING"
    """This process has it already, or answers for it: nothing to do."""
    FINISHED = "FINISHED"
    """It has ended; its finish is on its way again."""
    FULL = "FULL"
    """Not noted: the spool holds more than it may. It stays with the federation, which sends it
    again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of one command: the journal's key."""

    command_id: str
    attempt: int


@dataclass(slots=True)
class Dropped:
    """What a full spool has given up since it was made. A message that had been sent, and whose
    acknowledgement had not come, counts too.
    """

    dropped_reports: int
    """Reports but those of the next but one."""
    dropped_updates: int
    """Steps of commands that a later step had overtaken."""
    dropped_error_reports: int
    """Reports of events of severity ERROR and above."""
    shortened_results: int
    """Results of commands that were kept without the response, because even they were too much."""

    @property
    def messages(self) -> int:
        """Messages dropped, of every class."""
        return self.dropped_reports + self.dropped_updates + self.dropped_error_reports


@dataclass(frozen=True, slots=True)
class SpooledMessage:
    """One durable message."""

    sequence: int
    kind: MessageKind
    payload: bytes


_COUNTS = tuple(field.name for field in fields(Dropped))


class SpoolStore:
    """One SQLite database with spool and journal. Not thread-safe."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        max_bytes: int,
        shortened: Callable[[bytes], bytes],
    ) -> None:
        """`connection` is in autocommit mode; an empty database is made a spool.

        Args:
            connection: the database.
            max_bytes: beyond it messages are dropped, class after class. Results are not; beyond
                twice as much they are kept without the response, and no new attempt is noted.
            shortened: a finish without its response.

        Raises:
            sqlite3.DatabaseError: it is damaged, or of an unknown format.
        """
        self.connection = connection
        self._max_bytes = max_bytes
        self._most_bytes = 2 * max_bytes
        self._shortened = shortened
        self.handed_out = 0
        """The highest sequence that was read for sending: what is above it nobody has seen."""
        self._finishes_since_prune = 0
        prepare(connection)
        connection.execute("PRAGMA cache_size = -512")
        self.load()
        self._found = (self.spool_id, self.next_sequence)
        self.known_sequence = self.next_sequence - 1
        """The last sequence that a process before this one can have given."""
        """Which spool this process found, and what that would give next: what is numbered below
        was there before it.
        """

    def load(self) -> None:
        """Read the counters again, after opening and after a rollback."""
        row = self.connection.execute(
            f"SELECT spool_id, next_sequence, {', '.join(_COUNTS)} FROM meta"  # noqa: S608 - names of this module
        ).fetchone()
        if row is None:
            raise sqlite3.DatabaseError("the spool has no identity")
        self.spool_id: str = row[0]
        self.next_sequence: int = row[1]
        self.dropped = Dropped(*row[2:])
        self.pending, self.pending_bytes, first = self.connection.execute(
            "SELECT count(*), coalesce(sum(length(payload)), 0), min(sequence) FROM outbox"
        ).fetchone()
        self.first_sequence = first or self.next_sequence

    def go_on_for(self, other: SpoolStore) -> None:
        """Take over from the store that this one's database is a copy of."""
        self.handed_out = other.handed_out
        self.known_sequence = other.known_sequence
        self._found = other._found

    # ---- the spool

    def leap(self, now: float) -> None:
        """Skip sequences that may have been given before, unknown to this file."""
        by_clock = int(now * SEQUENCES_PER_SECOND)
        self._set_next(max(self.next_sequence + SEQUENCE_LEAP, by_clock))
        self.known_sequence = self.next_sequence - 1

    def renew_identity(self, mark: int) -> None:
        """Become another spool: what waits is numbered anew from 1, under a new spool_id.

        Not so what this process found waiting, up to `mark`, the last sequence that the federation
        has applied: that was sent from the spool that this one is an old copy of. If a process
        before this one added to the copy, and never connected, that goes too: nothing tells them
        apart.
        """
        spool_id, next_sequence = self._found
        if self.spool_id == spool_id:
            self.trim(min(mark, next_sequence - 1))
        rows = self.connection.execute("SELECT sequence FROM outbox ORDER BY sequence").fetchall()
        # Downwards first, so that no new number meets an old one.
        self.connection.execute("UPDATE outbox SET sequence = -sequence")
        for new, (old,) in enumerate(rows, start=1):
            self.connection.execute(
                "UPDATE outbox SET sequence = ? WHERE sequence = ?", (new, -old)
            )
            self.connection.execute(
                "UPDATE journal SET finish_sequence = ? WHERE finish_sequence = ?", (-new, old)
            )
        self.connection.execute(
            "UPDATE journal SET finish_sequence = "
            "CASE WHEN finish_sequence < 0 THEN -finish_sequence ELSE NULL END"
        )
        self.connection.execute("UPDATE meta SET spool_id = ?", (uuid.uuid4().hex,))
        self._set_next(len(rows) + 1)
        self.handed_out = self.known_sequence = 0
        self.load()

    def append(self, kind: MessageKind, payload: bytes, of: Attempt | None = None) -> int:
        """Take in one durable message and return its sequence.

        When the bytes are more than allowed messages are dropped, and counted: perhaps this one,
        if all the others matter more.
        """
        sequence = self.next_sequence
        self.connection.execute(
            "INSERT INTO outbox VALUES (?, ?, ?, ?, ?)",
            (
                sequence,
                kind,
                of.command_id if of else None,
                of.attempt if of else None,
                payload,
            ),
        )
        if not self.pending:
            self.first_sequence = sequence
        self.pending += 1
        self.pending_bytes += len(payload)
        self._set_next(sequence + 1)
        self._make_room()
        return sequence

    def read_after(self, sequence: int, max_count: int, max_bytes: int) -> list[SpooledMessage]:
        """The next messages above `sequence`, in order; the first one whatever its size."""
        answer: list[SpooledMessage] = []
        size = 0
        for number, kind, payload in self.connection.execute(
            "SELECT sequence, kind, payload FROM outbox WHERE sequence > ? "
            "ORDER BY sequence LIMIT ?",
            (sequence, max_count),
        ):
            size += len(payload)
            if answer and size > max_bytes:
                break
            answer.append(SpooledMessage(number, MessageKind(kind), payload))
        if answer:
            self.handed_out = max(self.handed_out, answer[-1].sequence)
        return answer

    def unreported(self, most: int) -> list[Attempt]:
        """The first attempts whose finish waits to be acknowledged."""
        rows = self.connection.execute(
            "SELECT command_id, attempt FROM outbox WHERE kind = ? "
            "GROUP BY command_id, attempt ORDER BY min(sequence) LIMIT ?",
            (MessageKind.FINISH, most),
        )
        return [Attempt(command_id, attempt) for command_id, attempt in rows.fetchall()]

    def trim(self, ack_sequence: int) -> None:
        """Forget every message up to `ack_sequence`: the federation has stored them."""
        if ack_sequence < self.first_sequence or not self.pending:
            return
        self._forget("sequence <= ?", (ack_sequence,))
        self.connection.execute("PRAGMA incremental_vacuum(64)").fetchall()

    def replace_refused(
        self, sequence: int, substitute: Callable[[Attempt], bytes], now: float
    ) -> None:
        """Forget one message that was refused; put another finish in the place of a finish."""
        row = self.connection.execute(
            "SELECT kind, command_id, attempt, payload FROM outbox WHERE sequence = ?", (sequence,)
        ).fetchone()
        if row is None:
            return
        self._forget("sequence = ?", (sequence,))
        kind, command_id, attempt, payload = row
        if kind == MessageKind.FINISH:
            of = Attempt(command_id, attempt)
            finish = substitute(of)
            if finish != payload:  # else the substitute was refused as well
                self.finish(of, finish, now)

    def _make_room(self) -> None:
        for count, victim in _DROPPED_IN_TURN:
            while self.pending_bytes > self._max_bytes:
                found = self.connection.execute(victim).fetchone()
                if found is None:
                    break
                self._forget("sequence = ?", found)
                self._count(count)

    def _count(self, name: str) -> None:
        setattr(self.dropped, name, getattr(self.dropped, name) + 1)
        self.connection.execute(f"UPDATE meta SET {name} = {name} + 1")  # noqa: S608 - a field of Dropped

    def _forget(self, condition: str, values: tuple[int | str, ...]) -> None:
        count, size = self.connection.execute(
            f"SELECT count(*), coalesce(sum(length(payload)), 0) FROM outbox WHERE {condition}",  # noqa: S608 - constants of this module
            values,
        ).fetchone()
        self.connection.execute(f"DELETE FROM outbox WHERE {condition}", values)  # noqa: S608 - as above
        self.pending -= count
        self.pending_bytes -= size
        first = self.connection.execute("SELECT min(sequence) FROM outbox").fetchone()[0]
        self.first_sequence = first or self.next_sequence

    def _set_next(self, sequence: int) -> None:
        self.connection.execute("UPDATE meta SET next_sequence = ?", (sequence,))
        self.next_sequence = sequence
        if not self.pending:
            self.first_sequence = sequence

    # ---- the journal

    def accept(
        self,
        of: Attempt,
        accepted: bytes,
        now: float,
        execution: Execution = Execution.AT_LEAST_ONCE,
    ) -> Verdict:
        """Note an attempt that will run, and append its `accepted`."""
        verdict = self._look_up(of)
        if verdict is Verdict.NEW:
            once = execution is Execution.AT_MOST_ONCE
            self._note(of, _Step.ACCEPTED_ONCE if once else _Step.ACCEPTED, now)
            self.append(MessageKind.ACCEPTED, accepted, of)
        return verdict

    def accept_and_start(
        self, of: Attempt, accepted: bytes, progress: bytes, now: float
    ) -> Verdict:
        """Note an attempt that runs at once, and append its `accepted` and its first progress."""
        verdict = self.accept(of, accepted, now)
        if verdict is Verdict.NEW:
            self.start(of, progress, now)
        return verdict

    def reject(self, of: Attempt, finish: bytes, now: float) -> Verdict:
        """Note an attempt that will not run, and append its finish."""
        verdict = self._look_up(of)
        if verdict is Verdict.NEW:
            self._note(of, _Step.ACCEPTED, now)
            self.finish(of, finish, now)
        return verdict

    def start(self, of: Attempt, progress: bytes, now: float) -> None:
        """Note that the handler starts now, and append its first progress."""
        self.connection.execute(
            "UPDATE journal SET step = ?, change_time = ? WHERE command_id = ? AND attempt = ?",
            (_Step.STARTED, now, of.command_id, of.attempt),
        )
        self.append(MessageKind.PROGRESS, progress, of)

    def progress(self, of: Attempt, progress: bytes) -> None:
        """Append a progress, in the place of those that nobody has seen yet."""
        self._forget_unseen(MessageKind.PROGRESS, of)
        self.append(MessageKind.PROGRESS, progress, of)

    def checkpoint(self, of: Attempt, progress: bytes) -> None:
        """Append a progress with a checkpoint, in the place of all that nobody has seen yet."""
        self._forget_unseen(MessageKind.PROGRESS, of)
        self._forget_unseen(MessageKind.CHECKPOINT, of)
        self.append(MessageKind.CHECKPOINT, progress, of)

    def _forget_unseen(self, kind: MessageKind, of: Attempt) -> None:
        self._forget(
            "sequence > ? AND kind = ? AND command_id = ? AND attempt = ?",
            (self.handed_out, kind, of.command_id, of.attempt),
        )

    def finish(self, of: Attempt, finish: bytes, now: float) -> None:
        """Note the end of an attempt, and append it; without its response if there is no room for
        it even among what is never dropped.
        """
        if self.pending_bytes + len(finish) > self._most_bytes:
            shorter = self._shortened(finish)
            if len(shorter) < len(finish):
                finish = shorter
                self._count("shortened_results")
        sequence = self.append(MessageKind.FINISH, finish, of)
        self.connection.execute(
            "UPDATE journal SET step = ?, finish = ?, finish_sequence = ?, change_time = ? "
            "WHERE command_id = ? AND attempt = ?",
            (_Step.FINISHED, finish, sequence, now, of.command_id, of.attempt),
        )
        self._finishes_since_prune += 1
        if self._finishes_since_prune >= 256:
            self.prune(now)

    def carry_over(self, of: Attempt, now: float) -> None:
        """Note that the next process will end a started attempt."""
        self.connection.execute(
            "UPDATE journal SET step = ?, change_time = ? WHERE command_id = ? AND attempt = ?",
            (_Step.CARRIED_OVER, now, of.command_id, of.attempt),
        )

    def carried_over(self) -> list[Attempt]:
        """What an earlier process left to this one to end."""
        rows = self.connection.execute(
            "SELECT command_id, attempt FROM journal WHERE step = ?", (_Step.CARRIED_OVER,)
        )
        return [Attempt(command_id, attempt) for command_id, attempt in rows.fetchall()]

    def recover(
        self,
        interrupted: Callable[[Attempt], bytes],
        not_started: Callable[[Attempt], bytes],
        now: float,
    ) -> int:
        """End what an earlier process started and did not finish, and what it did not start and
        nobody delivers again; forget the rest of what it did not start, so that a redelivery runs
        it. To be called before anything is accepted.

        Returns:
            How many attempts it ended.
        """
        self.connection.execute("DELETE FROM journal WHERE step = ?", (_Step.ACCEPTED,))
        rows = self.connection.execute(
            "SELECT command_id, attempt, step FROM journal WHERE step IN (?, ?) "
            "ORDER BY change_time",
            (_Step.STARTED, _Step.ACCEPTED_ONCE),
        ).fetchall()
        for command_id, attempt, step in rows:
            of = Attempt(command_id, attempt)
            make = interrupted if step == _Step.STARTED else not_started
            self.finish(of, make(of), now)
        self.prune(now)
        return len(rows)

    def prune(self, now: float) -> None:
        """Forget finished attempts that are too old or too many. One whose finish is not
        acknowledged stays.
        """
        self._finishes_since_prune = 0
        acknowledged = (
            "step = 3 AND (finish_sequence IS NULL OR "
            "finish_sequence NOT IN (SELECT sequence FROM outbox))"
        )
        self.connection.execute(
            f"DELETE FROM journal WHERE {acknowledged} AND change_time < ?",  # noqa: S608 - constants of this function
            (now - MAX_JOURNAL_AGE_S,),
        )
        self.connection.execute(
            f"DELETE FROM journal WHERE {acknowledged} AND rowid IN (SELECT rowid FROM ("  # noqa: S608 - as above
            "SELECT rowid, row_number() OVER newest AS place, "
            "sum(length(finish)) OVER newest AS size FROM journal WHERE step = ? "
            "WINDOW newest AS (ORDER BY change_time DESC, rowid DESC)"
            ") WHERE place > ? OR size > ?)",
            (_Step.FINISHED, MAX_JOURNAL_ENTRIES, MAX_JOURNAL_BYTES),
        )

    def journal_size(self) -> int:
        """How many attempts the journal knows."""
        count: int = self.connection.execute("SELECT count(*) FROM journal").fetchone()[0]
        return count

    def _look_up(self, of: Attempt) -> Verdict:
        row = self.connection.execute(
            "SELECT step, finish, finish_sequence FROM journal "
            "WHERE command_id = ? AND attempt = ?",
            (of.command_id, of.attempt),
        ).fetchone()
        full = self.pending_bytes > self._most_bytes
        if row is None:
            return Verdict.FULL if full else Verdict.NEW
        step, finish, finish_sequence = row
        if step != _Step.FINISHED:
            return Verdict.RUNNING
        waiting = self.connection.execute(
            "SELECT 1 FROM outbox WHERE sequence = ?", (finish_sequence,)
        ).fetchone()
        if waiting is None and full:
            return Verdict.FULL
        if waiting is None:
            sequence = self.append(MessageKind.FINISH, finish, of)
            self.connection.execute(
                "UPDATE journal SET finish_sequence = ? WHERE command_id = ? AND attempt = ?",
                (sequence, of.command_id, of.attempt),
            )
        return Verdict.FINISHED

    def _note(self, of: Attempt, step: _Step, now: float) -> None:
        self.connection.execute(
            "INSERT INTO journal VALUES (?, ?, ?, NULL, NULL, ?)",
            (of.command_id, of.attempt, step, now),
        )
