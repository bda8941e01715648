"""The process of one isolated handler: `python -m neuron_sdk.isolated FD`; started by isolation.py.

It imports the handler's module, runs the handler once, sends the outcome and ends. It never
outlives the neuron: when the neuron's end of the socket closes, it exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import itertools
import os
import signal
import socket
import sys
import threading
import traceback
from concurrent.futures import Future
from types import FrameType, ModuleType
from typing import Any

from neuron_sdk.context import CommandContext, Progress
from neuron_sdk.errors import CommandFailed, CommandInterrupted, IsolatedImport
from neuron_sdk.isolation import (
    IN_CHILD,
    Cancel,
    Ended,
    Frame,
    Interrupt,
    Kept,
    Logged,
    Raised,
    Request,
    Told,
    read_frame,
    send_frame,
)
from neuron_sdk.outcome import CommandOutcome, FinalState, failed, from_exception
from neuron_sdk.runs import answered
from neuron_sdk.schema import read_signature

# A script is imported under this name, so that `if __name__ == "__main__"` does not hold.
_SCRIPT = "__neuron_script__"


class _Child:
    def __init__(self, end: socket.socket, request: Request) -> None:
        self._end = end
        self._request = request
        self._lock = threading.Lock()
        self._told = False
        self._inside = False
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, Future[None]] = {}
        self._numbers = itertools.count(1)
        self.ctx = CommandContext(
            command_id=request.command_id,
            attempt=request.attempt,
            type=request.type,
            report=self._report,
            write_log=self._write_log,
            max_attempts=request.max_attempts,
            checkpoint=request.checkpoint,
        )

    def send(self, frame: Frame) -> None:
        with self._lock:
            send_frame(self._end, frame)

    def watch(self) -> None:
        """Obey the neuron, and end with it."""
        while True:
            match read_frame(self._end):
                case Cancel(reason):
                    self._told = True
                    self.ctx.cancel(reason)
                    if self._loop is not None and self._task is not None:
                        self._loop.call_soon_threadsafe(self._task.cancel)
                case Interrupt():
                    # By a signal, because it ends a sleep or a read as well.
                    signal.pthread_kill(_main_thread(), signal.SIGINT)
                case Kept(number, error):
                    kept = self._waiting.pop(number)
                    if error:
                        kept.set_exception(CommandInterrupted(error))
                    else:
                        kept.set_result(None)
                case _:
                    os._exit(1)

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """SIGINT's handler."""
        if self._inside:
            raise CommandInterrupted

    def run(self) -> CommandOutcome:
        try:
            sys.path[:] = self._request.sys_path
            module = _load(self._request.module, self._request.path)
            os.environ.pop(IN_CHILD)  # what the handler starts is no such process
            handler = getattr(module, self._request.handler)
            parameters = read_signature(handler)
            values = parameters.convert(self._request.data)
        except BaseException as error:  # noqa: BLE001 - a module may raise anything
            self._tell_stack()
            return failed(
                "PROCESS_FAILED",
                f"its process could not import it: {type(error).__name__}: {error}",
            )
        if parameters.context_name:
            values[parameters.context_name] = self.ctx
        try:
            return self._call(handler, values)
        except CommandInterrupted:
            return CommandOutcome(FinalState.CANCELLED)
        except asyncio.CancelledError:
            if self._told:
                return CommandOutcome(FinalState.CANCELLED)
            return failed("HANDLER_RAISED", "CancelledError: the handler cancelled itself")
        except BaseException as error:  # noqa: BLE001 - becomes the command's outcome
            if not isinstance(error, CommandFailed):
                self._tell_stack()
            return from_exception(error)

    def _call(self, handler: Any, values: dict[str, Any]) -> CommandOutcome:
        if self._told:
            return CommandOutcome(FinalState.CANCELLED)
        self._inside = True
        try:
            if inspect.iscoroutinefunction(handler):
                answer = asyncio.run(self._await(handler(**values)))
                return answered(answer, told=self._told)
            answer = handler(**values)
            return answered(answer, told=self.ctx.cancel_seen)
        finally:
            self._inside = False

    async def _await(self, work: Any) -> Any:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.ensure_future(work)
        if self._told:
            self._task.cancel()
        return await self._task

    def _report(self, progress: Progress) -> Future[None] | None:
        if progress.checkpoint is None:
            self.send(Told(progress, 0))
            return None
        number, kept = next(self._numbers), Future[None]()
        self._waiting[number] = kept
        self.send(Told(progress, number))
        return kept

    def _write_log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.send(Logged(level, event, {key: str(value) for key, value in fields.items()}))

    def _tell_stack(self) -> None:
        self.send(Raised(traceback.format_exc()))


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "it runs"
    return ident


def _load(name: str, path: str | None) -> ModuleType:
    """The module, executed up to the point where it would run a neuron."""
    if name in sys.modules and path is None:
        return sys.modules[name]
    if path is not None:
        name = _SCRIPT
        spec = importlib.util.spec_from_file_location(name, path)
    else:
        spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"no module named {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # A script's last line runs into neuron.run(): all that matters stands above it.
    with contextlib.suppress(IsolatedImport):
        spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the one handler."""
    end = socket.socket(fileno=int(sys.argv[1]))
    # What the handler starts must not hold it open: its end tells the neuron that we have ended.
    end.set_inheritable(False)
    os.register_at_fork(after_in_child=end.close)
    request = read_frame(end, Request)
    if request is None:
        return
    child = _Child(end, request)
    signal.signal(signal.SIGINT, child.interrupt)
    threading.Thread(target=child.watch, name="watch", daemon=True).start()
    child.send(Ended(child.run()))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the handler's leftovers (threads that never end), as the neuron is waiting for us.
    os._exit(0)


if __name__ == "__main__":
    main()
