"""What figures were taken on, and who else was using it meanwhile."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time

import psutil

from benchmarks.processes import cpu_s

WRITES = 200


def machine() -> str:
    """The machine in one line, with what one durable write costs on it."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}"
        f" {platform.release().split('-')[0]}, CPython {platform.python_version()},"
        f" fdatasync of 4 KiB {_sync_ms():.2f} ms"
    )


def _sync_ms() -> float:
    taken = []
    with tempfile.NamedTemporaryFile(prefix="fed-", buffering=0) as file:
        for _ in range(WRITES):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


class Others:
    """How much of the processors something else uses: not this process, nor what it has started.
    The kernel's own work for us counts as somebody else's.
    """

    def __init__(self) -> None:
        """Begins to count."""
        self._began = self._now()

    def percent(self) -> float:
        """Of all cores, since the beginning."""
        then, now = self._began, self._now()
        others_s = (now[1] - then[1]) - (now[2] - then[2])
        return max(0.0, 100 * others_s / ((now[0] - then[0]) * (psutil.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy_s = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # The guests' time is counted in the users' as well.
        busy_s -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return time.monotonic(), busy_s, cpu_s(psutil.Process())
