"""What a handler gets besides its data: who called it, a log, and a way to say how far it is."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from neuron_sdk.outcome import MAX_LOG_TAIL_BYTES
from neuron_sdk.payload import clean_text, tail_bytes
from neuron_sdk.redaction import redact_fields, redact_text

MAX_PROGRESS_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command is."""

    fraction: float
    """The share that is done, 0 to 1."""
    message: str
    """What is being done, for people."""


class CommandContext:
    """One run of one command, as its handler sees it. Every method may be called in any thread."""

    __slots__ = ("_cancelled", "_report", "attempt", "command_id", "log", "type")

    def __init__(
        self,
        *,
        command_id: str,
        attempt: int,
        type: str,  # noqa: A002 - the contract's word
        report: Callable[[Progress], None],
        write_log: Callable[[str, str, dict[str, Any]], None] | None = None,
    ) -> None:
        """`report` takes progress, `write_log` level, event and fields; both in any thread."""
        self.command_id = command_id
        """The command's id."""
        self.attempt = attempt
        """Which attempt this is, from 1."""
        self.type = type
        """The command's type."""
        self.log = CommandLog(write_log)
        """A log; its last lines travel with the command's result."""
        self._report = report
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """True once the command should end: its time is over, or the neuron stops. A handler in
        a thread may look at it between two steps and return; a coroutine is cancelled anyway.
        """
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the handler to end; the SDK calls it."""
        self._cancelled.set()

    def progress(self, fraction: float, message: str = "") -> _Told:
        """Say how far the command is: `await ctx.progress(0.5, "half")`.

        It may be called as often as is convenient: what follows fast is sent by its newest only.
        The await gives way to other coroutines for a moment and never waits for the network. In a
        thread call it without await, or as `progress_sync`.

        Args:
            fraction: the share that is done; below 0 counts as 0, above 1 as 1.
            message: what is being done, for people; cut at 1024 characters.
        """
        self.progress_sync(fraction, message)
        return _Told()

    def progress_sync(self, fraction: float, message: str = "") -> None:
        """As `progress`, for handlers that are not coroutines."""
        share = float(fraction)
        if math.isnan(share):
            raise ValueError("fraction is NaN: give the share that is done, 0 to 1")
        text = clean_text(str(message), MAX_PROGRESS_MESSAGE)
        self._report(Progress(min(max(share, 0.0), 1.0), text))


class _Told:
    """What `progress` returns: awaiting it lets others run; not awaiting it is fine too."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.sleep(0).__await__()


class CommandLog:
    """A log of one command. Lines go to the neuron's log and, the last 16 KiB, to its result."""

    __slots__ = ("_lines", "_lock", "_size", "_write")

    def __init__(self, write: Callable[[str, str, dict[str, Any]], None] | None) -> None:
        self._write = write
        self._lines: deque[str] = deque()
        self._size = 0
        self._lock = threading.Lock()

    def debug(self, event: str, **fields: Any) -> None:
        """A line for developers."""
        self._add("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """A line worth knowing."""
        self._add("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """A line worth a look."""
        self._add("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """A line about something that failed."""
        self._add("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """As `error`; inside an except block the neuron's own log gets the stack too."""
        self._add("exception", event, fields)

    def tail(self) -> str:
        """The last lines, at most 16 KiB of UTF-8."""
        with self._lock:
            return tail_bytes("\n".join(self._lines), MAX_LOG_TAIL_BYTES)

    def _add(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        word = "ERROR" if level == "exception" else level.upper()
        # The result is kept and shown by the federation, so it holds no more than the log does.
        said = "".join(f" {key}={value!r}" for key, value in redact_fields(fields).items())
        line = f"{now} {word} {redact_text(event)}{said}"[-MAX_LOG_TAIL_BYTES:]
        with self._lock:
            self._lines.append(line)
            self._size += len(line) + 1
            # Characters are at least a byte each, so this keeps enough; tail() cuts exactly.
            while self._size - len(self._lines[0]) - 1 >= MAX_LOG_TAIL_BYTES:
                self._size -= len(self._lines.popleft()) + 1
        if self._write is not None:
            self._write(level, event, fields)
