"""For the tests of a service: run one of its commands with no server, or a whole neuron against a
federation that does what the test wants.

    outcome = await run_command(neuron, "run_task", {"input_source": "s3://…"})
    assert outcome.response == {"processed_records": 100}

    with FakeFederation() as federation:
        ...  # FEDERATION_URL=federation.url
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from neuron_sdk.context import Progress
from neuron_sdk.convert import from_struct, to_struct
from neuron_sdk.delivery import Delivery
from neuron_sdk.executor import Executor
from neuron_sdk.fake_federation import FakeFederation, FakeNeuron
from neuron_sdk.neuron import Neuron
from neuron_sdk.outcome import CommandFault, CommandOutcome, FinalState
from neuron_sdk.payload import plain_object
from neuron_sdk.spool_store import Attempt, Verdict

__all__ = [
    "CommandFault",
    "CommandOutcome",
    "FakeFederation",
    "FakeNeuron",
    "FinalState",
    "Progress",
    "run_command",
    "run_command_sync",
]

_MAX_DATA_BYTES = 256 * 2**10
_MAX_DATA_DEPTH = 32


async def run_command(
    neuron: Neuron,
    type: str,  # noqa: A002 - the contract's word
    data: Mapping[str, Any] | None = None,
    *,
    run_timeout: float | None = None,
    command_id: str = "test-command",
    attempt: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> CommandOutcome:
    """Carry out a command in this loop as a running neuron would: the same conversion, limits and
    errors, and no server.

    Args:
        neuron: the neuron; it need not be started.
        type: the command's type.
        data: its parameters, as JSON.
        run_timeout: seconds that it may run.
        command_id: what the handler sees in its context.
        attempt: the same.
        on_progress: gets the progress that would be sent.

    Returns:
        How it ended. Nothing that a handler does raises here.

    Raises:
        ValueError: the data cannot be sent as JSON.
    """
    sent = plain_object(data or {}, max_bytes=_MAX_DATA_BYTES, max_depth=_MAX_DATA_DEPTH)
    notes = _Notes(on_progress or (lambda _: None))
    executor = Executor(neuron.commands, notes, max_concurrent=1)
    executor.open(asyncio.get_running_loop())
    executor.deliver(
        Delivery(
            of=Attempt(command_id, attempt),
            type=type,
            data=from_struct(to_struct(sent)),  # numbers change on the way
            run_timeout=run_timeout,
        )
    )
    return await notes.outcome


def run_command_sync(
    neuron: Neuron,
    type: str,  # noqa: A002 - the contract's word
    data: Mapping[str, Any] | None = None,
    **options: Any,
) -> CommandOutcome:
    """As `run_command`, for tests that are no coroutines."""
    return asyncio.run(run_command(neuron, type, data, **options))


class _Notes:
    """Where the executor's notes go: nowhere."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.outcome: asyncio.Future[CommandOutcome] = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress

    async def accept(self, of: Attempt) -> Verdict:
        return Verdict.NEW

    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict:
        self.outcome.set_result(outcome)
        return Verdict.NEW

    async def start(self, of: Attempt) -> None:
        return

    def progress(self, of: Attempt, progress: Progress) -> Future[None]:
        self._on_progress(progress)
        kept: Future[None] = Future()
        kept.set_result(None)
        return kept

    async def carry_over(self, of: Attempt) -> None:
        return

    async def finish(self, of: Attempt, outcome: CommandOutcome) -> None:
        self.outcome.set_result(outcome)
