"""`federation audit …`: who did what, and who tried to."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from federation.v1 import access_service_pb2 as pb
from federation_server.console import values
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import Column, to_dict, to_json
from federation_server.console.wording import NOTHING, absolute, clean

app = noun("The audit log: who did what, and who tried to.")

COLUMNS = (
    Column("TIME", folds=True),
    Column("ACTOR", folds=True),
    Column("PEER", folds=True, spare=True),
    Column("METHOD", folds=True),
    Column("OBJECT", folds=True),
    Column("OUTCOME", folds=True),
    Column("REASON", folds=True),
    Column("CHANGE", folds=True, spare=True),
)
LONGEST = 60
"""How much of a value the table shows; `--json` and `export` show all that there is."""

Filter = Annotated[
    str,
    typer.Argument(
        metavar="[FILTER]",
        help="Which entries, by entry_time, actor, role, api_key_id, peer, method, object_type,"
        " object_id, neuron_id, outcome, reason, request_id, call_id, server_id.",
        show_default=False,
    ),
]
Since = Annotated[
    datetime | None,
    typer.Option(
        parser=values.past, metavar="SPAN|TIME", help="From when.", show_default="the beginning"
    ),
]


@leaf(app, "list", example="audit list 'method = DeleteNeuron AND outcome = OK' --since 7d")
def list_entries(
    session: Session,
    filter_text: Filter = "",
    *,
    since: Since = None,
    limit: Limit = 50,
) -> None:
    """The entries, newest first."""
    method = session.federation.access.ListAuditEntries
    request = pb.ListAuditEntriesRequest(filter=_from(filter_text, since))
    nothing = "no entry matches" if request.filter else "there is no entry yet"
    shown = Listing("entries", COLUMNS, _row)
    shown.show(session, method, request, limit=limit, nothing=nothing)


@leaf(app, "export", example="audit export --since 30d 'outcome != OK' > refused.jsonl")
def export(session: Session, filter_text: Filter = "", *, since: Since = None) -> None:
    """All entries, oldest first, as JSON: one a line, with or without --json.

    Whole if the exit code is 0: each entry that there was when it began is in it, once.
    """
    federation, out = session.federation, session.out
    request = pb.ListAuditEntriesRequest(filter=_from(filter_text, since), order_by="entry_time")
    for page in federation.each_page(federation.access.ListAuditEntries, request):
        for entry in page.entries:
            out.object(to_dict(entry))


def _from(filter_text: str, since: datetime | None) -> str:
    """The filter, from that time on. Behind it, so that a fault is where the user sees it; OR
    binds more tightly than AND.
    """
    if since is None:
        return filter_text
    begin = f'entry_time >= "{since.isoformat()}"'
    return f"{filter_text} AND {begin}" if filter_text.strip() else begin


def _row(entry: pb.AuditEntry) -> tuple[str, ...]:
    times = f", {entry.count} times" if entry.count > 1 else ""
    return (
        absolute(entry.entry_time),
        entry.actor,
        entry.peer or NOTHING,
        entry.method.rpartition("/")[2] or NOTHING,
        f"{entry.object_type} {entry.object_id or entry.neuron_id}".strip() or NOTHING,
        entry.outcome + times,
        entry.reason or NOTHING,
        _change(entry),
    )


def _change(entry: pb.AuditEntry) -> str:
    """What was changed, field by field: "lifecycle ACTIVE → DEACTIVATED"."""
    before, after = to_dict(entry.before), to_dict(entry.after)
    parts = []
    for name in sorted({*before, *after}):
        values = [_short(each[name]) for each in (before, after) if name in each]
        parts.append(f"{name} {' → '.join(values)}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    text = clean(value if isinstance(value, str) and value else to_json(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
