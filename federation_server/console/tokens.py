"""`federation token …`: enrollment tokens, with which new neurons register."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from federation.v1 import access_service_pb2 as pb
from federation_server.console import values
from federation_server.console.failure import Failure
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import Column
from federation_server.console.wire import duration
from federation_server.console.wording import both, moment, pairs, relative

app = noun("Enrollment tokens, with which new neurons register.")

COLUMNS = (
    Column("ID"),
    Column("STATE"),
    Column("EXPIRES"),
    Column("USES", right=True),
    Column("FOR", folds=True),
    Column("DESCRIPTION", folds=True),
)


@leaf(app, "create", example="token create --ttl 2h --max-uses 10 --type scraper")
def create(
    session: Session,
    *,
    ttl: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.span, metavar="SPAN", help="How long it works.", show_default="24h"
        ),
    ] = None,
    max_uses: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How many it can enroll; 0: any number.")
    ] = 0,
    neuron_type: Annotated[str, typer.Option("--type", help="Only neurons of this type.")] = "",
    id_pattern: Annotated[
        str, typer.Option(help="Only ids that match; * stands for any text.")
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only neurons with this label; may be repeated."),
    ] = None,
    allow_reenrollment: Annotated[
        bool,
        typer.Option(
            "--allow-reenrollment", help="Also ids that exist; their older tokens stop to work."
        ),
    ] = False,
    description: Annotated[str, typer.Option(help="What it is for, for people.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The secret and no more.")] = False,
) -> None:
    """Makes a token. Its secret is shown this once: give it to neurons as ENROLLMENT_TOKEN.

    The secret alone goes to stdout, on one line; what else is said goes to stderr.
    """
    federation, out = session.federation, session.out
    request = pb.CreateEnrollmentTokenRequest(
        description=description,
        ttl=duration(ttl),
        max_uses=max_uses,
        neuron_type=neuron_type,
        neuron_id_pattern=id_pattern,
        labels=values.labels(label or []),
        allow_reenrollment=allow_reenrollment,
    )
    answer = federation.call(federation.access.CreateEnrollmentToken, request)
    if out.json:
        out.document(answer)
        return
    if not answer.secret:
        raise Failure("the federation made a token and kept its secret to itself")
    token = answer.enrollment_token
    if not quiet:
        out.note(f"token {token.enrollment_token_id}, expires {both(token.expire_time)}")
        out.note(f"enrolls {_uses(token)}, {_pins(token) or 'of any kind'}")
        out.note("the secret, shown this once:")
    out.line(answer.secret)


@leaf(app, "list", example="token list --json")
def list_tokens(
    session: Session,
    *,
    limit: Limit = 50,
) -> None:
    """The tokens, newest first, also those that no longer work."""
    method = session.federation.access.ListEnrollmentTokens
    request = pb.ListEnrollmentTokensRequest()
    shown = Listing("enrollment_tokens", COLUMNS, _row)
    shown.show(session, method, request, limit=limit, nothing="there is no enrollment token")


@leaf(app, "revoke", example="token revoke 0198a3c2-6f1e-7c0d-9a51-3d2f6f0e9b11")
def revoke(
    session: Session,
    token: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as in the list.")],
) -> None:
    """Ends a token. The neurons that it enrolled stay."""
    federation, out = session.federation, session.out
    request = pb.RevokeEnrollmentTokenRequest(enrollment_token_id=token)
    answer = federation.call(federation.access.RevokeEnrollmentToken, request)
    if out.json:
        out.document(answer.enrollment_token)
    else:
        out.line(f"{token} is revoked; it enrolled {answer.enrollment_token.uses}")


def _row(token: pb.EnrollmentToken) -> tuple[str, ...]:
    return (
        token.enrollment_token_id,
        _state(token),
        relative(token.expire_time),
        f"{token.uses}/{token.max_uses}" if token.max_uses else str(token.uses),
        _pins(token),
        token.description,
    )


def _state(token: pb.EnrollmentToken) -> str:
    expires = moment(token.expire_time)
    if token.HasField("revoke_time"):
        return "revoked"
    if expires is not None and expires <= datetime.now(UTC):
        return "expired"
    return "used up" if 0 < token.max_uses <= token.uses else "good"


def _uses(token: pb.EnrollmentToken) -> str:
    if not token.max_uses:
        return "any number of neurons"
    return f"{token.max_uses} {'neuron' if token.max_uses == 1 else 'neurons'}"


def _pins(token: pb.EnrollmentToken) -> str:
    parts = (
        f"type {token.neuron_type}" if token.neuron_type else "",
        f"id {token.neuron_id_pattern}" if token.neuron_id_pattern else "",
        pairs(token.labels.items()),
        "known ids too" if token.allow_reenrollment else "",
    )
    return ", ".join(part for part in parts if part)
