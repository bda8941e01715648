"""`federation batches …`: orders to many neurons."""

from __future__ import annotations

from typing import Annotated

import typer

from federation.v1 import command_service_pb2 as pb
from federation_server.console import batch_progress, batch_view
from federation_server.console.failure import EXIT_FAILED
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import to_dict

app = noun("Orders to many neurons; `federation command batch` makes them.")

BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")]
EXAMPLE_ID = "0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11"


@leaf(app, "list", example="batches list --limit 10")
def list_batches(
    session: Session,
    *,
    limit: Limit = 50,
) -> None:
    """The batches, newest first."""
    method = session.federation.commands.ListCommandBatches
    request = pb.ListCommandBatchesRequest()
    shown = Listing("batches", batch_view.COLUMNS, batch_view.row)
    shown.show(session, method, request, limit=limit, nothing="no batch has been issued yet")


@leaf(app, "show", example=f"batches show {EXAMPLE_ID}")
def show(session: Session, batch: BatchId) -> None:
    """All that became of one batch, and the first of its commands that went wrong."""
    federation, out = session.federation, session.out
    request = pb.GetCommandBatchRequest(batch_id=batch)
    answer = federation.call(federation.commands.GetCommandBatch, request)
    if out.json:
        out.document(answer.batch)
        return
    batch_view.show(out, answer.batch)
    batch_view.unserved(out, answer.batch, batch_progress.failed(session, answer.batch))


@leaf(app, "follow", example=f"batches follow {EXAMPLE_ID}")
def follow(session: Session, batch: BatchId) -> int:
    """Follows a batch to the end of its last command.

    Exit code 0 if all SUCCEEDED, else 1. Ctrl-C leaves the batch running.
    If the federation goes away for a while, this waits for it and goes on.
    """
    return batch_progress.follow(session, batch)


@leaf(app, "cancel", example=f"batches cancel {EXAMPLE_ID} --reason 'wrong filter'")
def cancel(
    session: Session,
    batch: BatchId,
    *,
    reason: Annotated[str, typer.Option(help="Why, for people; the neurons get it too.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until all its commands have ended.")
    ] = False,
) -> int:
    """Cancels every command of a batch that has not ended; nothing of it is sent any more.

    With --follow the exit code is 0 as soon as all have ended, however they did.
    """
    federation, out = session.federation, session.out
    request = pb.CancelCommandBatchRequest(batch_id=batch, reason=reason)
    answer = federation.call(federation.commands.CancelCommandBatch, request)
    if out.json:
        out.object({"batch": to_dict(answer.batch)})
    else:
        batch_view.tell(out, answer.batch)
    if not follow:
        return 0
    code = batch_progress.follow(session, batch)
    return 0 if code == EXIT_FAILED else code
