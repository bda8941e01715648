"""A handler in a process of its own, which can be killed: the neuron's side.

Not a fork, because gRPC's threads do not survive one: a fresh interpreter imports the handler's
module and runs it (isolated.py). The two speak in frames over a socket pair; when either end
closes, the other knows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

import msgspec

from neuron_sdk.commands import Command
from neuron_sdk.context import CommandContext, Progress
from neuron_sdk.errors import CommandInterrupted
from neuron_sdk.logs import get_logger
from neuron_sdk.outcome import CommandOutcome, FinalState, failed
from neuron_sdk.payload import JsonObject

IN_CHILD = "NEURON_SDK_ISOLATED"
"""Set in the environment of such a process: there `neuron.run()` does not run a neuron."""

_LENGTH = struct.Struct(">I")
_log = get_logger("neuron_sdk.command")


class Request(msgspec.Struct, frozen=True):
    """What the process is to do."""

    module: str
    path: str | None
    """The module's file, if it cannot be imported by its name: a script."""
    handler: str
    command_id: str
    attempt: int
    max_attempts: int
    type: str
    data: JsonObject
    checkpoint: JsonObject | None
    sys_path: list[str]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Asks the process to end its handler."""

    reason: str


class Interrupt(msgspec.Struct, frozen=True, tag=True):
    """Raises inside the handler."""


class Kept(msgspec.Struct, frozen=True, tag=True):
    """A checkpoint is on disk, or will never be."""

    number: int
    error: str = ""


class Told(msgspec.Struct, frozen=True, tag=True):
    """The handler's progress."""

    progress: Progress
    number: int
    """Of its checkpoint, to be named in Kept; 0 without one."""


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A line that the handler logged."""

    level: str
    event: str
    fields: dict[str, str]


class Raised(msgspec.Struct, frozen=True, tag=True):
    """The stack of what the handler raised: for the neuron's own log."""

    stack: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """How the handler ended; the last frame."""

    outcome: CommandOutcome


Frame = Cancel | Interrupt | Kept | Told | Logged | Raised | Ended


def send_frame(end: socket.socket, frame: Frame | Request) -> None:
    """Write one frame."""
    body = msgspec.msgpack.encode(frame)
    end.sendall(_LENGTH.pack(len(body)) + body)


def read_frame(end: socket.socket, kind: Any = Frame) -> Any:
    """The next frame; None at the end."""
    head = _read_exactly(end, _LENGTH.size)
    body = head and _read_exactly(end, _LENGTH.unpack(head)[0])
    return msgspec.msgpack.decode(body, type=kind) if body else None


def _read_exactly(end: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = end.recv(size - len(body))
        if not part:
            return None
        body += part
    return bytes(body)


class ProcessRun:
    """A handler in a process of its own; a `Run`."""

    def __init__(self, command: Command, data: JsonObject, ctx: CommandContext) -> None:
        """Starts it."""
        self.future: Future[CommandOutcome] = Future()
        self.future.set_running_or_notify_cancel()
        self._request = _request(command, data, ctx)
        self._ctx = ctx
        self._cancel: Cancel | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        threading.Thread(target=self._work, name=f"command:{ctx.command_id}", daemon=True).start()

    def cancel(self, reason: str) -> None:
        """A coroutine is cancelled, a function sees ctx.cancelled."""
        self._cancel = Cancel(reason)
        self._send(self._cancel)

    def interrupt(self) -> None:
        """CommandInterrupted in the handler's thread, also where it sleeps or reads."""
        self._send(Interrupt())

    def kill(self) -> None:
        """SIGKILL to the process and all that it has started."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, frame: Frame) -> None:
        with self._lock:
            if self._end is not None:
                with contextlib.suppress(OSError):
                    send_frame(self._end, frame)

    def _work(self) -> None:
        try:
            outcome = self._converse()
        except Exception as error:  # noqa: BLE001 - logged, and becomes the outcome
            _log.exception("process failed", action="command.process_failed")
            outcome = failed("PROCESS_FAILED", f"its process could not be run: {error}")
        self.future.set_result(outcome)

    def _converse(self) -> CommandOutcome:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "neuron_sdk.isolated", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, IN_CHILD: "1", "PYTHONPATH": _python_path()},
                    start_new_session=True,  # so that Ctrl-C is the neuron's to handle
                )
            with self._lock:
                self._process = process
            try:
                send_frame(ours, self._request)
                with self._lock:
                    self._end = ours
                if self._cancel is not None:
                    self._send(self._cancel)
                outcome = self._listen(ours)
            except OSError:
                outcome = None
            finally:
                with self._lock:
                    self._end = None
        code = process.wait()
        if outcome is not None:
            return outcome
        if self._cancel is not None:
            return CommandOutcome(FinalState.CANCELLED)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return failed("PROCESS_ENDED", f"the handler's process ended with {how}")

    def _listen(self, end: socket.socket) -> CommandOutcome | None:
        while True:
            match read_frame(end):
                case Told(progress, number):
                    self._tell(progress, number)
                case Logged(level, event, fields):
                    getattr(self._ctx.log, level)(event, **fields)
                case Raised(stack):
                    _log.warning(
                        "handler raised",
                        action="command.failed",
                        command_id=self._ctx.command_id,
                        stack=stack,
                    )
                case Ended(outcome):
                    return outcome
                case _:
                    return None

    def _tell(self, progress: Progress, number: int) -> None:
        try:
            kept = self._ctx.report(progress)
        except CommandInterrupted as error:
            self._send(Kept(number, str(error)))
            return

        def answer(done: Future[None]) -> None:
            error = done.exception()
            self._send(Kept(number, "" if error is None else repr(error)))

        if kept is not None:
            kept.add_done_callback(answer)


def _request(command: Command, data: JsonObject, ctx: CommandContext) -> Request:
    module, path = command.handler.__module__, None
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        if spec is not None:
            module = spec.name  # python -m
        else:
            path = os.path.abspath(getattr(main, "__file__", ""))  # noqa: PTH100 - not resolved
    return Request(
        module=module,
        path=path,
        handler=command.handler.__qualname__,
        command_id=ctx.command_id,
        attempt=ctx.attempt,
        max_attempts=ctx.max_attempts,
        type=ctx.type,
        data=data,
        checkpoint=ctx.checkpoint,
        sys_path=[os.path.abspath(entry) for entry in sys.path],  # noqa: PTH100 - as above
    )


def _python_path() -> str:
    """So that the child finds the SDK where this process has found it."""
    sdk = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    known = os.environ.get("PYTHONPATH", "")
    return f"{sdk}{os.pathsep}{known}" if known else sdk
