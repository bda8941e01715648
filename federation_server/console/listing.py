"""Lists: what is asked for page by page, and shown as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message

from federation_server.console.leaf import Session
from federation_server.console.render import Column

Limit = Annotated[int, typer.Option(min=0, help="At most this many; 0: all.")]


@dataclass(frozen=True)
class Listing:
    """How a list is shown."""

    items: str
    """The response's field that holds them."""
    columns: Sequence[Column]
    row: Callable[[Any], Sequence[str]]
    """Makes the cells of one item."""

    def show(
        self,
        session: Session,
        method: grpc.UnaryUnaryMultiCallable[Any, Any],
        request: Message,
        *,
        limit: int,
        nothing: str,
    ) -> None:
        """Asks for a list and prints it: as a table, or as one JSON document.

        Args:
            session: what the command works with.
            method: an RPC with AIP-158 pages.
            request: its request, without a page.
            limit: no more than this many; 0: all.
            nothing: what is said of an empty list.

        Raises:
            CallFailure: the federation did not answer as wanted.
        """
        out = session.out
        answer = session.federation.pages(method, request, self.items, limit=limit)
        found = getattr(answer, self.items)
        if out.json:
            out.document(answer)
        elif not found:
            out.note(nothing)
        else:
            out.table(self.columns, map(self.row, found))
            if answer.next_page_token:
                out.note(f"the first {limit}; there are more (--limit 0 shows all)")
