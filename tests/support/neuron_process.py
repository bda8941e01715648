"""A neuron of the real SDK as a process: started, stopped or killed, started again, and asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import clean_environment, free_port
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
STOPPED_WITHIN_S = 30.0
_OF_A_NEURON = ("NEURON_", "HEARTBEAT_", "ANALYTICS_", "LOG_", "METRICS_", "PROCESSOR_")


class NeuronProcess:
    """A neuron with a STATE_DIR and pages of its own. Not started yet."""

    def __init__(self, folder: Path, address: str, *arguments: str, **environment: str) -> None:
        """`arguments` are Python's: a script, or `-m` and a module."""
        self.state_dir = folder / "state"
        self.http_port = free_port()
        self._arguments = arguments
        self._folder = folder
        kept = {
            name: value
            for name, value in clean_environment().items()
            if not name.startswith(_OF_A_NEURON)
            and name not in {"ENROLLMENT_TOKEN", "STATE_DIR", "STOP_GRACE"}
        }
        self.environment = {
            **kept,
            "FEDERATION_URL": address,
            "STATE_DIR": str(self.state_dir),
            "METRICS_PORT": str(self.http_port),
            "HEARTBEAT_INTERVAL": "1",
            "ANALYTICS_INTERVAL": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self._output = folder / "output"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        """All that it has printed, over all its starts."""
        return self._output.read_text("utf-8") if self._output.exists() else ""

    @property
    def logs(self) -> list[dict[str, Any]]:
        """Its output's whole lines as JSON; fails if one is none."""
        lines = self.output.split("\n")[:-1]
        return [json.loads(line) for line in lines]

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Its process since the last start."""
        assert self._process is not None, "it was never started"
        return self._process

    @property
    def token(self) -> str:
        """What it shows the federation."""
        return (self.state_dir / "token").read_text("ascii").strip()

    def logged(self, action: str) -> list[dict[str, Any]]:
        """Every log line with that action."""
        return [line for line in self.logs if line.get("action") == action]

    def complaints(self) -> list[dict[str, Any]]:
        """Every log line that an operator is to read."""
        return [line for line in self.logs if line["level"] not in {"debug", "info"}]

    def start(self, **environment: str) -> None:
        """Starts it, and does not wait."""
        self.environment |= environment
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._arguments],
                cwd=self._folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    async def stop(self) -> int:
        """SIGTERM. Returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Waits for its end. Returns its exit status."""
        # In a thread: what it needs for its end may run in the test's loop.
        return await asyncio.to_thread(self.process.wait, STOPPED_WITHIN_S)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOPPED_WITHIN_S)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    async def page(self, path: str) -> tuple[int, str]:
        """The status and the body of one of its pages; waits until somebody answers there."""
        url = f"http://127.0.0.1:{self.http_port}{path}"

        async def get() -> tuple[int, str] | None:
            return await asyncio.to_thread(_get, url)

        return await eventually(get, within=20, describe=f"{url} answers")

    async def health(self) -> tuple[int, dict[str, Any]]:
        """What /health says."""
        status, body = await self.page("/health")
        return status, json.loads(body)


def _get(url: str) -> tuple[int, str] | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own http
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return None


@contextmanager
def neuron_process(
    folder: Path, address: str, *arguments: str, **environment: str
) -> Iterator[NeuronProcess]:
    """A neuron that was started, and is killed at the block's end if it still runs."""
    folder.mkdir(exist_ok=True)
    neuron = NeuronProcess(folder, address, *arguments, **environment)
    try:
        neuron.start()
        yield neuron
    finally:
        neuron.kill()


def exists(pid: int) -> bool:
    """Whether a process has that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
