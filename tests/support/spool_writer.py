"""A process that does nothing but write into a spool, and says what is kept; it is to be killed.

For each thing that the spool has promised to keep it sends one line: the sequence and the payload's
first word, or "finished" and the command. Before it lets the spool forget messages it sends "ack"
and the sequence.
"""

from __future__ import annotations

import random
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

from neuron_sdk.spool import Attempt
from tests.support.spools import done, open_spool

MOST_AT_ONCE = 8


def write_until_killed(path: Path, pipe: Connection, run: int) -> None:
    """Appends, finishes and acknowledges in bursts, which share transactions. Never returns."""
    chance = random.Random(run)  # noqa: S311 - no secret
    spool = open_spool(path)

    def say(*words: object) -> None:
        pipe.send_bytes(" ".join(str(word) for word in words).encode())

    number = 0
    while True:
        burst: list[tuple[str, Future[int]]] = []
        word = ""
        for _ in range(chance.randint(1, MOST_AT_ONCE)):
            number += 1
            word = f"report-{run}-{number}"
            payload = word.encode() + b" " * chance.choice((1, 100, 10_000))
            append = chance.choice((spool.report, spool.report_errors))
            burst.append((word, append(payload)))
        if chance.random() < 0.3:
            of = Attempt(f"c-{run}-{number}", 1)
            spool.accept_and_start(of, b"accepted " + word.encode(), b"started " + word.encode())
            ended = spool.finish(of, b"finish " + word.encode())
            for word, future in burst:
                say(done(future), word)
            done(ended)
            say("finished", of.command_id)
        else:
            for word, future in burst:
                say(done(future), word)
        if chance.random() < 0.2:
            until = spool.state.next_sequence - chance.randint(1, 50)
            say("ack", until)
            spool.ack(until)
