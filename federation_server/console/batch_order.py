"""`federation command batch`: the same order for many neurons, with a preview before it."""

from __future__ import annotations

import sys

import typer

from federation.v1 import command_service_pb2 as pb
from federation.v1.command_pb2 import CommandBatch
from federation_server.console import batch_progress, batch_view
from federation_server.console.failure import EXIT_USAGE, Failure
from federation_server.console.leaf import Session
from federation_server.console.order import perhaps_issued
from federation_server.console.problem import CallFailure
from federation_server.console.render import to_dict


def issue(
    session: Session,
    request: pb.IssueCommandBatchRequest,
    *,
    confirmed: bool,
    follow: bool,
) -> int:
    """Shows whom an order would reach, asks, orders, and follows it. Returns the exit code.

    Args:
        session: whom to ask, and where to show it.
        request: the order; a dry run ends after the preview.
        confirmed: nobody has to be asked.
        follow: go on to the end of the last command.

    Raises:
        Failure: it was refused, or there is nobody to ask.
    """
    federation, out = session.federation, session.out
    method = federation.commands.IssueCommandBatch
    trial = pb.IssueCommandBatchRequest()
    trial.CopyFrom(request)
    trial.dry_run = True
    seen = federation.call(method, trial)
    if seen.batch.batch_id:
        out.note(f"{request.request_id} was ordered before: batch {seen.batch.batch_id}")
        return _go_on(session, seen.batch, follow=follow)
    if not out.json:
        batch_view.preview(out, request, seen)
    elif request.dry_run:
        out.document(seen)
    else:
        out.object({"preview": to_dict(seen)})
    if request.dry_run:
        return 0
    if not (confirmed or _agreed(batch_view.total(seen.batch))):
        out.note("nothing is ordered")
        return 1
    try:
        answer = federation.call(method, request)
    except CallFailure as failure:
        raise perhaps_issued(failure, request.request_id) from None
    matched, before = batch_view.total(answer.batch), batch_view.total(seen.batch)
    if matched != before:
        out.note(f"{batch_view.neurons(matched)} got it: the fleet has changed meanwhile")
    return _go_on(session, answer.batch, follow=follow)


def _agreed(count: int) -> bool:
    """Whether whoever sits at the terminal wants it.

    Raises:
        Failure: there is no terminal.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failure(
            "nothing is ordered: there is no terminal to ask at; say --yes to order it",
            exit_code=EXIT_USAGE,
        )
    return typer.confirm(f"Order it for {batch_view.neurons(count)}?", err=True)


def _go_on(session: Session, batch: CommandBatch, *, follow: bool) -> int:
    """Shows an issued batch, and follows it if that is wanted."""
    out = session.out
    if not out.json:
        batch_view.tell(out, batch)
    elif not follow:
        out.object({"batch": to_dict(batch)})
    return batch_progress.follow(session, batch.batch_id) if follow else 0
