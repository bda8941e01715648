"""Neurons of the SDK, in the test's own process or in others, against a fake federation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from neuron_sdk import Neuron, NeuronConfig
from neuron_sdk.backoff import Backoff
from neuron_sdk.testing import CommandOutcome, FakeFederation

N = "n-1"
ROOT = Path(__file__).resolve().parents[2]


class Bench:
    """`with Bench(tmp_path) as bench:`: a federation, and neurons that are stopped at the end."""

    def __init__(self, folder: Path) -> None:
        self.federation = FakeFederation(heartbeat_interval=0.05)
        self._folder = folder
        self._started: list[Neuron] = []

    def neuron(self, neuron_id: str = N, **arguments: Any) -> Neuron:
        """A neuron, to be decorated."""
        config = NeuronConfig(
            state_dir=self._folder / neuron_id,
            federation_url=self.federation.url,
            metrics_enabled=False,
            stop_grace=arguments.pop("stop_grace", 1.0),
        )
        return Neuron(neuron_id, type="worker", config=config, **arguments)

    def start(self, neuron: Neuron) -> None:
        """Start it, and wait for its session."""
        neuron_id = neuron.settings().neuron_id
        known = self.federation.neurons.get(neuron_id)
        sessions = len(known.hellos) if known else 0
        neuron.start()
        self._started.append(neuron)
        self.federation.wait_connected(neuron_id, sessions=sessions + 1)

    def finishes(self, command_id: str) -> int:
        """How often the neuron has said how a command ended."""
        return sum(u.HasField("finished") for u in self.federation.updates_of(command_id))

    def wait_kinds(self, command_id: str, *kinds: str) -> None:
        """Wait until the neuron has said these of a command, in this order."""
        self.federation.wait_for(
            lambda: tuple(self.kinds(command_id)) == kinds, describe=f"{kinds} of {command_id}"
        )

    def kinds(self, command_id: str) -> list[str]:
        """What the neuron has said of a command."""
        return [u.WhichOneof("update") or "" for u in self.federation.updates_of(command_id)]

    def __enter__(self) -> Self:
        self.federation.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for neuron in self._started:
            neuron.stop()
        self.federation.stop()


def code(outcome: CommandOutcome) -> str:
    """The outcome's error code; fails if it has none."""
    assert outcome.error is not None, outcome
    return outcome.error.code


def be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour at a pace that tests can wait for."""
    monkeypatch.setenv("REFUSAL_RETRY", "0.2")
    monkeypatch.setattr("neuron_sdk.session.Backoff", lambda: Backoff(first_s=0.02, most_s=0.2))
    monkeypatch.setattr("neuron_sdk.ending.ASKED_S", 0.3)
    monkeypatch.setattr("neuron_sdk.ending.INTERRUPTED_S", 0.6)
    monkeypatch.setattr("neuron_sdk.ending.KILLED_S", 20.0)  # a busy host buries slowly


class Processes:
    """`with Processes(url, folder) as processes:`: neurons as processes, killed at the end.

    They run in `folder`, with one STATE_DIR in it.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._settings = {
            "FEDERATION_URL": url,
            "STATE_DIR": str(folder / "state"),
            "METRICS_ENABLED": "false",
            "STOP_GRACE": "0.3",
            "PYTHONPATH": str(ROOT),
        }
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def spawn(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start one; `arguments` are Python's."""
        with (self._folder / "output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **self._settings, **environment},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    @property
    def output(self) -> str:
        """All that they have printed."""
        return (self._folder / "output").read_text("utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._started:
            process.kill()
            process.wait()
