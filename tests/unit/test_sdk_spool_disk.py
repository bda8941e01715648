"""The spool's file on a disk that is really full, and a file that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron_sdk.spool import Attempt, Spool, Verdict
from neuron_sdk.spool_disk import MOST_SET_ASIDE
from tests.support.disk import SmallDisk, mountable, small_disk
from tests.support.spools import done, open_spool, payloads, waiting
from tests.support.waiting import eventually_sync

A = Attempt("a", 1)
Make = Callable[..., Spool]
NAME = "spool.sqlite3"

needs_small_disk = pytest.mark.skipif(
    not mountable(), reason="a small file system cannot be mounted here: it takes Linux and root"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small", megabytes=2) as disk:
        yield disk


@pytest.fixture
def make(disk: SmallDisk) -> Iterator[Make]:
    """Opens the spool on the small disk, which is free again at the end."""
    made: list[Spool] = []

    def open_one(**settings: Any) -> Spool:
        spool = open_spool(disk.folder / NAME, **settings)
        made.append(spool)
        return spool

    yield open_one
    for spool in made:
        spool.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sdk.spool._DISK_RETRY_S", 0.02)


def fill_up(spool: Spool) -> int:
    """Reports until the disk takes no more. Returns how many."""
    count = 0
    while not spool.state.in_memory:
        done(spool.report(b"x" * 10_000))
        count += 1
    return count


def on_disk_again(spool: Spool) -> None:
    eventually_sync(lambda: not spool.state.in_memory, describe="the spool on disk")


@needs_small_disk
def test_a_spool_on_a_full_disk_goes_on_in_memory_and_then_on_the_disk_with_all_it_holds(
    make: Make, disk: SmallDisk, impatient: None
) -> None:
    spool = make()
    done(spool.accept(A, b"accepted"))
    disk.fill()
    count = fill_up(spool)
    done(spool.finish(A, b"finish"))
    kept = waiting(spool)
    assert len(kept) == count + 2, "nothing is lost"
    done(spool.ack(kept[0].sequence))
    disk.free()
    on_disk_again(spool)
    spool.close()
    again = make()
    assert waiting(again) == kept[1:]
    assert done(again.accept(A, b"accepted")) is Verdict.FINISHED


@needs_small_disk
def test_a_process_that_starts_on_a_full_disk_has_what_the_one_before_left(
    make: Make, disk: SmallDisk, impatient: None
) -> None:
    first = make()
    done(first.report(b"report"))
    done(first.accept_and_start(A, b"accepted", b"started"))
    first.close()
    disk.fill()
    spool = make()
    assert spool.state.in_memory
    assert spool.state.spool_id == first.state.spool_id
    held = [b"report", b"accepted", b"started", b"interrupted a"]
    assert payloads(spool) == held
    disk.free()
    on_disk_again(spool)
    spool.close()
    assert payloads(make()) == held


@needs_small_disk
def test_a_process_that_starts_on_a_full_disk_after_a_killed_one_has_what_that_one_committed(
    make: Make, disk: SmallDisk
) -> None:
    first = make()
    for number in range(20):
        done(first.report(b"%d" % number))
    # As SIGKILL leaves it: nothing of the WAL is in the file yet.
    copies = {file.name: file.read_bytes() for file in disk.folder.iterdir()}
    assert copies[f"{NAME}-wal"]
    first.close()
    for name, content in copies.items():
        (disk.folder / name).write_bytes(content)
    disk.fill()
    spool = make()
    done(spool.report(b"x" * 100_000))
    assert spool.state.in_memory
    assert payloads(spool)[:-1] == [b"%d" % number for number in range(20)]
    disk.free()


@needs_small_disk
def test_a_neurons_first_start_on_a_full_disk_works_in_memory(
    make: Make, disk: SmallDisk, impatient: None
) -> None:
    disk.fill()
    spool = make()
    assert spool.state.in_memory
    done(spool.report(b"1"))
    disk.free()
    on_disk_again(spool)
    spool.close()
    assert payloads(make()) == [b"1"]


@needs_small_disk
def test_processes_that_follow_each_other_on_a_full_disk_never_give_a_sequence_twice(
    make: Make, disk: SmallDisk
) -> None:
    first = make()
    done(first.report(b"0"))
    first.close()
    given = [1]
    for second in range(4):
        disk.fill()
        spool = make(now=lambda at=1e9 + second: at)
        given += [done(spool.report(b"x" * 1000)) for _ in range(10)]
        assert spool.state.in_memory
        # Killed: what it holds in memory is gone, and the file is as it was.
        file = (disk.folder / NAME).read_bytes()
        disk.free()
        spool.close()
        (disk.folder / NAME).write_bytes(file)
        (disk.folder / NAME).with_suffix(".durable").unlink(missing_ok=True)
    assert given == sorted(set(given))


@needs_small_disk
def test_a_damaged_file_on_a_full_disk_is_set_aside_too(
    make: Make, disk: SmallDisk, impatient: None
) -> None:
    make().close()
    (disk.folder / NAME).write_bytes(b"this is no database" * 1000)
    disk.fill()
    spool = make()
    assert spool.state.in_memory
    assert len(list(disk.folder.glob("*.damaged-*"))) == 1
    done(spool.report(b"works"))
    disk.free()
    on_disk_again(spool)
    assert payloads(spool) == [b"works"]


@needs_small_disk
def test_a_file_that_is_damaged_while_the_spool_is_in_memory_does_not_keep_it_there(
    make: Make, disk: SmallDisk, impatient: None
) -> None:
    spool = make()
    disk.fill()
    count = fill_up(spool)
    (disk.folder / NAME).write_bytes(b"")
    (disk.folder / f"{NAME}-wal").unlink(missing_ok=True)
    (disk.folder / NAME).write_bytes(b"no database")
    disk.free()
    on_disk_again(spool)
    assert len(waiting(spool)) == count
    assert len(list(disk.folder.glob("*.damaged-*"))) == 1


def test_of_files_that_were_set_aside_only_the_newest_stay(tmp_path: Path) -> None:
    path = tmp_path / NAME
    for number in range(MOST_SET_ASIDE + 2):
        path.write_bytes(b"damage %d" % number * 1000)
        spool = open_spool(path)
        assert done(spool.report(b"works")) == 1
        spool.close()
    aside = sorted(tmp_path.glob("*.damaged-*"))
    heads = [file.read_bytes()[:8] for file in aside]
    assert heads == [b"damage %d" % number for number in range(2, MOST_SET_ASIDE + 2)]
