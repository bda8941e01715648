"""Follows a command to its end, over as many streams as it takes.

A stream that breaks is followed by another one that goes on after the last revision that was
heard: nothing is missed, and nothing is told twice. While a command stands still the federation is
asked why, so that whoever waits knows what for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandState
from federation_server.console.command_progress import View, view_of
from federation_server.console.command_view import FINAL
from federation_server.console.failure import EXIT_FAILED, EXIT_INTERRUPTED, Failure
from federation_server.console.leaf import Session
from federation_server.console.order import find_out
from federation_server.console.problem import CallFailure

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PATIENCE_S = 300.0
"""How long a federation may be away before we stop to ask; the command goes on without us."""

FIRST_SILENCE_S = 2.0
LONGEST_SILENCE_S = 30.0
"""How long a command may stand still before we ask why, and ask again."""

STANDS_STILL = frozenset(
    {
        CommandState.COMMAND_STATE_QUEUED,
        CommandState.COMMAND_STATE_SENT,
        CommandState.COMMAND_STATE_ACCEPTED,
        CommandState.COMMAND_STATE_CANCELLING,
    }
)
"""The states in which nothing is heard of a command until something else has happened."""


def execute(session: Session, request: pb.ExecuteCommandRequest) -> int:
    """Orders a command and follows it. Returns 0 if it SUCCEEDED, else 1; 130 after Ctrl-C.

    Raises:
        CallFailure: it was refused, or the federation stayed away.
    """
    try:
        return _follow(session, _Story(session, request=request))
    except _Unheard:
        session.out.note(find_out(request.request_id))
        return EXIT_INTERRUPTED


def follow(
    session: Session,
    command_id: str,
    *,
    known: Command | None = None,
    wanted: CommandState.ValueType = CommandState.COMMAND_STATE_SUCCEEDED,
) -> int:
    """Follows a command. Returns 0 if it ended as wanted, else 1; 130 after Ctrl-C.

    Args:
        session: whom to ask, and where to show it.
        command_id: the command.
        known: as it is known to whoever reads; what it has come to by then is not told.
        wanted: the end that is a success.

    Raises:
        CallFailure: there is no such command, or the federation stayed away.
    """
    story = _Story(session, command_id=command_id)
    if known is not None:
        story.last = known
    try:
        return _follow(session, story, wanted)
    except _Unheard:
        return EXIT_INTERRUPTED


class _Unheard(Exception):
    """Ctrl-C before anything was heard of the command."""


def _follow(
    session: Session,
    story: _Story,
    wanted: CommandState.ValueType = CommandState.COMMAND_STATE_SUCCEEDED,
) -> int:
    with view_of(session.out) as view:
        try:
            story.tell(view)
        except KeyboardInterrupt:
            view.close()
            if not story.last.command_id:
                raise _Unheard from None
            _leave(session, story.command_id)
            return EXIT_INTERRUPTED
        except CallFailure as failure:
            view.close()
            if failure.passing and story.last.command_id:
                _leave(session, story.command_id)
            raise
        view.close()
        view.end(story.last)
    return 0 if story.last.state == wanted else EXIT_FAILED


def _leave(session: Session, command_id: str) -> None:
    """Says that the command goes on, and what can be done."""
    session.out.note("the command goes on")
    session.out.note(f"  follow it:  federation command follow {command_id}")
    session.out.note(f"  cancel it:  federation command cancel {command_id}")


class _Story:
    """What has been heard of a command so far, and how the rest comes."""

    def __init__(
        self,
        session: Session,
        *,
        request: pb.ExecuteCommandRequest | None = None,
        command_id: str = "",
    ) -> None:
        """Of a command that there is, or of one that is to be ordered."""
        self.last = Command()
        self._session = session
        self._request = request
        self._named = command_id

    @property
    def command_id(self) -> str:
        """Empty as long as the command is not ordered."""
        return self.last.command_id or self._named

    @property
    def over(self) -> bool:
        """The command came to its end."""
        return self.last.state in FINAL

    def tell(self, view: View) -> None:
        """Shows the command after each change, until its end.

        Raises:
            CallFailure: it was refused, or the federation stayed away.
        """
        heard = time.monotonic()
        pause = FIRST_PAUSE_S
        told = False
        while not self.over:
            try:
                for command in _heard(self._stream, lambda: self._wonder(view)):
                    heard, pause, told = time.monotonic(), FIRST_PAUSE_S, False
                    if command.revision > self.last.revision or not self.last.command_id:
                        self.last = command
                        view.show(command)
            except CallFailure as failure:
                away = time.monotonic() - heard
                if not self.last.command_id or not failure.passing or away > PATIENCE_S:
                    raise
                if not told:
                    told = True
                    self._session.out.note(f"federation: {failure.lines[0]}; asking again")
                pause = max(pause, failure.retry_after)
            if not self.over:
                time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads callers
                pause = min(pause * 2, LONGEST_PAUSE_S)

    def _stream(self) -> Iterator[Command]:
        """The command as it is, and after each change, until the stream ends or breaks."""
        federation = self._session.federation
        if self._request is not None and not self.last.command_id:
            for executed in federation.follow(federation.commands.ExecuteCommand, self._request):
                yield executed.command
            return
        request = pb.WatchCommandRequest(
            command_id=self.command_id, after_revision=self.last.revision
        )
        for watched in federation.follow(federation.commands.WatchCommand, request):
            yield watched.command

    def _wonder(self, view: View) -> None:
        """Asks why the command stands still, if it does."""
        if not view.wonders or self.last.state not in STANDS_STILL:
            return
        federation = self._session.federation
        request = pb.ExplainCommandRequest(command_id=self.command_id)
        try:
            answer = federation.call(federation.commands.ExplainCommand, request)
        except CallFailure:
            return  # the stream will tell what is the matter, or go on
        if answer.facts and answer.command.revision == self.last.revision:
            view.explain(answer.facts[0])


def _heard(
    stream: Callable[[], Iterator[Command]], on_silence: Callable[[], None]
) -> Iterator[Command]:
    """A stream's messages; what is to be done while nothing comes is done in between.

    Raises:
        CallFailure: the stream broke.
    """
    queue: SimpleQueue[Command | Failure | None] = SimpleQueue()

    def listen() -> None:
        try:
            for message in stream():
                queue.put(message)
        except Failure as failure:
            queue.put(failure)
        else:
            queue.put(None)

    # Nobody waits for it: it ends with the channel.
    threading.Thread(target=listen, name="stream", daemon=True).start()
    silence = FIRST_SILENCE_S
    while True:
        try:
            message = queue.get(timeout=silence)
        except Empty:
            silence = min(silence * 2, LONGEST_SILENCE_S)
            on_silence()
            continue
        if message is None:
            return
        if isinstance(message, Failure):
            raise message
        silence = FIRST_SILENCE_S
        yield message
