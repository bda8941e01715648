"""Follows a batch to its end: a line for each change in a pipe, one bar on a terminal, or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import Command, CommandBatch
from federation_server.console import batch_view
from federation_server.console.failure import EXIT_FAILED, EXIT_INTERRUPTED
from federation_server.console.leaf import Session
from federation_server.console.problem import CallFailure
from federation_server.console.render import Output, plain, to_dict
from federation_server.console.streams import Listener


def follow(session: Session, batch_id: str) -> int:
    """Follows a batch. Returns 0 if all its commands SUCCEEDED, else 1; 130 after Ctrl-C.

    Raises:
        CallFailure: there is no such batch, or the federation stayed away.
    """
    story = _Story(session, batch_id)
    with _view_of(session.out) as view:
        try:
            for batch in Listener(session.out, story).messages():
                if batch != story.last:
                    story.last = batch
                    view.show(batch)
        except KeyboardInterrupt:
            view.close()
            _leave(session, batch_id)
            return EXIT_INTERRUPTED
        except CallFailure as failure:
            view.close()
            if failure.passing and story.known:
                _leave(session, batch_id)
            raise
    if not session.out.json:
        end(session, story.last)
    return 0 if batch_view.succeeded(story.last) else EXIT_FAILED


def end(session: Session, batch: CommandBatch) -> None:
    """Prints how a batch has ended, and the first of its commands that went wrong."""
    batch_view.tell(session.out, batch)
    batch_view.unserved(session.out, batch, failed(session, batch))


def failed(session: Session, batch: CommandBatch) -> list[Command]:
    """The first of a batch's commands that went wrong."""
    if not batch_view.failures(batch):
        return []
    federation = session.federation
    request = pb.ListCommandsRequest(filter=batch_view.failed_filter(batch.batch_id))
    method = federation.commands.ListCommands
    answer = federation.pages(method, request, "commands", limit=batch_view.SHOWN_NAMES)
    return list(answer.commands)


def _leave(session: Session, batch_id: str) -> None:
    """Says that the batch goes on, and what can be done."""
    session.out.note("the batch goes on")
    session.out.note(f"  follow it:  federation batches follow {batch_id}")
    session.out.note(f"  cancel it:  federation batches cancel {batch_id}")


class _Story:
    """What has been heard of a batch so far."""

    def __init__(self, session: Session, batch_id: str) -> None:
        self.last = CommandBatch()
        self._session = session
        self._batch_id = batch_id

    @property
    def known(self) -> bool:
        """The federation has said something of it."""
        return bool(self.last.batch_id)

    @property
    def over(self) -> bool:
        """All its commands have ended."""
        return self.last.HasField("end_time")

    def open(self) -> Iterator[CommandBatch]:
        """The batch as it is, and after each change."""
        federation = self._session.federation
        request = pb.WatchCommandBatchRequest(batch_id=self._batch_id)
        for watched in federation.follow(federation.commands.WatchCommandBatch, request):
            yield watched.batch

    def wonder(self) -> None:
        """A batch that stands still is no wonder: some neuron is away, or works."""


@contextmanager
def _view_of(out: Output) -> Iterator[_Lines]:
    if out.json:
        view: _Lines = _JsonLines(out)
    elif out.tty and not out.console.is_dumb_terminal:
        view = _Bar(out)
    else:
        view = _Lines(out)
    try:
        yield view
    finally:
        view.close()


class _Lines:
    """A line for each change."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def show(self, batch: CommandBatch) -> None:
        """Shows how many commands are in which state."""
        at = datetime.now().astimezone().strftime("%H:%M:%S")
        self._out.line(plain(f"{at}  ").append_text(batch_view.states(batch)))

    def close(self) -> None:
        """Leaves the terminal as it was."""


class _JsonLines(_Lines):
    """A JSON object for each message."""

    def show(self, batch: CommandBatch) -> None:
        """Prints it."""
        self._out.object({"batch": to_dict(batch)})


class _Bar(_Lines):
    """One bar for all commands, and their states below it."""

    def __init__(self, out: Output) -> None:
        super().__init__(out)
        self._bar = _StatesBar(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def show(self, batch: CommandBatch) -> None:
        """Moves the bar on."""
        self._bar.batch = batch
        done, total = batch_view.ended(batch), batch_view.total(batch)
        self._bar.update(self._task, completed=done, total=total, refresh=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


class _StatesBar(Progress):
    """A bar with the states of a batch on a line of its own."""

    batch = CommandBatch()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the line."""
        yield from super().get_renderables()
        yield batch_view.states(self.batch)
