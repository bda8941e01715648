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
from neuron_sdk.payload import MAX_DETAILS_BYTES, MAX_DETAILS_DEPTH, plain_object
from neuron_sdk.spool_store import Attempt, Execution, Verdict

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
    max_attempts: int = 1,
    checkpoint: Mapping[str, Any] | None = None,
    cancel: asyncio.Event | None = None,
    cancel_reason: str = "",
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
        max_attempts: the same. What fails is not tried again here; FakeFederation does that.
        checkpoint: what an earlier attempt is to have noted.
        cancel: cancels the command once it is set, by `on_progress` for example.
        cancel_reason: why; the handler sees it.
        on_progress: gets the progress that would be sent, in this loop.

    Returns:
        How it ended. Nothing that a handler does raises here.

    Raises:
        ValueError: the data or the checkpoint cannot be sent as JSON.
    """
    sent = plain_object(data or {}, max_bytes=_MAX_DATA_BYTES, max_depth=_MAX_DATA_DEPTH)
    noted = None
    if checkpoint is not None:
        noted = plain_object(checkpoint, max_bytes=MAX_DETAILS_BYTES, max_depth=MAX_DETAILS_DEPTH)
    of = Attempt(command_id, attempt)
    notes = _Notes(on_progress or (lambda _: None))
    executor = Executor(neuron.commands, notes, max_concurrent=1)
    executor.open(asyncio.get_running_loop())
    if cancel is not None and cancel.is_set():
        executor.cancel(of, cancel_reason)
    executor.deliver(
        Delivery(
            of=of,
            type=type,
            data=from_struct(to_struct(sent)),  # numbers change on the way
            run_timeout=run_timeout,
            checkpoint=None if noted is None else from_struct(to_struct(noted)),
            max_attempts=max_attempts,
        )
    )
    if cancel is not None:
        wanted = asyncio.create_task(cancel.wait(), name="cancel")
        ends: list[asyncio.Future[Any]] = [wanted, notes.outcome]
        await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        if wanted.done():
            executor.cancel(of, cancel_reason)
        wanted.cancel()
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
    """The executor's notes of one attempt: its outcome, and nothing else is kept."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self.outcome: asyncio.Future[CommandOutcome] = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        self._accepted = False

    async def accept(self, of: Attempt, execution: Execution) -> Verdict:
        return await self.accept_and_start(of)

    async def accept_and_start(self, of: Attempt) -> Verdict:
        if self.outcome.done():
            return Verdict.FINISHED
        self._accepted = True
        return Verdict.NEW

    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict:
        if self._accepted:
            return Verdict.FINISHED if self.outcome.done() else Verdict.RUNNING
        await self.finish(of, outcome)
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
        if not self.outcome.done():
            self.outcome.set_result(outcome)
