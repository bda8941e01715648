"""`federation` as a process: started, waited for, stopped or killed, started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.support.waiting import eventually_sync

FEDERATION = str(Path(sys.executable).parent / "federation")
"""The command, as it was installed."""

READY_WITHIN_S = 60.0
STOPPED_WITHIN_S = 30.0


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def clean_environment(**environment: str) -> dict[str, str]:
    """This process's environment without any setting of a server or of the console."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"DATABASE_URL", "ADMIN_API_KEY"} and not name.startswith("FEDERATION_")
    }
    return kept | environment


class FederationProcess:
    """A server at a port of its own, with its data in a folder. Not started yet."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.data_dir = folder / "data"
        self._arguments = arguments
        settings = {
            "FEDERATION_DATA_DIR": str(self.data_dir),
            "FEDERATION_PORT": str(self.port),
            "FEDERATION_METRICS_PORT": "0",
        }
        self.environment = clean_environment(**settings | environment)
        self._output = folder / f"output-{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        """All that it has printed, over all its starts."""
        return self._output.read_text("utf-8")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Its process since the last start."""
        assert self._process is not None, "it was never started"
        return self._process

    def launch(self) -> None:
        """Starts it and does not wait."""
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [FEDERATION, *self._arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def start(self) -> None:
        """Starts it and waits until it serves."""
        self.launch()
        eventually_sync(self._serves, within=READY_WITHIN_S, describe="the server serves")

    def says(self, text: str) -> str:
        """Waits until it has printed that; gives all that it has printed."""

        def said() -> bool:
            assert self.process.poll() is None or text in self.output, self.output
            return text in self.output

        eventually_sync(said, within=READY_WITHIN_S, describe=f"it prints {text!r}")
        return self.output

    def ended(self, within_s: float = STOPPED_WITHIN_S) -> int:
        """Waits for its end. Returns its exit status."""
        return self.process.wait(within_s)

    def stop(self) -> int:
        """SIGTERM. Returns its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.ended()

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.output}")
        with grpc.insecure_channel(self.address) as channel:
            try:
                health: Any = HealthStub(channel)  # its types do not know its calls
                answer = health.Check(HealthCheckRequest(), timeout=2)
            except grpc.RpcError:
                return False
        return bool(answer.status == HealthCheckResponse.SERVING)


@contextmanager
def federation_process(
    folder: Path, *arguments: str, **environment: str
) -> Iterator[FederationProcess]:
    """A server that serves for the block, and is killed at its end if it still runs.

    Args:
        folder: where its data and its output go; PostgreSQL's account must be able to enter it.
        arguments: of `federation`, for example "up", "--no-demo".
        environment: its settings.
    """
    server = FederationProcess(folder, *arguments, **environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()
