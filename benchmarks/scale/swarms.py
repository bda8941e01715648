"""Processes of returning neurons, and what they say of themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.processes import ROOT, cpu_s

LOOK_EACH_S = 0.25


class Swarms:
    """The neurons of a few processes, all of them connected once."""

    def __init__(self, running: list[subprocess.Popen[str]], neurons: int) -> None:
        """`running` have said that they are ready."""
        self.neurons = neurons
        self.running = running

    def look(self) -> Counter[str]:
        """The counts of all processes, added up; `returning.py` says which there are."""
        total: Counter[str] = Counter()
        for line in self._ask("look"):
            total.update(json.loads(line))
        return total

    def cpu_s(self) -> float:
        """The processor time of all processes so far."""
        return sum(cpu_s(psutil.Process(process.pid)) for process in self.running)

    def say(self, word: str) -> None:
        """Tells them all to `report`, to make `no-reports`, or `silence`."""
        self._ask(word)

    def drained(self, within_s: float) -> float | None:
        """Seconds until every report is acknowledged; None if that takes longer than `within_s`."""
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            if not self.look()["waiting"]:
                return time.monotonic() - began
            time.sleep(LOOK_EACH_S)
        return None

    def _ask(self, word: str) -> list[str]:
        for process in self.running:
            assert process.stdin is not None
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
        return [_line(process) for process in self.running]


def returning(address: str, tokens: Path, *options: str) -> list[str]:
    """The command of a process of returning neurons."""
    module = "benchmarks.scale.returning"
    return [sys.executable, "-m", module, address, "--tokens", str(tokens), *options]


def reporting(address: str, tokens: Path, interval_s: float, report_s: float) -> list[str]:
    """The same with so many seconds between heartbeats, and between reports."""
    intervals = ("--interval", str(interval_s), "--report", str(report_s))
    return returning(address, tokens, *intervals)


@contextmanager
def swarms(command: list[str], *, neurons: int, processes: int, first: int = 0) -> Iterator[Swarms]:
    """So many of the registered neurons, from the `first` on, spread over so many processes."""
    each = -(-neurons // processes)
    running = []
    try:
        for begin in range(first, first + neurons, each):
            count = min(each, first + neurons - begin)
            running.append(
                subprocess.Popen(
                    [*command, "--first", str(begin), "--count", str(count)],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in running:
            if _line(process) != "ready":
                raise RuntimeError("a swarm did not connect")
        yield Swarms(running, neurons)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if line := process.stdout.readline():
        return line.strip()
    raise RuntimeError(f"a swarm ended with {process.wait()}")
