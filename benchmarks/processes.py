"""The processes of a benchmark: a federation, the echo, and what they cost."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
READY_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    address: str
    process: psutil.Process
    started_s: float
    """From the start of its process to its first answer."""
    admin_key: str = ""
    metrics_port: int = 0
    data_dir: Path = Path()
    database: psutil.Process | None = None
    """Its PostgreSQL, where that is not the server's own."""

    def cpu_s(self) -> float:
        """The processor time that it has used itself."""
        times = self.process.cpu_times()
        return times.user + times.system

    def database_cpu_s(self) -> float:
        """The processor time of its PostgreSQL, with processes that have ended."""
        if self.database is not None:
            return cpu_s(self.database)
        return sum(cpu_s(child) for child in self.process.children() if "postgres" in child.name())

    def rss_mb(self) -> float:
        """Its resident memory, in 10^6 bytes."""
        return self.process.memory_info().rss / 1e6


# What is measured is the work, not how it is turned away; and the light neurons come only once.
_NOBODY_TURNED_AWAY = {
    "FEDERATION_ADMISSION_RATE": "100000",
    "FEDERATION_ADMISSION_BURST": "100000",
    "FEDERATION_REGISTER_RATE": "100000",
}


@contextmanager
def federation(*, demo: bool = False, **settings: str) -> Iterator[Served]:
    """`federation up` in a folder of its own, on free ports, which takes on all who come."""
    folder = Path(tempfile.mkdtemp(prefix="fed-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
    try:
        process, served = start(folder, free_ports(), _NOBODY_TURNED_AWAY | settings, demo=demo)
        try:
            yield served
        finally:
            process.terminate()
            process.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(
    folder: Path, ports: tuple[int, int], settings: Mapping[str, str], *, demo: bool = False
) -> tuple[subprocess.Popen[str], Served]:
    """Starts `federation up` with its data in the folder, and waits until it serves."""
    port, metrics_port = ports
    environment = os.environ | {
        "FEDERATION_DATA_DIR": str(folder / "data"),
        "FEDERATION_PORT": str(port),
        "FEDERATION_METRICS_PORT": str(metrics_port),
        "FEDERATION_LOG_LEVEL": "WARNING",
        "ADMIN_API_KEY": secrets.token_urlsafe(32),
    }
    environment.pop("DATABASE_URL", None)
    environment |= settings
    command = [str(BIN / "federation"), "up", "--demo" if demo else "--no-demo"]
    began = time.monotonic()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        _wait_for(process, "federation serves", folder / "log")
    except BaseException:
        process.terminate()
        process.wait(60)
        raise
    return process, Served(
        f"127.0.0.1:{port}",
        psutil.Process(process.pid),
        time.monotonic() - began,
        environment["ADMIN_API_KEY"],
        metrics_port,
        folder / "data",
    )


@contextmanager
def echo() -> Iterator[Served]:
    """The bare echo server."""
    command = [sys.executable, "-m", "benchmarks.echo"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = _wait_for(process, "").strip()
        yield Served(f"127.0.0.1:{port}", psutil.Process(process.pid), time.monotonic() - began)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def started(
    command: Sequence[str], log: Path, *, ready: str = "", **environment: str
) -> Iterator[psutil.Process]:
    """A process that writes to the file `log`; yields it when that holds the text `ready`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while ready not in log.read_text("utf-8"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} is not ready:\n{log.read_text('utf-8')[-4000:]}")
            time.sleep(0.02)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def cpu_s(process: psutil.Process) -> float:
    """The processor time of a process and of all that it has started, also of what has ended."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _wait_for(process: subprocess.Popen[str], text: str, log: Path | None = None) -> str:
    """The first line that the process prints with that text."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    said = log.read_text("utf-8")[-4000:] if log is not None else ""
    raise RuntimeError(f"the process ended with {process.wait()}\n{said}")


def free_ports() -> tuple[int, int]:
    """Two ports that nobody has."""
    import socket  # noqa: PLC0415 - used here alone

    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
