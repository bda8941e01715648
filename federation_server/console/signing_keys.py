"""`federation keys …`: the keys that sign neurons' tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from federation.v1 import access_service_pb2 as pb
from federation_server.console import values
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import Column
from federation_server.console.wire import duration
from federation_server.console.wording import coarse, moment, relative

app = noun("The keys that sign neurons' tokens.")

COLUMNS = (Column("KID"), Column("STATE"), Column("CREATED"), Column("RETIRES"))


@leaf(app, "list", example="keys list")
def list_keys(
    session: Session,
    *,
    limit: Limit = 50,
) -> None:
    """The keys, newest first, also those that have retired."""
    method, request = session.federation.access.ListSigningKeys, pb.ListSigningKeysRequest()
    shown = Listing("signing_keys", COLUMNS, _row)
    shown.show(session, method, request, limit=limit, nothing="there is no key")


@leaf(app, "rotate", example="keys rotate")
def rotate(
    session: Session,
    *,
    overlap: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.overlap,
            metavar="SPAN",
            help="How long the keys before stay good; 0: they end at once, and neurons have to"
            " enroll anew.",
            show_default="as long as a token is of use",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Makes a new key, which signs from now on. With the default overlap no neuron is refused.

    Asks first if the overlap is given: neurons whose tokens it ends too soon come back with an
    enrollment token that allows re-enrollment, and not before.
    """
    federation, out = session.federation, session.out
    if overlap is not None and not yes and not typer.confirm(_question(overlap), err=True):
        out.note("no key is made")
        raise typer.Exit(1)
    request = pb.RotateSigningKeyRequest(overlap=duration(overlap))
    answer = federation.call(federation.access.RotateSigningKey, request)
    if out.json:
        out.document(answer.signing_key)
    else:
        out.line(f"{answer.signing_key.kid} signs from now on")


def _question(overlap: timedelta) -> str:
    until = f"in {coarse(overlap)}" if overlap else "now"
    return (
        f"End {until} every neuron's token that is not renewed by then? Such neurons have to enroll"
        " again, with a token made with --allow-reenrollment."
    )


def _row(key: pb.SigningKey) -> tuple[str, ...]:
    retires = key.HasField("retire_time")
    return (
        key.kid,
        _state(key),
        relative(key.create_time),
        relative(key.retire_time) if retires else "",
    )


def _state(key: pb.SigningKey) -> str:
    retires = moment(key.retire_time)
    if retires is None:
        return "signs"
    return "retired" if retires <= datetime.now(UTC) else "verifies"
