"""One run of one handler: on a loop, or in a thread. What it costs never reaches who started it.

A run answers by a future that always gets an outcome; it can be asked to end, interrupted, and
killed where that is possible (ending.py does it in this order). The control loop times it, so that
a handler which blocks its own loop is timed all the same. Handlers in processes are in
isolation.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from neuron_sdk.commands import Command
from neuron_sdk.context import CommandContext
from neuron_sdk.errors import CommandFailed, CommandInterrupted
from neuron_sdk.logs import get_logger
from neuron_sdk.outcome import CommandOutcome, FinalState, failed, from_answer, from_exception

_log = get_logger("neuron_sdk.command")


class Run(Protocol):
    """A handler at work."""

    future: Future[CommandOutcome]
    """Gets the outcome. CANCELLED means that it gave up because it was told to."""

    def cancel(self, reason: str) -> None:
        """Ask the handler to end. Returns at once, as the others do."""

    def interrupt(self) -> None:
        """Raise inside the handler."""

    def kill(self) -> None:
        """End it by force, where there is a way."""


def arguments(command: Command, values: Mapping[str, Any], ctx: CommandContext) -> dict[str, Any]:
    """A handler's keyword arguments with its context among them."""
    name = command.parameters.context_name
    return {**values, name: ctx} if name else dict(values)


def answered(value: Any, *, told: bool) -> CommandOutcome:
    """The outcome of a handler that returned. One that was told to end and returned nothing gave
    up; an answer counts, because then its work is done.
    """
    if told and value is None:
        return CommandOutcome(FinalState.CANCELLED)
    return from_answer(value)


class LoopRun:
    """A coroutine on an event loop, the service's own or the control channel's."""

    def __init__(
        self,
        command: Command,
        values: Mapping[str, Any],
        ctx: CommandContext,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Starts it. If the loop is closed the outcome says so."""
        self.future: Future[CommandOutcome] = Future()
        self.future.set_running_or_notify_cancel()  # nobody may cancel it from here on
        self._command = command
        self._values = arguments(command, values, ctx)
        self._ctx = ctx
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._told = False
        self._call_soon(self._begin)

    def cancel(self, reason: str) -> None:
        """CancelledError at its await."""
        self._told = True
        self._ctx.cancel(reason)
        self._call_soon(self._cancel)

    def interrupt(self) -> None:
        """CancelledError once more: the handler may have swallowed the first one."""
        self._call_soon(self._cancel)

    kill = interrupt

    def _begin(self) -> None:
        if self._told:
            self._settle(CommandOutcome(FinalState.CANCELLED))
            return
        name = f"command:{self._ctx.command_id}"
        self._task = self._loop.create_task(self._run(), name=name)
        self._task.add_done_callback(self._cut_off)

    def _cut_off(self, _: object) -> None:
        """The task has ended, and has not said how: it was cancelled before its first step."""
        if self._told:
            self._settle(CommandOutcome(FinalState.CANCELLED))
        else:
            self._settle(failed("INTERRUPTED", "it was cut off"))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            answer = await self._command.handler(**self._values)
            outcome = answered(answer, told=self._told)
        except asyncio.CancelledError:
            if self._told:
                outcome = CommandOutcome(FinalState.CANCELLED)
            else:
                outcome = failed("HANDLER_RAISED", "CancelledError: the handler cancelled itself")
        # A handler's sys.exit() would end the service's loop.
        except BaseException as error:  # noqa: BLE001 - becomes the command's outcome
            log_failure(self._ctx, error)
            outcome = from_exception(error)
        self._settle(outcome)

    def _settle(self, outcome: CommandOutcome) -> None:
        if not self.future.done():
            self.future.set_result(outcome)

    def _call_soon(self, call: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self._settle(failed("INTERRUPTED", "the service's event loop has ended"))


class ThreadRun:
    """A function in a daemon thread of its own: a stuck one keeps nobody, nor the process."""

    def __init__(self, command: Command, values: Mapping[str, Any], ctx: CommandContext) -> None:
        """Starts it."""
        self.future: Future[CommandOutcome] = Future()
        self.future.set_running_or_notify_cancel()  # nobody may cancel it from here on
        self._command = command
        self._values = arguments(command, values, ctx)
        self._ctx = ctx
        self._lock = threading.Lock()
        self._inside = False
        self._thread = threading.Thread(
            target=self._run, name=f"command:{ctx.command_id}", daemon=True
        )
        self._thread.start()

    def cancel(self, reason: str) -> None:
        """The handler sees ctx.cancelled."""
        self._ctx.cancel(reason)

    def interrupt(self) -> None:
        """Raise CommandInterrupted at the handler's next step in Python. A call into C that does
        not return (a read without timeout) cannot be ended by anyone.
        """
        with self._lock:
            if self._inside and self._thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread.ident), ctypes.py_object(CommandInterrupted)
                )

    kill = interrupt

    def _run(self) -> None:
        try:
            outcome = self._call()
        except CommandInterrupted:
            outcome = CommandOutcome(FinalState.CANCELLED)
        while True:
            # The interrupt may strike until the lock is held and _inside is false.
            try:
                self.future.set_result(outcome)
            except CommandInterrupted:
                if not self.future.done():
                    continue
            return

    def _call(self) -> CommandOutcome:
        with self._lock:
            self._inside = True
        try:
            answer = self._command.handler(**self._values)
            return answered(answer, told=self._ctx.cancel_seen)
        except CommandInterrupted:
            return CommandOutcome(FinalState.CANCELLED)
        except BaseException as error:  # noqa: BLE001 - becomes the command's outcome
            log_failure(self._ctx, error)
            return from_exception(error)
        finally:
            with self._lock:
                self._inside = False


def log_failure(ctx: CommandContext, error: BaseException) -> None:
    """The stack goes to the log, and never to the wire. What a handler said by CommandFailed is
    no surprise, and has none.
    """
    said = isinstance(error, CommandFailed)
    _log.warning(
        "command failed" if said else "handler raised",
        action="command.failed",
        command_id=ctx.command_id,
        attempt=ctx.attempt,
        command_type=ctx.type,
        exc_info=None if said else error,
    )
