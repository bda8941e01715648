"""The spool of a process that is killed at any instant: what it had promised to keep is kept."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

from neuron_sdk.spool import Attempt, Verdict
from tests.support.spool_writer import write_until_killed
from tests.support.spools import done, open_spool, waiting

KILLS = 40
# Forked by a process of one thread, which has imported everything: started in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.spool_writer"])
NAME = "spool.sqlite3"


class Promised:
    """What the processes said, over all of them."""

    def __init__(self) -> None:
        self.kept: dict[int, str] = {}
        self.finished: list[str] = []
        self.acknowledged = 0

    def note(self, line: str) -> None:
        match line.split():
            case ["ack", until]:
                self.acknowledged = max(self.acknowledged, int(until))
            case ["finished", command_id]:
                self.finished.append(command_id)
            case [sequence, word]:
                assert int(sequence) not in self.kept, "a sequence was given twice"
                self.kept[int(sequence)] = word


def killed(path: Path, run: int, after: int) -> list[str]:
    """Lets a process write and kills it as soon as it has said so many lines. Returns all."""
    reading, writing = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=write_until_killed, args=(path, writing, run))
    process.start()
    writing.close()
    with reading:
        lines = [reading.recv_bytes().decode() for _ in range(after)]
        process.kill()
        with suppress(EOFError, OSError):  # the last one may be sent in part
            while True:
                lines.append(reading.recv_bytes().decode())
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return lines


def test_what_was_promised_is_there_after_sigkill_in_order_and_once(tmp_path: Path) -> None:
    chance = random.Random(4)  # noqa: S311 - no secret
    promised = Promised()
    state = tmp_path / "state"
    for run in range(KILLS):
        for line in killed(state / NAME, run, after=chance.randint(0, 40)):
            promised.note(line)
        if not state.exists():
            continue  # it was killed before it had made its folder
        # A copy, so that the next process begins with what this one left.
        copy = tmp_path / f"copy-{run}"
        shutil.copytree(state, copy)
        spool = open_spool(copy / NAME)
        found = waiting(spool)
        words = {message.sequence: message.payload.decode().strip() for message in found}
        assert list(words) == sorted(words)
        assert Counter(words.values()).most_common(1)[0][1] == 1
        for sequence, word in promised.kept.items():
            if sequence > promised.acknowledged:
                assert words[sequence] == word
            else:
                assert words.get(sequence, word) == word
        assert spool.state.next_sequence > max(promised.kept, default=0)
        for command_id in promised.finished[-20:]:
            assert done(spool.accept(Attempt(command_id, 1), b"again")) is Verdict.FINISHED
        assert not spool.state.in_memory
        spool.close()
        assert list(copy.glob("*.damaged-*")) == []
        shutil.rmtree(copy)
    assert promised.kept
    assert promised.finished
