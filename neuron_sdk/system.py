"""What the host and the neuron's process look like now, by psutil.

In a container or on macOS some of these questions are refused; the answer is then 0, never an
exception. Every value lies within the contract's range. A probe may be asked by several threads.
"""

from __future__ import annotations

import os
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

_MAX_UINT32 = 2**32 - 1
_MAX_UINT64 = 2**64 - 1
_MAX_PROCESS_CPU = 1_000_000.0
_MAX_HOSTNAME, _MAX_OS, _MAX_ARCHITECTURE = 256, 128, 64

# Two readers (heartbeat and Prometheus) may ask right after one another; over a shorter span the
# processor's use is noise, so the value before is given again.
_SHORTEST_SPAN = 0.5

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class SystemSample:
    """The host's load: the fields of SystemMetrics in the contract. 0 where it cannot be known."""

    cpu_percent: float
    memory_percent: float
    memory_used_bytes: int
    disk_percent: float
    disk_used_bytes: int
    network_received_bytes: int
    network_sent_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """The neuron's process: the fields of ProcessInfo in the contract."""

    pid: int
    threads: int
    rss_bytes: int
    open_files: int
    cpu_percent: float
    """Of one core: may exceed 100."""


@dataclass(frozen=True, slots=True)
class HostSample:
    """The neuron's host: the fields of HostInfo in the contract."""

    hostname: str
    os: str
    architecture: str
    cpu_count: int
    memory_bytes: int


class SystemProbe:
    """Asks the operating system. Processor use is over the time since the sample before."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` answers seconds that never go back."""
        self._process = psutil.Process()
        # Primed here: the first sample tells the use since now, not since the host started.
        self._host_use = _Use(_host_seconds, clock)
        self._process_use = _Use(lambda: (_process_seconds(self._process), clock()), clock)

    def sample(self, disk_path: Path) -> SystemSample:
        """The host's load; `disk_path` is on the disk that matters to the neuron."""
        memory = _ask(psutil.virtual_memory)
        disk = _ask(lambda: psutil.disk_usage(str(disk_path)))
        network = _ask(psutil.net_io_counters)
        return SystemSample(
            cpu_percent=_within(self._host_use.percent(), 100.0),
            memory_percent=_within(memory.percent if memory else 0.0, 100.0),
            memory_used_bytes=_within(memory.used if memory else 0, _MAX_UINT64),
            disk_percent=_within(disk.percent if disk else 0.0, 100.0),
            disk_used_bytes=_within(disk.used if disk else 0, _MAX_UINT64),
            network_received_bytes=_within(network.bytes_recv if network else 0, _MAX_UINT64),
            network_sent_bytes=_within(network.bytes_sent if network else 0, _MAX_UINT64),
        )

    def process(self) -> ProcessSample:
        """The neuron's own process."""
        memory = _ask(self._process.memory_info)
        return ProcessSample(
            pid=os.getpid(),
            threads=_within(_ask(self._process.num_threads) or 0, _MAX_UINT32),
            rss_bytes=_within(memory.rss if memory else 0, _MAX_UINT64),
            open_files=_within(_ask(self._process.num_fds) or 0, _MAX_UINT32),
            cpu_percent=_within(self._process_use.percent(), _MAX_PROCESS_CPU),
        )

    def host(self) -> HostSample:
        """The neuron's host, which hardly ever changes."""
        memory = _ask(psutil.virtual_memory)
        return HostSample(
            hostname=(_ask(socket.gethostname) or "")[:_MAX_HOSTNAME],
            os=f"{platform.system()} {platform.release()}".strip()[:_MAX_OS],
            architecture=platform.machine()[:_MAX_ARCHITECTURE],
            cpu_count=_within(os.cpu_count() or 0, _MAX_UINT32),
            memory_bytes=_within(memory.total if memory else 0, _MAX_UINT64),
        )


class _Use:
    """How much of the time that could be used was used since the last asking, in percent.

    psutil's own `cpu_percent()` remembers the last call for each thread, or for each process
    object without a lock; this one is asked by whichever thread serves a request.
    """

    def __init__(
        self, read: Callable[[], tuple[float, float] | None], clock: Callable[[], float]
    ) -> None:
        """`read` answers (seconds used, seconds there were), both growing."""
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._percent: float | None = None
        self._asked = clock()
        self._last = _ask(read)

    def percent(self) -> float:
        with self._lock:
            now = self._clock()
            if self._percent is None or now - self._asked >= _SHORTEST_SPAN:
                self._percent = self._percent_since_last(_ask(self._read))
                self._asked = now
            return self._percent

    def _percent_since_last(self, read: tuple[float, float] | None) -> float:
        last, self._last = self._last, read
        if read is None or last is None:
            return 0.0
        used, there_was = read[0] - last[0], read[1] - last[1]
        return 100.0 * used / there_was if there_was > 0 else 0.0


def _host_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()
    # Linux counts a guest's time in user and nice as well.
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    there_was = sum(times) - guest
    waiting = times.idle + getattr(times, "iowait", 0.0)
    return there_was - waiting, there_was


def _process_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _ask(question: Callable[[], T]) -> T | None:
    """The answer, or None where the system refuses it or does not know the question."""
    try:
        return question()
    except (psutil.Error, OSError, RuntimeError, NotImplementedError, ValueError, AttributeError):
        return None


def _within(value: Number, most: Number) -> Number:
    """`value`, not below 0 and not above `most`."""
    return min(max(value, type(value)(0)), most)
