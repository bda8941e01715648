"""What a handler gets besides its data: who called it, a log, and a way to say how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from neuron_sdk.outcome import MAX_LOG_TAIL_BYTES
from neuron_sdk.payload import (
    MAX_DETAILS_BYTES,
    MAX_DETAILS_DEPTH,
    JsonObject,
    NotJson,
    TooLarge,
    clean_text,
    plain_object,
    tail_bytes,
)
from neuron_sdk.redaction import redact_fields, redact_text

MAX_PROGRESS_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command is."""

    fraction: float
    """The share that is done, 0 to 1."""
    message: str
    """What is being done, for people."""
    checkpoint: JsonObject | None = None
    """What the next attempt needs to go on from here; None: what was noted before stays."""


Report = Callable[[Progress], "Future[None] | None"]
"""Takes progress, in any thread. For one with a checkpoint the answer is done once it is kept."""

_LOOK_AGAIN_S = 0.5


class CommandContext:
    """One run of one command, as its handler sees it. Every method may be called in any thread."""

    __slots__ = (
        "_cancelled",
        "_reason",
        "attempt",
        "cancel_seen",
        "checkpoint",
        "command_id",
        "log",
        "max_attempts",
        "report",
        "type",
    )

    def __init__(
        self,
        *,
        command_id: str,
        attempt: int,
        type: str,  # noqa: A002 - the contract's word
        report: Report,
        write_log: Callable[[str, str, dict[str, Any]], None] | None = None,
        max_attempts: int = 1,
        checkpoint: JsonObject | None = None,
    ) -> None:
        """`write_log` takes level, event and fields, in any thread."""
        self.command_id = command_id
        """The command's id."""
        self.attempt = attempt
        """Which attempt this is, from 1."""
        self.max_attempts = max_attempts
        """How many attempts there may be. If this one fails, the federation tries the next."""
        self.checkpoint = checkpoint
        """What an earlier attempt noted last by `progress(…, checkpoint=…)`; None for nothing."""
        self.type = type
        """The command's type."""
        self.log = CommandLog(write_log)
        """A log; its last lines travel with the command's result."""
        self.cancel_seen = False
        """Whether the handler has seen `cancelled` true; the SDK reads it."""
        self.report = report
        """Takes progress as it is; the SDK calls it."""
        self._cancelled = threading.Event()
        self._reason = ""

    @property
    def cancelled(self) -> bool:
        """True once the command should end: somebody cancelled it, its time is over, or the
        neuron stops; `cancel_reason` says which. A coroutine gets CancelledError as well. A
        function may look at it between two steps and return: nothing, if it gave up, and then the
        command ends as CANCELLED; or its answer, if the work is done all the same.

        What goes on for 3 s after this is interrupted: by CommandInterrupted inside a function,
        by another CancelledError in a coroutine. A process that goes on after that is killed.
        """
        if not self._cancelled.is_set():
            return False
        self.cancel_seen = True
        return True

    @property
    def cancel_reason(self) -> str:
        """Why the command should end, for people; "" as long as it should not."""
        return self._reason if self.cancelled else ""

    def cancel(self, reason: str) -> None:
        """Ask the handler to end; the SDK calls it."""
        if not self._cancelled.is_set():
            self._reason = reason
            self._cancelled.set()

    def progress(
        self, fraction: float, message: str = "", *, checkpoint: Mapping[str, Any] | None = None
    ) -> _Told:
        """Say how far the command is: `await ctx.progress(0.5, "half")`.

        It may be called as often as is convenient: what follows fast is sent by its newest only.
        The await gives way to other coroutines for a moment and never waits for the network. In a
        thread call it without await, or as `progress_sync`.

        Args:
            fraction: the share that is done; below 0 counts as 0, above 1 as 1.
            message: what is being done, for people; cut at 1024 characters.
            checkpoint: what another attempt needs to go on from here, as JSON, at most 64 KiB and
                16 levels deep; it gets the newest one as `ctx.checkpoint`. With it, the call (in a
                coroutine: its await) returns when the checkpoint is on the neuron's disk (or in its
                memory, as long as the disk takes nothing).

        Raises:
            ValueError: the fraction is NaN, or the checkpoint cannot be kept; the text says why.
            CommandInterrupted: the command has ended, so that no checkpoint is taken any more.
        """
        kept = self.report(_progress(fraction, message, checkpoint))
        if kept is not None and not _in_loop():
            _wait(kept)
        return _Told(kept)

    def progress_sync(
        self, fraction: float, message: str = "", *, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        """As `progress`, for handlers that are not coroutines."""
        kept = self.report(_progress(fraction, message, checkpoint))
        if kept is not None:
            _wait(kept)


def _progress(fraction: float, message: str, checkpoint: Mapping[str, Any] | None) -> Progress:
    share = float(fraction)
    if math.isnan(share):
        raise ValueError("fraction is NaN: give the share that is done, 0 to 1")
    text = clean_text(str(message), MAX_PROGRESS_MESSAGE)
    return Progress(min(max(share, 0.0), 1.0), text, _checkpoint(checkpoint))


def _checkpoint(value: Mapping[str, Any] | None) -> JsonObject | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"the checkpoint is a {type(value).__name__}: give a dict")
    try:
        return plain_object(value, max_bytes=MAX_DETAILS_BYTES, max_depth=MAX_DETAILS_DEPTH)
    except (NotJson, TooLarge) as error:
        raise ValueError(f"the checkpoint cannot be kept: {error}") from None


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _wait(kept: Future[None]) -> None:
    # In short waits, between which an interrupt of this thread can strike.
    while not kept.done():
        with contextlib.suppress(TimeoutError):
            kept.result(_LOOK_AGAIN_S)
    kept.result()


class _Told:
    """What `progress` returns: awaiting it lets others run; not awaiting it is fine too."""

    __slots__ = ("_kept",)

    def __init__(self, kept: Future[None] | None) -> None:
        self._kept = kept

    def __await__(self) -> Generator[Any, None, None]:
        if self._kept is None:
            return asyncio.sleep(0).__await__()
        # Shielded: a checkpoint is kept, also if whoever waits for it is cancelled.
        return asyncio.shield(asyncio.wrap_future(self._kept)).__await__()


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
