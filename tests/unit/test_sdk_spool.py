"""Spool and journal: what a crash, a full disk and a damaged file leave behind."""

from __future__ import annotations

import resource
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuron_sdk import ConfigError
from neuron_sdk.spool import Attempt, Execution, Spool, Verdict
from neuron_sdk.spool_store import MAX_JOURNAL_AGE_S, SEQUENCE_LEAP, SpoolStore
from tests.support.spools import MIB, done, open_spool, payloads, shortened, waiting
from tests.support.waiting import eventually_sync

A = Attempt("a", 1)
B = Attempt("b", 1)


def in_memory(max_bytes: int = MIB) -> SpoolStore:
    return SpoolStore(sqlite3.connect(":memory:", isolation_level=None), max_bytes, shortened)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool.sqlite3"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., Spool]]:
    made: list[Spool] = []

    def open_one(**settings: Any) -> Spool:
        spool = open_spool(path, **settings)
        made.append(spool)
        return spool

    yield open_one
    for spool in made:
        spool.close()


def test_messages_come_back_in_order_until_they_are_acknowledged(
    make: Callable[..., Spool],
) -> None:
    spool = make()
    for number in range(5):
        assert done(spool.report(b"%d" % number)) == number + 1
    assert [m.sequence for m in waiting(spool)] == [1, 2, 3, 4, 5]
    done(spool.ack(3))
    assert payloads(spool) == [b"3", b"4"]
    assert (spool.state.pending, spool.state.first_sequence, spool.state.next_sequence) == (2, 4, 6)


def test_reading_is_bounded_by_count_and_bytes(make: Callable[..., Spool]) -> None:
    spool = make()
    for _ in range(4):
        spool.report(b"x" * 100)
    assert len(done(spool.read_after(0, max_count=2, max_bytes=10**6))) == 2
    assert len(done(spool.read_after(0, max_count=9, max_bytes=250))) == 2
    assert len(done(spool.read_after(0, max_count=9, max_bytes=1))) == 1


def test_the_spool_is_the_same_after_a_restart(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.report(b"kept"))
    before = spool.state
    spool.close()
    again = make()
    assert again.state == replace(before, known_sequence=1)
    assert payloads(again) == [b"kept"]
    assert done(again.report(b"next")) == 2


def test_sequences_go_on_after_everything_was_acknowledged(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.report(b"1"))
    done(spool.ack(1))
    spool.close()
    again = make()
    assert (again.state.first_sequence, again.state.next_sequence) == (2, 2)


def test_only_the_owner_can_read_the_files(make: Callable[..., Spool], path: Path) -> None:
    done(make().report(b"secret"))
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_delivery_is_accepted_once(make: Callable[..., Spool]) -> None:
    spool = make()
    assert done(spool.accept(A, b"accepted")) is Verdict.NEW
    assert done(spool.accept(A, b"accepted")) is Verdict.RUNNING
    assert done(spool.reject(A, b"rejected")) is Verdict.RUNNING
    assert done(spool.accept(Attempt("a", 2), b"second attempt")) is Verdict.NEW
    assert payloads(spool) == [b"accepted", b"second attempt"]


def test_a_finished_attempt_repeats_its_finish(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.accept(A, b"accepted"))
    done(spool.start(A, b"started"))
    done(spool.finish(A, b"finish"))
    assert done(spool.accept(A, b"accepted")) is Verdict.FINISHED
    assert payloads(spool).count(b"finish") == 1, "it is on its way already"
    done(spool.ack(3))
    assert done(spool.accept(A, b"accepted")) is Verdict.FINISHED
    assert payloads(spool) == [b"finish"]
    spool.close()
    again = make()
    done(again.ack(4))
    assert done(again.accept(A, b"accepted")) is Verdict.FINISHED
    assert payloads(again) == [b"finish"]


def test_a_rejection_is_remembered_too(make: Callable[..., Spool]) -> None:
    spool = make()
    assert done(spool.reject(A, b"rejected")) is Verdict.NEW
    done(spool.ack(1))
    assert done(spool.accept(A, b"accepted")) is Verdict.FINISHED
    assert payloads(spool) == [b"rejected"]


def test_what_a_dead_process_had_started_is_interrupted(make: Callable[..., Spool]) -> None:
    spool = make()
    for of in (A, B):
        done(spool.accept(of, b"accepted"))
    done(spool.start(A, b"started"))
    spool.close()
    again = make()
    assert payloads(again)[-1] == b"interrupted a"
    assert done(again.accept(A, b"accepted")) is Verdict.FINISHED
    assert done(again.accept(B, b"again")) is Verdict.NEW, "it had not started: it may run"


def test_what_a_dead_process_had_not_started_ends_if_it_never_comes_again(
    make: Callable[..., Spool],
) -> None:
    spool = make()
    done(spool.accept(A, b"accepted", Execution.AT_MOST_ONCE))
    done(spool.accept(B, b"accepted", Execution.AT_LEAST_ONCE))
    spool.close()
    again = make()
    assert payloads(again) == [b"accepted", b"accepted", b"not started a"]
    assert again.state.next_sequence == 4, "what it sends first says so"
    assert done(again.accept(A, b"accepted", Execution.AT_MOST_ONCE)) is Verdict.FINISHED
    assert done(again.accept(B, b"again", Execution.AT_LEAST_ONCE)) is Verdict.NEW
    again.close()
    assert payloads(make()).count(b"not started a") == 1, "it ends once"


def test_what_never_comes_again_and_was_started_is_interrupted(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.accept(A, b"accepted", Execution.AT_MOST_ONCE))
    done(spool.start(A, b"started"))
    done(spool.accept_and_start(B, b"accepted", b"started"))
    spool.close()
    assert payloads(make())[-2:] == [b"interrupted a", b"interrupted b"]


def test_unseen_progress_is_replaced_by_newer_progress(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.accept(A, b"accepted"))
    done(spool.start(A, b"0"))
    done(spool.start(B, b"other"))
    for number in range(1, 5):
        done(spool.progress(A, b"%d" % number))
    assert payloads(spool) == [b"accepted", b"other", b"4"]
    done(spool.progress(A, b"5"))
    assert payloads(spool) == [b"accepted", b"other", b"4", b"5"], "4 may have been sent"


def test_unseen_progress_with_a_checkpoint_is_replaced_by_a_newer_checkpoint_only(
    make: Callable[..., Spool],
) -> None:
    spool = make()
    done(spool.accept(A, b"accepted"))
    done(spool.start(A, b"0"))
    done(spool.checkpoint(A, b"1 with"))
    done(spool.checkpoint(B, b"other"))
    done(spool.progress(A, b"2"))
    done(spool.progress(A, b"3"))
    assert payloads(spool) == [b"accepted", b"1 with", b"other", b"3"]
    spool.close()
    again = make()
    assert payloads(again)[:4] == [b"accepted", b"1 with", b"other", b"3"]
    done(again.checkpoint(A, b"4 with"))
    assert b"1 with" in payloads(again), "it may have been sent"


def test_an_unseen_checkpoint_is_replaced_by_the_next(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.checkpoint(A, b"1 with"))
    done(spool.progress(A, b"2"))
    done(spool.checkpoint(A, b"3 with"))
    assert payloads(spool) == [b"3 with"]


def test_old_entries_leave_the_journal_and_unsent_ones_stay(make: Callable[..., Spool]) -> None:
    clock = [1e9]
    spool = make(now=lambda: clock[0])
    done(spool.reject(A, b"acknowledged"))
    done(spool.ack(1))
    done(spool.reject(B, b"not acknowledged"))
    spool.close()
    clock[0] += MAX_JOURNAL_AGE_S + 1
    again = make(now=lambda: clock[0])
    assert done(again.accept(B, b"x")) is Verdict.FINISHED
    assert done(again.accept(A, b"x")) is Verdict.NEW


def test_the_journal_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sdk.spool_store.MAX_JOURNAL_ENTRIES", 20)
    store = in_memory()
    for number in range(50):
        store.reject(Attempt(f"c{number}", 1), b"x", float(number))
    store.trim(store.next_sequence)
    store.prune(50.0)
    assert store.journal_size() == 20
    assert store.accept(Attempt("c49", 1), b"x", 50.0) is Verdict.FINISHED
    assert store.accept(Attempt("c29", 1), b"x", 50.0) is Verdict.NEW


def test_a_large_journal_is_bounded_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sdk.spool_store.MAX_JOURNAL_BYTES", 1000)
    store = in_memory()
    for number in range(50):
        store.reject(Attempt(f"c{number}", 1), b"x" * 100, float(number))
    store.trim(store.next_sequence)
    store.prune(50.0)
    assert store.journal_size() == 10


def test_a_refused_finish_is_replaced_once(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.accept(A, b"accepted"))
    done(spool.finish(A, b"bad finish"))
    done(spool.refuse(2, lambda _: b"substitute"))
    assert payloads(spool) == [b"accepted", b"substitute"]
    done(spool.refuse(3, lambda _: b"substitute"))
    assert payloads(spool) == [b"accepted"]
    assert done(spool.accept(A, b"x")) is Verdict.FINISHED


def test_a_renewed_spool_numbers_what_waits_from_1(make: Callable[..., Spool]) -> None:
    told: list[str] = []
    spool = make()
    spool.listen(lambda: None, lambda: told.append("new identity"))
    for number in range(5):
        done(spool.report(b"%d" % number))
    done(spool.reject(A, b"finish"))
    done(spool.ack(3))
    before = spool.state.spool_id
    done(spool.renew_identity(100))
    assert [(m.sequence, m.payload) for m in waiting(spool)] == [
        (1, b"3"),
        (2, b"4"),
        (3, b"finish"),
    ]
    assert spool.state.spool_id != before
    assert spool.state.next_sequence == 4
    assert told == ["new identity"]
    assert done(spool.accept(A, b"x")) is Verdict.FINISHED
    assert len(waiting(spool)) == 3, "the finish still waits: it is not appended twice"


def test_a_renewed_spool_has_forgotten_what_its_process_found_and_the_federation_has(
    make: Callable[..., Spool],
) -> None:
    spool = make()
    done(spool.report(b"acknowledged"))
    done(spool.ack(1))
    done(spool.report(b"report"))
    done(spool.reject(A, b"finish"))
    spool.close()
    again = make()
    done(again.report(b"new"))
    done(again.renew_identity(100))
    assert [(m.sequence, m.payload) for m in waiting(again)] == [(1, b"new")]
    assert again.state.dropped == 0
    assert done(again.accept(A, b"x")) is Verdict.FINISHED
    assert payloads(again) == [b"new", b"finish"], "asked for again, it is sent again"


def test_a_renewed_spool_keeps_what_the_federation_has_not(make: Callable[..., Spool]) -> None:
    spool = make()
    for number in range(1, 6):
        done(spool.report(b"%d" % number))
    spool.close()
    again = make()
    done(again.renew_identity(3))
    assert [(m.sequence, m.payload) for m in waiting(again)] == [(1, b"4"), (2, b"5")]


def test_a_renewed_spool_keeps_the_ends_that_its_process_gave_to_what_it_found(
    make: Callable[..., Spool],
) -> None:
    spool = make()
    done(spool.accept_and_start(A, b"accepted", b"started"))
    done(spool.accept(B, b"accepted", Execution.AT_MOST_ONCE))
    spool.close()
    again = make()
    done(again.renew_identity(100))
    assert payloads(again) == [b"interrupted a", b"not started b"]


def test_a_spool_that_was_in_memory_and_is_renewed_has_forgotten_what_its_process_found(
    make: Callable[..., Spool], path: Path
) -> None:
    spool = make()
    done(spool.report(b"found"))
    spool.close()
    path.with_suffix(".durable").unlink()  # as the process left it that went on in memory
    again = make()
    done(again.report(b"new"))
    done(again.renew_identity(again.state.next_sequence))
    assert payloads(again) == [b"new"]


def test_a_spool_that_is_renewed_again_keeps_what_waits(make: Callable[..., Spool]) -> None:
    spool = make()
    for _ in range(5):
        done(spool.report(b"found"))
    spool.close()
    again = make()
    done(again.report(b"new"))
    for mark in (10, 2**63 - 1, 2**64 - 1):
        done(again.renew_identity(mark))
        assert payloads(again) == [b"new"]


def test_a_spool_knows_what_its_process_found_over_a_rollback(make: Callable[..., Spool]) -> None:
    make().close()
    spool = make()
    done(spool.report(b"new"))
    with pytest.raises(OverflowError):
        done(spool.ack(2**63))
    done(spool.renew_identity(100))
    assert payloads(spool) == [b"new"]


def test_a_damaged_file_is_set_aside_at_the_start(make: Callable[..., Spool], path: Path) -> None:
    first = make()
    done(first.report(b"lost"))
    first.close()
    path.write_bytes(b"this is no database" * 1000)
    spool = make()
    assert spool.state.spool_id != first.state.spool_id
    assert spool.state.next_sequence == 1
    assert [p.name for p in path.parent.glob("*.damaged-*")] != []
    assert done(spool.report(b"works")) == 1


def test_a_file_that_breaks_while_it_is_open_is_set_aside(
    make: Callable[..., Spool], path: Path
) -> None:
    told: list[str] = []
    spool = make()
    spool.listen(lambda: None, lambda: told.append("new identity"))
    for _ in range(50):
        spool.report(b"x" * 10_000)
    done(spool.ack(1))
    # Damage that SQLite meets when it next reads from the file: everything but the header.
    size = path.stat().st_size
    wal = path.with_name(path.name + "-wal")
    for file in (path, wal):
        with file.open("r+b") as handle:
            handle.seek(4096 if file is path else 0)
            handle.write(b"\xff" * min(10**6, (size if file is path else wal.stat().st_size)))
    for _ in range(20):
        spool.report(b"y" * 10_000)
    waiting(spool)
    assert len(list(path.parent.glob("*.damaged-*"))) >= 1
    assert told == ["new identity"]
    assert done(spool.report(b"works")) == spool.state.next_sequence - 1
    assert payloads(spool)[-1] == b"works"


def test_an_unwritable_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="STATE_DIR"):
        open_spool(tmp_path / "file" / "spool.sqlite3")


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Lets the process's files grow to a size and not beyond: as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_means_memory_and_then_the_disk_again(
    make: Callable[..., Spool],
    path: Path,
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuron_sdk.spool._DISK_RETRY_S", 0.02)
    spool = make()
    done(spool.report(b"on disk"))
    small_disk(200_000)
    for _ in range(60):
        done(spool.report(b"x" * 10_000))
    done(spool.accept(A, b"accepted"))
    assert spool.state.in_memory
    assert not path.with_suffix(".durable").exists()
    assert len(waiting(spool)) == 62, "nothing is lost"
    small_disk(resource.RLIM_INFINITY)
    eventually_sync(lambda: not spool.state.in_memory, describe="the spool on disk")
    assert done(spool.accept(A, b"accepted")) is Verdict.RUNNING
    spool.close()
    assert len(waiting(make())) == 62


def test_a_spool_that_is_renewed_as_the_disk_fills_up_has_forgotten_what_its_process_found(
    make: Callable[..., Spool],
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuron_sdk.spool._DISK_RETRY_S", 0.02)
    spool = make()
    done(spool.report(b"found"))
    spool.close()
    again = make()
    done(again.report(b"new"))
    small_disk(1)
    done(again.renew_identity(100))
    assert again.state.in_memory
    assert payloads(again) == [b"new"]
    small_disk(resource.RLIM_INFINITY)
    eventually_sync(lambda: not again.state.in_memory, describe="the spool on disk")
    done(again.renew_identity(100))
    assert payloads(again) == [b"new"]


def test_a_spool_knows_what_its_process_found_in_memory_and_on_disk_again(
    make: Callable[..., Spool],
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuron_sdk.spool._DISK_RETRY_S", 0.02)
    spool = make()
    done(spool.report(b"found"))
    spool.close()
    again = make()
    small_disk(1)
    done(again.report(b"new"))
    assert again.state.in_memory
    small_disk(resource.RLIM_INFINITY)
    eventually_sync(lambda: not again.state.in_memory, describe="the spool on disk")
    done(again.renew_identity(100))
    assert payloads(again) == [b"new"]


def test_a_spool_that_was_in_memory_never_gives_a_sequence_twice(
    make: Callable[..., Spool], path: Path
) -> None:
    spool = make()
    done(spool.report(b"1"))
    spool.close()
    path.with_suffix(".durable").unlink()  # as the process left it that went on in memory
    again = make(now=lambda: 0.0)
    assert again.state.spool_id == spool.state.spool_id
    assert done(again.report(b"2")) == 2 + SEQUENCE_LEAP


@pytest.fixture
def together(make: Callable[..., Spool]) -> Iterator[tuple[Spool, Callable[[], None]]]:
    """A spool that holds one report, and takes what it is given now as one batch, when told to."""
    spool, go = make(), threading.Event()
    busy = threading.Event()

    def hold() -> None:
        busy.set()
        go.wait(10)

    spool.listen(hold, lambda: None)
    done(spool.report(b"first"))
    busy.wait(10)
    yield spool, go.set
    go.set()


Together = tuple[Spool, Callable[[], None]]


def broken(_: Attempt) -> bytes:
    raise RuntimeError("no such thing")


def test_a_job_that_fails_fails_alone(together: Together, make: Callable[..., Spool]) -> None:
    spool, go = together
    rejected = spool.reject(A, b"finish")
    bad = (spool.ack(2**63), spool.refuse(2, broken))
    accepted, reported = spool.accept(B, b"accepted"), spool.report(b"last")
    read = spool.read_after(1, max_count=9, max_bytes=MIB)
    go()
    for job, kind in zip(bad, (OverflowError, RuntimeError), strict=True):
        with pytest.raises(kind):
            done(job)
    assert (done(rejected), done(accepted), done(reported)) == (Verdict.NEW, Verdict.NEW, 4)
    held = [b"first", b"finish", b"accepted", b"last"]
    assert [message.payload for message in done(read)] == held[1:]
    assert (spool.state.pending, spool.state.next_sequence) == (4, 5)
    assert not spool.state.in_memory
    spool.close()
    assert payloads(make()) == held


def test_who_waits_is_answered_in_a_batch_with_a_job_that_fails(together: Together) -> None:
    spool, go = together
    asked = spool.next_after(1, max_count=9, max_bytes=MIB)
    bad = spool.ack(2**63)
    spool.report(b"next")
    go()
    assert [message.payload for message in done(asked)] == [b"next"]
    with pytest.raises(OverflowError):
        done(bad)


def test_who_waits_goes_on_waiting_when_what_was_to_be_appended_fails(together: Together) -> None:
    spool, go = together
    rejected = spool.reject(A, b"finish")
    asked = spool.next_after(2, max_count=9, max_bytes=MIB)
    bad = spool.refuse(2, broken)
    go()
    done(rejected)
    with pytest.raises(RuntimeError):
        done(bad)
    assert not asked.done()
    done(spool.report(b"next"))
    assert [message.payload for message in done(asked)] == [b"next"]


def test_who_asks_for_what_cannot_be_is_told_so_and_the_next_one_is_answered(
    together: Together,
) -> None:
    spool, go = together
    bad = spool.next_after(2**63, max_count=9, max_bytes=MIB)
    reported = spool.report(b"next")
    go()
    with pytest.raises(OverflowError):
        done(bad)
    assert done(reported) == 2
    assert len(done(spool.next_after(0, max_count=9, max_bytes=MIB))) == 2


def test_listeners_hear_of_new_messages(make: Callable[..., Spool]) -> None:
    told: list[str] = []
    spool = make()
    spool.listen(lambda: told.append("append"), lambda: told.append("identity"))
    done(spool.report(b"1"))
    spool.close()
    assert told == ["append"]


def test_an_acknowledgement_of_nothing_is_harmless(make: Callable[..., Spool]) -> None:
    spool = make()
    done(spool.ack(10))
    assert done(spool.report(b"1")) == 1
    assert payloads(spool) == [b"1"]
