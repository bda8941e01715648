"""How a run ends before its time: it is asked, interrupted, killed; and what its command becomes.

The reasons differ (somebody cancelled it, its time is over, the neuron stops), the way is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neuron_sdk.outcome import CommandOutcome, FinalState, failed, fault
from neuron_sdk.runs import Run

ASKED_S = 3.0
"""How long a handler may clean up after it was asked to end."""
INTERRUPTED_S = 2.0
"""How long after something was raised inside it."""
KILLED_S = 2.0
"""How long a killed process may take to vanish."""
LONGEST_S = ASKED_S + INTERRUPTED_S + KILLED_S

_STILL_RUNS = "its handler was asked to end, interrupted, and still runs"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a run is to end, and what that makes of its command."""

    reason: str
    """What the handler sees as ctx.cancel_reason."""
    obeyed: CommandOutcome
    """If the handler gave up."""
    ignored: CommandOutcome
    """If it still runs after all."""
    too_late: bool = False
    """Its own answer or error counts no more."""

    def of(self, outcome: CommandOutcome) -> CommandOutcome:
        """What becomes of the command if the handler ended like that."""
        if self.too_late or outcome.state is FinalState.CANCELLED:
            return self.obeyed
        return outcome


def cancelled(reason: str) -> Ending:
    """Somebody cancelled the command."""
    why = f": {reason}" if reason else ""
    return Ending(
        reason=reason or "cancelled",
        obeyed=CommandOutcome(FinalState.CANCELLED),
        ignored=failed("CANCEL_IGNORED", f"it was cancelled{why}; {_STILL_RUNS}"),
    )


def stopping(reason: str) -> Ending:
    """The neuron ends."""
    return Ending(
        reason=reason,
        obeyed=failed("INTERRUPTED", f"it was interrupted: {reason}"),
        ignored=failed("INTERRUPTED", f"it was interrupted: {reason}; {_STILL_RUNS}"),
    )


def overdue(run_timeout: float | None) -> Ending:
    """The run has lasted for its run_timeout."""
    reason = f"it ran for longer than {run_timeout or 0.0:g} s"
    return Ending(
        reason=reason,
        obeyed=_timed_out(reason),
        ignored=_timed_out(f"{reason}; {_STILL_RUNS}"),
        too_late=True,
    )


def _timed_out(message: str) -> CommandOutcome:
    return CommandOutcome(FinalState.TIMED_OUT, error=fault("TIMED_OUT", message))


async def watch(
    run: Run, run_timeout: float | None, stop: asyncio.Future[Ending]
) -> CommandOutcome:
    """The run's outcome; or what its time, or the ending that `stop` gets, makes of it."""
    ended = asyncio.wrap_future(run.future)
    waiting: set[asyncio.Future[Any]] = {ended, stop}
    await asyncio.wait(waiting, timeout=run_timeout, return_when="FIRST_COMPLETED")
    if ended.done():
        return _by_itself(ended.result())
    ending = stop.result() if stop.done() else overdue(run_timeout)
    steps: tuple[tuple[Callable[[], None], float], ...] = (
        (lambda: run.cancel(ending.reason), ASKED_S),
        (run.interrupt, INTERRUPTED_S),
        (run.kill, KILLED_S),
    )
    for step, patience_s in steps:
        step()
        await asyncio.wait({ended}, timeout=patience_s)
        if ended.done():
            return ending.of(ended.result())
    return ending.ignored


def _by_itself(outcome: CommandOutcome) -> CommandOutcome:
    if outcome.state is FinalState.CANCELLED:
        return failed("INTERRUPTED", "the handler interrupted itself")
    return outcome


def when_done(run: Run, call: Callable[[], None]) -> None:
    """Call on this loop once the run has ended, whenever that is."""
    loop = asyncio.get_running_loop()

    def tell(_: object) -> None:
        try:
            loop.call_soon_threadsafe(call)
        except RuntimeError:
            return  # the neuron has stopped

    run.future.add_done_callback(tell)
