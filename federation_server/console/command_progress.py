"""How a command that is followed looks: lines, on a terminal with a bar below them, or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from federation.v1.command_pb2 import Command, CommandState
from federation.v1.command_service_pb2 import CommandFact
from federation_server.console import command_view, wire
from federation_server.console.render import Output, plain, to_dict
from federation_server.console.wording import clock, coarse, joined, moment, relative, span

BAR_WIDTH = 20


@contextmanager
def view_of(out: Output) -> Iterator[View]:
    """How a command is shown there."""
    if out.json:
        view: View = _JsonLines(out)
    elif out.tty and not out.console.is_dumb_terminal:
        view = _Bar(out)
    else:
        view = View(out)
    try:
        yield view
    finally:
        view.close()


class View:
    """A line for each transition, each progress, and each reason to wait."""

    wonders = True
    """Whether it wants to know why a command stands still."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._progress = ""
        self._why = ""

    def show(self, command: Command) -> None:
        """Shows what is new."""
        self._why = ""
        for transition in command.transitions:
            command_view.line(self._out, transition, command)
        if waits := _waits(command):
            at = clock(command.transitions[-1].transition_time)
            self._out.entry(command_view.head(at, "waits"), waits)
        self._tell_progress(command)

    def explain(self, fact: CommandFact) -> None:
        """Shows why the command stands still; the same reason once."""
        if fact.code == "WAITS_FOR_RETRY" or fact.message == self._why:
            return
        self._why = fact.message
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")[11:23]
        self._out.entry(command_view.head(now, "waits"), _because(fact))

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def end(self, command: Command) -> None:
        """Shows the outcome."""
        command_view.end(self._out, command)

    def _tell_progress(self, command: Command) -> None:
        text = command_view.progress(command)
        if text and text != self._progress and command.state == CommandState.COMMAND_STATE_RUNNING:
            self._progress = text
            at = clock(command.progress.update_time)
            self._out.entry(command_view.head(at, "progress"), text)


class _JsonLines(View):
    """A JSON object for each message."""

    wonders = False

    def show(self, command: Command) -> None:
        """Prints it."""
        self._out.object({"command": to_dict(command)})

    def end(self, command: Command) -> None:
        """The last message has said it all."""


class _Bar(View):
    """Lines for transitions, and a bar below them for the progress."""

    def __init__(self, out: Output) -> None:
        super().__init__(out)
        self._command = Command()
        self._bar = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _Words(self._words),
            console=out.console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _tell_progress(self, command: Command) -> None:
        self._command = command
        running = command.state == CommandState.COMMAND_STATE_RUNNING
        known = running and command.progress.fraction > 0
        self._bar.update(
            self._task,
            total=1.0 if known else None,
            completed=command.progress.fraction,
            refresh=True,
        )

    def _words(self) -> str:
        """What the command does now."""
        command = self._command
        running = command.state == CommandState.COMMAND_STATE_RUNNING
        if command.HasField("next_attempt_time"):
            return f"attempt {command.attempt + 1} of {command.max_attempts} {_until(command)}"
        return joined(
            command_view.attempt(command) if command.max_attempts > 1 and command.attempt else "",
            "" if running and command.progress.message else _STANDS.get(command.state, ""),
            command.progress.message if running else "",
        )


_STANDS = {
    CommandState.COMMAND_STATE_QUEUED: "queued",
    CommandState.COMMAND_STATE_SENT: "sent",
    CommandState.COMMAND_STATE_ACCEPTED: "accepted",
    CommandState.COMMAND_STATE_RUNNING: "running",
    CommandState.COMMAND_STATE_CANCELLING: "cancelling",
}


class _Words(ProgressColumn):
    """Words beside the bar, made anew at each look; cut where the line ends."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__(Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        self._words = words

    def render(self, task: Task) -> Text:
        """What they are now."""
        return plain(self._words())


def _waits(command: Command) -> str:
    """How long the next attempt waits, where the newest transition says that there is one."""
    if not (command.HasField("next_attempt_time") and command.transitions):
        return ""
    since = command.transitions[-1].transition_time.ToDatetime()
    length = span(wire.duration(command.next_attempt_time.ToDatetime() - since) or Duration())
    return f"attempt {command.attempt + 1} of {command.max_attempts} follows after {length}"


def _until(command: Command) -> str:
    at = moment(command.next_attempt_time)
    left = at - datetime.now(UTC) if at else timedelta()
    return f"in {coarse(left)}" if left > timedelta(seconds=1) else "now"


def _because(fact: CommandFact) -> str:
    when = relative(fact.time) if fact.HasField("time") else ""
    return joined(fact.message, when)
