"""Follows a command to its end.

A stream that breaks is followed by another one that goes on after the last revision that was
heard: nothing is missed, and nothing is told twice. While a command stands still the federation is
asked why, so that whoever waits knows what for.
"""

from __future__ import annotations

from collections.abc import Iterator

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandState
from federation_server.console.command_progress import View, view_of
from federation_server.console.command_view import FINAL
from federation_server.console.failure import EXIT_FAILED, EXIT_INTERRUPTED
from federation_server.console.leaf import Session
from federation_server.console.order import find_out
from federation_server.console.problem import CallFailure
from federation_server.console.streams import Listener

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
            if not story.known:
                raise _Unheard from None
            _leave(session, story.command_id)
            return EXIT_INTERRUPTED
        except CallFailure as failure:
            view.close()
            if failure.passing and story.known:
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
        self._view: View | None = None

    @property
    def command_id(self) -> str:
        """Empty as long as the command is not ordered."""
        return self.last.command_id or self._named

    @property
    def known(self) -> bool:
        """The federation has said something of it."""
        return bool(self.last.command_id)

    @property
    def over(self) -> bool:
        """The command came to its end."""
        return self.last.state in FINAL

    def tell(self, view: View) -> None:
        """Shows the command after each change, until its end.

        Raises:
            CallFailure: it was refused, or the federation stayed away.
        """
        self._view = view
        for command in Listener(self._session.out, self).messages():
            if command.revision > self.last.revision or not self.known:
                self.last = command
                view.show(command)

    def open(self) -> Iterator[Command]:
        """The command as it is, and after each change, until the stream ends or breaks."""
        federation = self._session.federation
        if self._request is not None and not self.known:
            for executed in federation.follow(federation.commands.ExecuteCommand, self._request):
                yield executed.command
            return
        request = pb.WatchCommandRequest(
            command_id=self.command_id, after_revision=self.last.revision
        )
        for watched in federation.follow(federation.commands.WatchCommand, request):
            yield watched.command

    def wonder(self) -> None:
        """Asks why the command stands still, if it does."""
        view = self._view
        if view is None or not view.wonders or self.last.state not in STANDS_STILL:
            return
        federation = self._session.federation
        request = pb.ExplainCommandRequest(command_id=self.command_id)
        try:
            answer = federation.call(federation.commands.ExplainCommand, request)
        except CallFailure:
            return  # the stream will tell what is the matter, or go on
        if answer.facts and answer.command.revision == self.last.revision:
            view.explain(answer.facts[0])
