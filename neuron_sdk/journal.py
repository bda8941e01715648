"""A command's steps, written down before they count: each one is a note and a message at once.

Stands between the executor, which knows no wire format, and the spool, which knows nothing else.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from neuron_sdk.context import Progress
from neuron_sdk.convert import accepted_update, finish_update, progress_update
from neuron_sdk.offload import offload
from neuron_sdk.outcome import CommandOutcome, failed, not_started
from neuron_sdk.payload import is_small
from neuron_sdk.spool import Attempt, Execution, Spool, Verdict

T = TypeVar("T")


class Journal:
    """The journal of one neuron. Every method may be called by any thread."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def accept(self, of: Attempt, execution: Execution) -> Verdict:
        """Note that an attempt will run, unless it is known; returns when it is on disk."""
        return await _done(self._spool.accept(of, accepted_update(of), execution))

    async def accept_and_start(self, of: Attempt) -> Verdict:
        """Note that an attempt runs at once, unless it is known. Its handler must not start before
        this has returned.
        """
        first = progress_update(of, Progress(0.0, ""))
        return await _done(self._spool.accept_and_start(of, accepted_update(of), first))

    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict:
        """Note that an attempt will not run, unless it is known."""
        return await _done(self._spool.reject(of, finish_update(of, outcome)))

    async def start(self, of: Attempt) -> None:
        """Note that the handler starts now. It must not start before this has returned."""
        await _done(self._spool.start(of, progress_update(of, Progress(0.0, ""))))

    def progress(self, of: Attempt, progress: Progress) -> Future[None]:
        """Pass on how far the handler is; the answer is done when it is on disk."""
        update = progress_update(of, progress)
        if progress.checkpoint is None:
            return self._spool.progress(of, update)
        return self._spool.checkpoint(of, update)

    async def carry_over(self, of: Attempt) -> None:
        """Note that the next process of this neuron will finish a started attempt."""
        await _done(self._spool.carry_over(of))

    async def finish(self, of: Attempt, outcome: CommandOutcome) -> None:
        """Note how an attempt ended."""
        try:
            if outcome.response is None or is_small(outcome.response):
                payload = finish_update(of, outcome)
            else:  # it takes a while to encode: not on the loop that sends heartbeats
                payload = await offload(lambda: finish_update(of, outcome))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the command must end
            why = f"the handler's answer cannot be encoded: {type(error).__name__}"
            payload = finish_update(of, failed("INVALID_RESPONSE", why))
        await _done(self._spool.finish(of, payload))


def interrupted_update(of: Attempt) -> bytes:
    """The finish of an attempt that died with its process."""
    return finish_update(
        of, failed("INTERRUPTED", "the neuron's process ended while the command was running")
    )


def not_started_update(of: Attempt) -> bytes:
    """The finish of an attempt that its process did not start, and that never comes again."""
    return finish_update(of, not_started("the neuron's process ended before it started"))


def refused_update(detail: str, of: Attempt) -> bytes:
    """The finish in the place of one that the federation did not take."""
    return finish_update(
        of, failed("INVALID_RESPONSE", f"the federation did not take the result: {detail}")
    )


async def _done(future: Future[T]) -> T:
    # Shielded: what is written down is written down, also if whoever asked was cancelled.
    return await asyncio.shield(asyncio.wrap_future(future))
