"""Carries out commands: checks a delivery, notes it, queues it in its lane, runs and times it.

Lives on the control loop, which no handler can block. A command's way: unknown or bad → REJECTED;
noted as accepted; its lane's next free place; noted as started; run; noted as finished. Each note
is on disk before the next step, so that a crash at any point repeats nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from neuron_sdk.commands import Command, CommandRegistry
from neuron_sdk.context import CommandContext, Progress
from neuron_sdk.delivery import Delivery
from neuron_sdk.isolation import ProcessRun
from neuron_sdk.lanes import Lane
from neuron_sdk.logs import get_logger
from neuron_sdk.offload import offload
from neuron_sdk.outcome import (
    CommandFault,
    CommandOutcome,
    FinalState,
    failed,
    fault,
    rejected,
)
from neuron_sdk.relay import ProgressRelay
from neuron_sdk.runs import LoopRun, Run, ThreadRun
from neuron_sdk.schema import InvalidData
from neuron_sdk.spool_store import Attempt, Verdict

CONTROL_PLACES = 8
INTERRUPT_GRACE_S = 3.0
KILL_GRACE_S = 2.0
MAX_LISTED = 1_000

_log = get_logger("neuron_sdk.command")


class Notes(Protocol):
    """Where a command's steps are written down; each returns when that is done."""

    async def accept(self, of: Attempt) -> Verdict: ...
    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict: ...
    async def start(self, of: Attempt) -> None: ...
    def progress(self, of: Attempt, progress: Progress) -> None: ...
    async def finish(self, of: Attempt, outcome: CommandOutcome) -> None: ...


@dataclass(eq=False, slots=True)
class _Accepted:
    """A command that was noted and has not ended."""

    delivery: Delivery
    command: Command
    values: Mapping[str, Any]
    lane: Lane[_Accepted]
    stop: asyncio.Future[str]
    """Gets the reason when the run is to be interrupted."""
    expiry: asyncio.TimerHandle | None = None
    started: bool = False


class Executor:
    """The commands of one neuron. Every method belongs to the control loop."""

    def __init__(self, registry: CommandRegistry, notes: Notes, *, max_concurrent: int) -> None:
        self._registry = registry
        self._notes = notes
        self._normal: Lane[_Accepted] = Lane(max_concurrent)
        self._control: Lane[_Accepted] = Lane(CONTROL_PLACES)
        self._normal.held = True
        self._arrivals = itertools.count()
        self._paused = False
        self._ready = False
        self._stopping = False
        self._accepted: dict[Attempt, _Accepted] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._work_loop: asyncio.AbstractEventLoop | None = None

    def open(self, work_loop: asyncio.AbstractEventLoop) -> None:
        """The service is ready: its coroutines may run on `work_loop` from now on."""
        self._work_loop = work_loop
        self._ready = True
        self._hold()

    def pause(self) -> None:
        """Start nothing of the normal lane; what runs goes on, what comes waits."""
        self._paused = True
        self._hold()

    def resume(self) -> None:
        """Undo `pause`."""
        self._paused = False
        self._hold()

    @property
    def paused(self) -> bool:
        """Whether the normal lane is paused."""
        return self._paused

    def unfinished(self) -> list[Attempt]:
        """What was accepted and has not ended: for Hello."""
        return list(self._accepted)[:MAX_LISTED]

    @property
    def running(self) -> int:
        """How many handlers run."""
        return sum(entry.started for entry in self._accepted.values())

    def deliver(self, delivery: Delivery) -> None:
        """Take a command that has arrived. Whatever is wrong with it becomes its outcome."""
        if self._stopping:
            # Not taken: the federation sends it again when the neuron is back.
            _log.info("left for the next start", action="command.left", **_ids(delivery))
            return
        self._spawn(self._take(delivery, next(self._arrivals)), delivery)

    async def stop(self, grace_s: float) -> None:
        """Start nothing more; give what runs `grace_s` seconds, then interrupt it.

        What waits in a lane stays noted as accepted: it runs after the next start.
        """
        self._stopping = True
        self._hold()
        running = [task for task in self._tasks if not task.done()]
        if running:
            _log.info("waiting for commands", action="command.draining", count=len(running))
            await asyncio.wait(running, timeout=grace_s)
        self.interrupt("the neuron is stopping")
        running = [task for task in self._tasks if not task.done()]
        if running:
            await asyncio.wait(running, timeout=INTERRUPT_GRACE_S + KILL_GRACE_S + 1)

    def interrupt(self, reason: str) -> None:
        """Interrupt everything that runs."""
        for entry in self._accepted.values():
            if entry.started and not entry.stop.done():
                entry.stop.set_result(reason)

    # ---- a command's way

    async def _take(self, delivery: Delivery, number: int) -> None:
        deadline = asyncio.get_running_loop().time() + (delivery.expire_after or 0.0)
        command = self._registry.get(delivery.type)
        # In a thread, because the handler's own types take part, and they may do anything.
        checked = await offload(lambda: _check(delivery, command))
        if command is None or isinstance(checked, CommandOutcome):
            outcome = checked if isinstance(checked, CommandOutcome) else _unknown(delivery)
            await self._notes.reject(delivery.of, outcome)
            _log_end(delivery, outcome)
            return
        verdict = await self._notes.accept(delivery.of)
        if verdict is not Verdict.NEW:
            _log.info("delivered again", action="command.again", verdict=verdict, **_ids(delivery))
            return
        lane = self._control if command.control else self._normal
        loop = asyncio.get_running_loop()
        entry = _Accepted(delivery, command, checked, lane, loop.create_future())
        self._accepted[delivery.of] = entry
        if delivery.expire_after is not None:
            entry.expiry = loop.call_at(deadline, self._expire, entry)
        lane.enter(entry, delivery.priority, number)
        self._advance()

    def _expire(self, entry: _Accepted) -> None:
        if not entry.lane.leave(entry):
            return
        outcome = rejected(
            "EXPIRED", f"it had not started within {entry.delivery.expire_after:g} s"
        )
        self._spawn(self._finish(entry, outcome), entry.delivery)

    def _advance(self) -> None:
        for lane in (self._control, self._normal):
            while (entry := lane.take()) is not None:
                if entry.expiry is not None:
                    entry.expiry.cancel()
                entry.started = True
                self._spawn(self._run(entry), entry.delivery)

    async def _run(self, entry: _Accepted) -> None:
        run: Run | None = None
        try:
            await self._notes.start(entry.delivery.of)
            loop = asyncio.get_running_loop()
            relay = ProgressRelay(
                loop, lambda progress: self._notes.progress(entry.delivery.of, progress)
            )
            ctx = make_context(entry.delivery, relay.tell)
            began = time.monotonic()
            _log.info("command started", action="command.started", **_ids(entry.delivery))
            run = self._begin(entry, ctx)
            outcome = await _watch(run, entry.delivery.run_timeout, entry.stop)
            relay.close()
            outcome = replace(
                outcome, run_duration=time.monotonic() - began, log_tail=ctx.log.tail()
            )
            await self._finish(entry, outcome)
        finally:
            self._accepted.pop(entry.delivery.of, None)
            if run is None or run.future.done():
                self._free(entry.lane)
            else:
                # It cannot be ended: its place stays taken until it ends by itself.
                _log.warning("handler does not end", action="command.stuck", **_ids(entry.delivery))
                when_done(run, lambda: self._free(entry.lane))

    async def _finish(self, entry: _Accepted, outcome: CommandOutcome) -> None:
        try:
            await self._notes.finish(entry.delivery.of, outcome)
        finally:
            self._accepted.pop(entry.delivery.of, None)
        _log_end(entry.delivery, outcome)

    def _begin(self, entry: _Accepted, ctx: CommandContext) -> Run:
        command = entry.command
        if command.builtin and command.is_coroutine:
            return LoopRun(command, entry.values, ctx, asyncio.get_running_loop())
        if command.isolation == "process":
            return ProcessRun(command, entry.delivery.data, ctx)
        if command.is_coroutine:
            assert self._work_loop is not None, "the lane is held until open()"
            return LoopRun(command, entry.values, ctx, self._work_loop)
        return ThreadRun(command, entry.values, ctx)

    def _free(self, lane: Lane[_Accepted]) -> None:
        lane.give_back()
        self._advance()

    def _hold(self) -> None:
        self._normal.held = self._stopping or self._paused or not self._ready
        self._control.held = self._stopping
        self._advance()

    def _spawn(self, work: Awaitable[None], delivery: Delivery) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:  # noqa: BLE001 - logged; one command must not end the others
                _log.exception("command broke", action="command.broken", **_ids(delivery))

        task = asyncio.create_task(guarded(), name=f"command:{delivery.of.command_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def make_context(delivery: Delivery, report: Callable[[Progress], None]) -> CommandContext:
    """The context of a run of that delivery."""
    bound = _log.bind(**_ids(delivery))

    def write(level: str, event: str, fields: dict[str, Any]) -> None:
        getattr(bound, level)(event, **({"action": "command.log"} | fields))

    return CommandContext(
        command_id=delivery.of.command_id,
        attempt=delivery.of.attempt,
        type=delivery.type,
        report=report,
        write_log=write,
    )


def _check(delivery: Delivery, command: Command | None) -> dict[str, Any] | CommandOutcome:
    """The handler's arguments, or why it will not run."""
    if command is None:
        return _unknown(delivery)
    if delivery.expire_after is not None and delivery.expire_after <= 0:
        return rejected("EXPIRED", "its time was over when it arrived")
    try:
        return command.parameters.convert(delivery.data)
    except InvalidData as error:
        details = {"field": error.field} if error.field else None
        return rejected("INVALID_DATA", str(error), details)
    except Exception as error:  # noqa: BLE001 - a user's type may raise anything while it is built
        return rejected("INVALID_DATA", f"{type(error).__qualname__}: {error}")


def _unknown(delivery: Delivery) -> CommandOutcome:
    return rejected("UNKNOWN_COMMAND", f"this neuron has no command {delivery.type!r}")


async def _watch(run: Run, run_timeout: float | None, stop: asyncio.Future[str]) -> CommandOutcome:
    """The run's outcome; or the one that its time, or the neuron's end, puts in its place."""
    ended = asyncio.wrap_future(run.future)
    waiting: set[asyncio.Future[Any]] = {ended, stop}
    await asyncio.wait(waiting, timeout=run_timeout, return_when="FIRST_COMPLETED")
    if ended.done():
        return _not_cancelled(ended.result())
    if stop.done():
        outcome = failed("INTERRUPTED", f"it was interrupted: {stop.result()}")
    else:
        outcome = CommandOutcome(
            FinalState.TIMED_OUT,
            error=fault("TIMED_OUT", f"it ran for longer than {run_timeout:g} s"),
        )
    run.interrupt()
    await asyncio.wait({ended}, timeout=INTERRUPT_GRACE_S)
    if not ended.done():
        run.kill()
        await asyncio.wait({ended}, timeout=KILL_GRACE_S)
    if not ended.done() and outcome.error is not None:
        said = f"{outcome.error.message}, and its handler still has not ended"
        outcome = replace(outcome, error=CommandFault(outcome.error.code, said))
    return outcome


def _not_cancelled(outcome: CommandOutcome) -> CommandOutcome:
    if outcome.state is FinalState.CANCELLED:
        return failed("INTERRUPTED", "the handler was interrupted")
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


def _ids(delivery: Delivery) -> dict[str, Any]:
    return {
        "command_id": delivery.of.command_id,
        "attempt": delivery.of.attempt,
        "command_type": delivery.type,
    }


def _log_end(delivery: Delivery, outcome: CommandOutcome) -> None:
    _log.info(
        "command ended",
        action="command.ended",
        state=outcome.state.value,
        code=outcome.error.code if outcome.error else None,
        run_s=None if outcome.run_duration is None else round(outcome.run_duration, 3),
        **_ids(delivery),
    )
