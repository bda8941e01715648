"""What a full spool drops, and in which order; what it counts; what it never drops."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from federation.v1 import command_pb2, session_service_pb2
from neuron_sdk.convert import finish_update, shortened_finish
from neuron_sdk.outcome import CommandFault, CommandOutcome, FinalState
from neuron_sdk.spool import Attempt, MessageKind, Spool, Verdict
from tests.support.spools import MIB, done, open_spool, payloads, waiting

A = Attempt("a", 1)
B = Attempt("b", 1)
Make = Callable[..., Spool]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool.sqlite3"


@pytest.fixture
def make(path: Path) -> Iterator[Make]:
    made: list[Spool] = []

    def open_one(**settings: Any) -> Spool:
        spool = open_spool(path, **({"max_bytes": 1000} | settings))
        made.append(spool)
        return spool

    yield open_one
    for spool in made:
        spool.close()


def counts(spool: Spool) -> tuple[int, int, int, int]:
    state = spool.state
    assert (
        state.dropped == state.dropped_reports + state.dropped_updates + state.dropped_error_reports
    )
    return (
        state.dropped_reports,
        state.dropped_updates,
        state.dropped_error_reports,
        state.shortened_results,
    )


def test_the_oldest_reports_go_first_and_are_counted_over_restarts(make: Make) -> None:
    spool = make()
    done(spool.accept(A, b"a" * 100))
    for number in range(12):
        done(spool.report(b"%3d" % number * 33))
    assert [m.payload[:3] for m in waiting(spool)] == [
        b"aaa",
        *(b"%3d" % number for number in range(3, 12)),
    ]
    assert spool.state.pending_bytes <= 1000
    assert counts(spool) == (3, 0, 0, 0)
    spool.close()
    assert counts(make()) == (3, 0, 0, 0)


def test_each_class_goes_only_after_the_one_before(make: Make) -> None:
    spool = make()
    done(spool.report_errors(b"error" * 20))
    done(spool.accept(A, b"accepted" * 10))
    done(spool.start(A, b"started" * 10))
    done(spool.report(b"report" * 20))
    done(spool.finish(A, b"finish" * 10))

    def left() -> list[MessageKind]:
        return [message.kind for message in waiting(spool)]

    order: list[list[MessageKind]] = [[]]
    for number in range(20):
        done(spool.finish(Attempt(f"c{number}", 1), b"f" * 90))
        rest: list[MessageKind] = [kind for kind in left() if kind is not MessageKind.FINISH]
        if rest != order[-1]:
            order.append(rest)
    kinds = MessageKind
    expected: list[list[MessageKind]] = [
        [kinds.ERROR_REPORT, kinds.ACCEPTED, kinds.PROGRESS, kinds.REPORT],
        [kinds.ERROR_REPORT, kinds.ACCEPTED, kinds.PROGRESS],
        [kinds.ERROR_REPORT, kinds.PROGRESS],
        [kinds.ERROR_REPORT],
        [],
    ]
    assert order[1:] == expected
    assert counts(spool) == (1, 2, 1, 0)
    assert left().count(kinds.FINISH) == 21, "a result is never dropped"


def test_a_report_does_not_push_out_what_matters_more(make: Make) -> None:
    spool = make()
    for number in range(10):
        done(spool.report_errors(b"%d" % number * 100))
    done(spool.report(b"r" * 100))
    assert [m.payload[:1] for m in waiting(spool)] == [b"%d" % number for number in range(10)]
    done(spool.report_errors(b"n" * 100))
    assert [m.payload[:1] for m in waiting(spool)][::9] == [b"1", b"n"], "the oldest error goes"
    assert counts(spool) == (1, 0, 1, 0)


def test_of_a_command_only_what_a_later_step_says_as_well_is_dropped(make: Make) -> None:
    spool = make()
    done(spool.accept(A, b"A accepted"))
    done(spool.start(A, b"A started"))
    waiting(spool)  # so that nothing of it is replaced as unseen
    done(spool.checkpoint(A, b"A first checkpoint"))
    waiting(spool)
    done(spool.checkpoint(A, b"A last checkpoint"))
    waiting(spool)
    done(spool.progress(A, b"A last progress"))
    done(spool.accept(B, b"B accepted"))
    done(spool.reject(Attempt("c", 1), b"f" * 990))
    assert payloads(spool) == [
        b"A last checkpoint",
        b"A last progress",
        b"B accepted",
        b"f" * 990,
    ]
    assert counts(spool) == (0, 3, 0, 0)


def test_results_beyond_twice_the_bound_are_kept_without_their_response(make: Make) -> None:
    spool = make()
    for number in range(8):
        done(spool.accept(Attempt(f"c{number}", 1), b""))
    for number in range(8):
        done(spool.finish(Attempt(f"c{number}", 1), b"%03d" % number + b"x" * 397))
    assert [len(each) for each in payloads(spool) if each] == [400] * 5 + [9] * 3
    assert counts(spool)[3] == 3
    done(spool.ack(spool.state.next_sequence - 1))
    assert done(spool.accept(Attempt("c7", 1), b"")) is Verdict.FINISHED
    assert payloads(spool) == [b"short 007"], "and the journal knows no more of it"


def test_a_spool_full_of_results_takes_no_more_commands_until_they_are_sent(make: Make) -> None:
    spool = make()
    for number in range(20):
        done(spool.accept(Attempt(f"c{number}", 1), b"a" * 50))
    for number in range(20):
        done(spool.finish(Attempt(f"c{number}", 1), b"f" * 500))
    while done(spool.reject(Attempt(f"r{spool.state.pending}", 1), b"f" * 500)) is Verdict.NEW:
        pass
    before = spool.state
    assert before.pending_bytes <= 2000 + 9
    assert done(spool.accept(A, b"accepted")) is Verdict.FULL
    assert spool.state == before
    done(spool.ack(before.next_sequence - 1))
    assert done(spool.accept(A, b"accepted")) is Verdict.NEW


def test_a_shortened_result_says_what_it_has_lost() -> None:
    outcome = CommandOutcome(FinalState.SUCCEEDED, {"rows": "x" * 5000}, None, 1.5, "logs" * 100)
    finish = finish_update(A, outcome)
    update = session_service_pb2.CommandUpdate.FromString(shortened_finish(finish))
    assert (update.command_id, update.attempt) == ("a", 1)
    assert update.finished.state == command_pb2.COMMAND_STATE_FAILED
    assert update.finished.error.code == "RESPONSE_LOST"
    assert "5015 bytes" in update.finished.error.message
    assert update.finished.run_duration.ToMilliseconds() == 1500
    assert update.ByteSize() < 300


def test_a_shortened_failure_keeps_its_code_and_the_head_of_its_message() -> None:
    fault = CommandFault("NO_DISK", "e" * 5000, {"more": "x" * 5000})
    finish = finish_update(A, CommandOutcome(FinalState.FAILED, error=fault, log_tail="logs"))
    update = session_service_pb2.CommandUpdate.FromString(shortened_finish(finish))
    assert update.finished.state == command_pb2.COMMAND_STATE_FAILED
    assert update.finished.error.code == "NO_DISK"
    assert update.finished.error.message.startswith("eee")
    assert update.ByteSize() < 600


def test_a_file_of_the_first_format_is_taken_over_with_all_that_it_holds(
    make: Make, path: Path
) -> None:
    path.parent.mkdir()
    old = sqlite3.connect(path, isolation_level=None)
    old.executescript(
        "PRAGMA journal_mode = WAL; BEGIN;"
        "CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), spool_id TEXT NOT NULL,"
        " next_sequence INTEGER NOT NULL, dropped INTEGER NOT NULL);"
        "CREATE TABLE outbox (sequence INTEGER PRIMARY KEY, kind INTEGER NOT NULL,"
        " command_id TEXT, attempt INTEGER, payload BLOB NOT NULL);"
        "CREATE INDEX outbox_kind ON outbox (kind, sequence);"
        "CREATE TABLE journal (command_id TEXT NOT NULL, attempt INTEGER NOT NULL,"
        " step INTEGER NOT NULL, finish BLOB, finish_sequence INTEGER, change_time REAL NOT NULL,"
        " PRIMARY KEY (command_id, attempt));"
        "CREATE INDEX journal_time ON journal (change_time);"
        "INSERT INTO meta VALUES (1, 'old', 8, 4);"
        "INSERT INTO outbox VALUES (6, 1, NULL, NULL, 'report'), (7, 4, 'a', 1, 'finish');"
        "INSERT INTO journal VALUES ('a', 1, 3, 'finish', 7, 1e9);"
        "PRAGMA user_version = 1; COMMIT;"
    )
    old.close()
    path.with_suffix(".durable").touch()
    spool = make(max_bytes=MIB)
    assert (spool.state.spool_id, spool.state.next_sequence) == ("old", 8)
    assert counts(spool) == (4, 0, 0, 0)
    assert [(m.sequence, m.kind) for m in waiting(spool)] == [
        (6, MessageKind.REPORT),
        (7, MessageKind.FINISH),
    ]
    assert done(spool.accept(A, b"accepted")) is Verdict.FINISHED
    assert list(path.parent.glob("*.damaged-*")) == []
    spool.close()
    assert make().state.spool_id == "old"
