"""Carries out commands: checks a delivery, notes it, queues it in its lane, runs and times it.

Lives on the control loop, which no handler can block. A command's way: unknown or bad → REJECTED;
noted as accepted; its lane's next free place; noted as started; run; noted as finished. Each note
is on disk before the next step, so that a crash at any point repeats nothing. A cancel takes it off
that way wherever it is, and is always answered by its finish.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from neuron_sdk.builtin import RESTART
from neuron_sdk.commands import Command, CommandRegistry
from neuron_sdk.context import CommandContext, Progress
from neuron_sdk.delivery import Delivery
from neuron_sdk.ending import LONGEST_S, Ending, cancelled, stopping, watch, when_done
from neuron_sdk.intake import expired, log_end, log_fields, make_context, read, unknown
from neuron_sdk.isolation import ProcessRun
from neuron_sdk.lanes import Lane
from neuron_sdk.logs import get_logger
from neuron_sdk.offload import offload
from neuron_sdk.outcome import CommandOutcome, not_started
from neuron_sdk.relay import ProgressRelay
from neuron_sdk.runs import LoopRun, Run, ThreadRun
from neuron_sdk.spool_store import Attempt, Execution, Verdict

CONTROL_PLACES = 8
MAX_LISTED = 1_000
_STOPPED = not_started("the neuron stopped before it started")

_log = get_logger("neuron_sdk.command")


class Notes(Protocol):
    """Where a command's steps are written down; each returns when that is done."""

    async def accept(self, of: Attempt, execution: Execution) -> Verdict: ...
    async def accept_and_start(self, of: Attempt) -> Verdict: ...
    async def reject(self, of: Attempt, outcome: CommandOutcome) -> Verdict: ...
    async def start(self, of: Attempt) -> None: ...
    def progress(self, of: Attempt, progress: Progress) -> Future[None]: ...
    async def carry_over(self, of: Attempt) -> None: ...
    async def finish(self, of: Attempt, outcome: CommandOutcome) -> None: ...


@dataclass(eq=False, slots=True)
class _Accepted:
    """A command that was noted and has not ended."""

    delivery: Delivery
    command: Command
    values: Mapping[str, Any]
    lane: Lane[_Accepted]
    stop: asyncio.Future[Ending]
    """Gets what ends the run before its time."""
    deadline: float | None
    """When it must have started, by the loop's clock."""
    expiry: asyncio.TimerHandle | None = None
    started: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its end is noted; its handler may run on only if nothing can end it."""


class Executor:
    """The commands of one neuron. Every method belongs to the control loop."""

    def __init__(
        self,
        registry: CommandRegistry,
        notes: Notes,
        *,
        max_concurrent: int,
        carried_over: Iterable[Attempt] = (),
    ) -> None:
        """`carried_over` is what an earlier process left to this one to finish."""
        self._registry = registry
        self._notes = notes
        self._normal: Lane[_Accepted] = Lane(max_concurrent)
        self._control: Lane[_Accepted] = Lane(CONTROL_PLACES)
        self._normal.held = True
        self._arrivals = itertools.count()
        self._paused = False
        self._ready = False
        self._stopping = False
        self._taking: set[Attempt] = set()
        self._accepted: dict[Attempt, _Accepted] = {}
        self._left_to_us = set(carried_over)
        self._left_to_next: set[Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._work_loop: asyncio.AbstractEventLoop | None = None
        self._on_step: Callable[[], None] = lambda: None

    def listen(self, on_step: Callable[[], None]) -> None:
        """Whom to tell whenever `busy` may have changed to False."""
        self._on_step = on_step

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
        """What has arrived and has not ended: for Hello."""
        left = self._left_to_us | self._left_to_next
        return list(dict.fromkeys([*left, *self._accepted, *self._taking]))[:MAX_LISTED]

    @property
    def busy(self) -> bool:
        """Whether a command is being taken, waits, runs, or is left to this process to finish."""
        return bool(self._tasks or self._accepted or self._left_to_us)

    @property
    def stopping(self) -> bool:
        """Whether nothing more is taken."""
        return self._stopping

    @property
    def running(self) -> int:
        """How many handlers run."""
        return sum(entry.started for entry in self._accepted.values())

    def deliver(self, delivery: Delivery) -> None:
        """Take a command that has arrived. Whatever is wrong with it becomes its outcome."""
        if self._stopping and self._left_to_next and self._is_restart(delivery):
            self._spawn(self._join_restart(delivery), delivery.of)
            return
        if self._stopping and delivery.execution is Execution.AT_MOST_ONCE:
            self._spawn(self._decline(delivery), delivery.of)
            return
        if self._stopping:
            # Not taken: the federation sends it again when the neuron is back.
            _log.info("left for the next start", action="command.left", **log_fields(delivery))
            return
        self._taking.add(delivery.of)
        self._spawn(self._take_in(delivery, next(self._arrivals)), delivery.of)

    def cancel(self, of: Attempt, reason: str) -> None:
        """Give an attempt up, wherever it is. Its finish answers, as often as this is asked."""
        self._spawn(self._cancel(of, reason), of)

    async def carry_over(self, of: Attempt) -> None:
        """Leave a running command to the neuron's next process to finish: a restart."""
        await self._notes.carry_over(of)
        self._left_to_next.add(of)

    async def finish_carried_over(self, outcome: CommandOutcome) -> None:
        """Finish what was left to this process."""
        for of in list(self._left_to_us):
            await self._notes.finish(of, outcome)
            self._left_to_us.discard(of)
        self._on_step()

    async def stop(self, grace_s: float) -> None:
        """Start nothing more; give what runs `grace_s` seconds, then interrupt it.

        What waits in a lane stays noted as accepted: it is delivered again after the next start,
        and runs. What is not, because it is AT_MOST_ONCE, ends here.
        """
        self._stopping = True
        self._hold()
        running = [task for task in self._tasks if not task.done()]
        if running:
            _log.info("waiting for commands", action="command.draining", count=len(running))
            await asyncio.wait(running, timeout=grace_s)
        self.interrupt("the neuron is stopping")
        self._end_waiting()
        running = [task for task in self._tasks if not task.done()]
        if running:
            await asyncio.wait(running, timeout=LONGEST_S + 1)

    def interrupt(self, reason: str) -> None:
        """Interrupt everything that runs."""
        for entry in self._accepted.values():
            if entry.started and not entry.stop.done():
                entry.stop.set_result(stopping(reason))

    def _end_waiting(self) -> None:
        for entry in list(self._accepted.values()):
            once = entry.delivery.execution is Execution.AT_MOST_ONCE
            if once and entry.lane.leave(entry):
                self._spawn(self._finish(entry, _STOPPED), entry.delivery.of)

    # ---- a command's way

    def _is_restart(self, delivery: Delivery) -> bool:
        command = self._registry.get(delivery.type)
        return command is not None and command.builtin and command.type == RESTART

    async def _decline(self, delivery: Delivery) -> None:
        """It came too late to be started, and does not come again."""
        if await self._notes.reject(delivery.of, _STOPPED) is Verdict.NEW:
            log_end(delivery, _STOPPED)

    async def _join_restart(self, delivery: Delivery) -> None:
        """Asked for while one is under way: the same restart answers for both."""
        of = delivery.of
        if await self._notes.accept(of, delivery.execution) is Verdict.NEW:
            await self._notes.start(of)
            await self.carry_over(of)

    async def _take_in(self, delivery: Delivery, number: int) -> None:
        try:
            await self._take(delivery, number)
        finally:
            self._taking.discard(delivery.of)

    async def _take(self, delivery: Delivery, number: int) -> None:
        loop = asyncio.get_running_loop()
        wait = delivery.expire_after
        deadline = None if wait is None else loop.time() + wait
        command = self._registry.get(delivery.type)
        values = await _read(delivery, command)
        if command is None or isinstance(values, CommandOutcome):
            outcome = values if isinstance(values, CommandOutcome) else unknown(delivery)
            await self._notes.reject(delivery.of, outcome)
            log_end(delivery, outcome)
            return
        lane = self._control if command.control else self._normal
        # One note in place of two for what need not wait, which most commands need not.
        in_time = deadline is None or loop.time() < deadline
        at_once = in_time and not self._older(delivery.of) and lane.reserve()
        try:
            if at_once:
                verdict = await self._notes.accept_and_start(delivery.of)
            else:
                verdict = await self._notes.accept(delivery.of, delivery.execution)
        except BaseException:
            if at_once:
                self._free(lane)
            raise
        if verdict is not Verdict.NEW:
            _log_verdict(delivery, verdict)
            if at_once:
                self._free(lane)
            return
        entry = _Accepted(delivery, command, values, lane, loop.create_future(), deadline)
        self._accepted[delivery.of] = entry
        if at_once:
            entry.started = True
            await self._run(entry, noted=True)
            return
        await self._replace_older(delivery.of)
        if entry.stop.done():
            await self._finish(entry, entry.stop.result().obeyed)
            return
        if deadline is not None:
            entry.expiry = loop.call_at(deadline, self._expire, entry)
        lane.enter(entry, delivery.priority, number)
        self._advance()

    async def _replace_older(self, of: Attempt) -> None:
        """Two attempts of a command never run side by side: the federation waits for one only."""
        for known in self._older(of):
            if (entry := self._accepted.get(known)) is not None:
                self.cancel(known, f"attempt {of.attempt} of it has come")
                await entry.ended.wait()

    def _older(self, of: Attempt) -> list[Attempt]:
        return [
            known
            for known in self._accepted
            if known.command_id == of.command_id and known.attempt < of.attempt
        ]

    async def _cancel(self, of: Attempt, reason: str) -> None:
        outcome = cancelled(reason).obeyed
        if of in self._left_to_us | self._left_to_next:
            return  # a restart is under way, and its end is the answer
        if of not in self._accepted:
            # Never seen: noted, so that it does not run if it comes. Ended: its finish goes again.
            # RUNNING: its acceptance was noted just before, and it is among the accepted by now.
            verdict = await self._notes.reject(of, outcome)
            _log.info("cancelled", action="command.cancelled", verdict=verdict, **asdict(of))
        entry = self._accepted.get(of)
        if entry is None:
            return
        if entry.lane.leave(entry):
            await self._finish(entry, outcome)
        elif not entry.stop.done():
            _log.info("cancelling", action="command.cancelling", reason=reason, **asdict(of))
            entry.stop.set_result(cancelled(reason))

    def _expire(self, entry: _Accepted) -> None:
        if entry.lane.leave(entry):
            self._spawn(self._finish(entry, expired(entry.delivery)), entry.delivery.of)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        for lane in (self._control, self._normal):
            while (entry := lane.take()) is not None:
                if entry.deadline is not None and entry.deadline <= now:
                    lane.give_back()
                    self._spawn(self._finish(entry, expired(entry.delivery)), entry.delivery.of)
                    continue
                if entry.expiry is not None:
                    entry.expiry.cancel()
                entry.started = True
                self._spawn(self._run(entry), entry.delivery.of)

    async def _run(self, entry: _Accepted, *, noted: bool = False) -> None:
        """From the note of its start, unless that is `noted`, to that of its end."""
        run: Run | None = None
        try:
            if entry.stop.done():
                await self._finish(entry, entry.stop.result().obeyed)
                return
            if not noted:
                await self._notes.start(entry.delivery.of)
            loop = asyncio.get_running_loop()
            relay = ProgressRelay(
                loop, lambda progress: self._notes.progress(entry.delivery.of, progress)
            )
            ctx = make_context(entry.delivery, relay.tell)
            began = time.monotonic()
            _log.info("command started", action="command.started", **log_fields(entry.delivery))
            try:
                run = self._begin(entry, ctx)
            except Exception as error:  # noqa: BLE001 - no thread is left: it must end all the same
                outcome = not_started(f"its handler could not be started: {error}")
            else:
                outcome = await watch(run, entry.delivery.run_timeout, entry.stop)
            relay.close()
            if entry.delivery.of in self._left_to_next:
                return
            outcome = replace(
                outcome, run_duration=time.monotonic() - began, log_tail=ctx.log.tail()
            )
            await self._finish(entry, outcome)
        finally:
            self._forget(entry)
            if run is None or run.future.done():
                self._free(entry.lane)
            else:
                # It cannot be ended: its place stays taken until it ends by itself.
                named = log_fields(entry.delivery)
                _log.warning("handler does not end", action="command.stuck", **named)
                when_done(run, lambda: self._free(entry.lane))

    async def _finish(self, entry: _Accepted, outcome: CommandOutcome) -> None:
        if entry.expiry is not None:
            entry.expiry.cancel()
        try:
            await self._notes.finish(entry.delivery.of, outcome)
        finally:
            self._forget(entry)
        log_end(entry.delivery, outcome)

    def _forget(self, entry: _Accepted) -> None:
        self._accepted.pop(entry.delivery.of, None)
        entry.ended.set()

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

    def _spawn(self, work: Awaitable[None], of: Attempt) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:  # noqa: BLE001 - logged; one command must not end the others
                _log.exception("command broke", action="command.broken", **asdict(of))

        task = asyncio.create_task(guarded(), name=f"command:{of.command_id}")
        self._tasks.add(task)
        task.add_done_callback(self._note_done)

    def _note_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._on_step()


async def _read(delivery: Delivery, command: Command | None) -> Mapping[str, Any] | CommandOutcome:
    if command is None or command.parameters.standard:
        return read(delivery, command)
    # In a thread, because the service's own types take part, and they may do anything.
    return await offload(lambda: read(delivery, command))


def _log_verdict(delivery: Delivery, verdict: Verdict) -> None:
    """Why a delivery is not taken."""
    known = log_fields(delivery)
    if verdict is Verdict.FULL:
        _log.warning("left: too many results wait", action="command.left", **known)
    else:
        _log.info("delivered again", action="command.again", verdict=verdict, **known)
