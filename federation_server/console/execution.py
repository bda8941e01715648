"""`federation command exec`: orders a command and follows it to its end.

The request has one request_id for as long as this runs, so that asking again after a broken stream
follows the same command: what was shown already is not shown again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandState
from federation_server.console import command_view
from federation_server.console.failure import EXIT_INTERRUPTED
from federation_server.console.leaf import Session
from federation_server.console.problem import CallFailure
from federation_server.console.render import Output, to_dict
from federation_server.console.wording import clean, clock, joined, span

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PATIENCE_S = 300.0
"""How long a federation may be away before we stop to ask; the command goes on without us."""


def run(session: Session, request: pb.ExecuteCommandRequest) -> int:
    """Orders, follows, and shows. Returns the exit code.

    Raises:
        CallFailure: it was refused, or the federation stayed away.
    """
    story = _Story()
    with _view(session.out) as view:
        try:
            for command in _messages(session, request, story):
                if story.take(command):
                    view.show(command)
        except KeyboardInterrupt:
            view.close()
            if story.command_id:
                session.out.note(_goes_on(story.command_id))
            return EXIT_INTERRUPTED
        except CallFailure:
            view.close()
            if story.command_id:
                session.out.note(_goes_on(story.command_id))
            raise
        view.close()
        return view.end(story.last)


def _goes_on(command_id: str) -> str:
    return f"the command goes on: federation command show {command_id}"


class _Story:
    """What has been told of the command so far."""

    def __init__(self) -> None:
        self.last = Command()
        self._transitions: set[bytes] = set()
        self._progress = b""

    @property
    def command_id(self) -> str:
        """Empty as long as the federation has not answered."""
        return self.last.command_id

    @property
    def over(self) -> bool:
        """The command came to its end."""
        return self.last.state in command_view.FINAL

    def take(self, command: Command) -> bool:
        """Takes the transitions out that were told before. Returns whether anything is left."""
        new = [
            each
            for each in command.transitions
            if each.SerializeToString(deterministic=True) not in self._transitions
        ]
        self._transitions |= {each.SerializeToString(deterministic=True) for each in new}
        progress = command.progress.SerializeToString(deterministic=True)
        changed = bool(new) or progress != self._progress or command.state != self.last.state
        self._progress = progress
        del command.transitions[:]
        command.transitions.extend(new)
        self.last = command
        return changed


def _messages(
    session: Session, request: pb.ExecuteCommandRequest, story: _Story
) -> Iterator[Command]:
    """The command after each change, over as many streams as it takes."""
    federation = session.federation
    heard = time.monotonic()
    pause = FIRST_PAUSE_S
    told = False
    while True:
        try:
            for message in federation.follow(federation.commands.ExecuteCommand, request):
                heard, pause, told = time.monotonic(), FIRST_PAUSE_S, False
                yield message.command
            if story.over:
                return
        except CallFailure as failure:
            away = time.monotonic() - heard
            if not story.command_id or not failure.passing or away > PATIENCE_S:
                raise
            if not told:
                told = True
                session.out.note(f"federation: {failure.lines[0]}; asking again")
            pause = max(pause, failure.retry_after)
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads callers, hides nothing
        pause = min(pause * 2, LONGEST_PAUSE_S)


@contextmanager
def _view(out: Output) -> Iterator[_Lines]:
    if out.json:
        view: _Lines = _JsonLines(out)
    elif out.tty:
        view = _Bar(out)
    else:
        view = _Lines(out)
    try:
        yield view
    finally:
        view.close()


class _Lines:
    """A line for each transition and each progress."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._progress = ""

    def show(self, command: Command) -> None:
        """Shows what is new."""
        for transition in command.transitions:
            self._out.line(command_view.transition_text(transition))
        text = _progress(command)
        if text and text != self._progress and command.state not in command_view.FINAL:
            self._progress = text
            at = clock(command.progress.update_time)
            self._out.line(f"{at}  {'progress':<11}  {text}")

    def close(self) -> None:
        """Leaves the terminal as it was."""

    def end(self, command: Command) -> int:
        """Shows the outcome. Returns the exit code."""
        took = f" after {span(command.run_duration)}" if command.HasField("run_duration") else ""
        why = f": {command.state_reason}" if command.state_reason else ""
        self._out.line(f"{command.command_id}  {command_view.state(command)}{took}{why}")
        command_view.outcome(self._out, command)
        return _exit_code(command)


class _JsonLines(_Lines):
    """A JSON object for each message."""

    def show(self, command: Command) -> None:
        """Prints it."""
        self._out.object({"command": to_dict(command)})

    def end(self, command: Command) -> int:
        """The last message has said it all."""
        return _exit_code(command)


class _Bar(_Lines):
    """Lines for transitions, and a bar below them for the progress."""

    def __init__(self, out: Output) -> None:
        super().__init__(out)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=out.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def show(self, command: Command) -> None:
        """Shows what is new."""
        for transition in command.transitions:
            self._out.line(command_view.transition_text(transition))
        known = command.HasField("progress")
        self._bar.update(
            self._task,
            description=clean(command.progress.message)[:40] or command_view.state(command),
            total=1.0 if known else None,
            completed=command.progress.fraction,
        )

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def _progress(command: Command) -> str:
    if not command.HasField("progress"):
        return ""
    share = f"{command.progress.fraction:.0%}".replace("%", " %")
    return joined(share, command.progress.message)


def _exit_code(command: Command) -> int:
    return 0 if command.state == CommandState.COMMAND_STATE_SUCCEEDED else 1
