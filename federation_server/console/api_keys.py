"""`federation api-key …`: the keys with which admins and programs call the federation."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from enum import Enum
from typing import Annotated

import typer

from federation.v1 import access_service_pb2 as pb
from federation_server.console import values
from federation_server.console.failure import Failure
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.listing import Limit, Listing
from federation_server.console.render import Column
from federation_server.console.wire import duration, timestamp
from federation_server.console.wording import NOTHING, both, enum, moment, relative

app = noun("API keys, with which admins and programs call the federation.")

CONFIGURED = "admin-env"
"""The key of the servers' ADMIN_API_KEY."""

KEPT_IN = {
    CONFIGURED: "the servers' ADMIN_API_KEY, before their next start",
    "admin": "the file admin.key of the data folder, if the old one is in it",
}
"""Keys whose secrets are read from somewhere, and from where."""

COLUMNS = (
    Column("NAME"),
    Column("ROLE"),
    Column("STATE"),
    Column("EXPIRES"),
    Column("LAST USED"),
    Column("CREATED", spare=True),
    Column("BY", spare=True),
    Column("DESCRIPTION", folds=True),
)


class RoleName(Enum):
    """A role as it is typed."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, as in the list.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The secret and no more.")]


@leaf(app, "create", example="api-key create ci --role operator --ttl 90d")
def create(
    session: Session,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Its name; histories name it, and no other.")
    ],
    *,
    role: Annotated[
        RoleName,
        typer.Option(help="viewer sees, operator commands, admin decides who takes part."),
    ],
    ttl: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.span, metavar="SPAN", help="How long it works.", show_default="for ever"
        ),
    ] = None,
    description: Annotated[str, typer.Option(help="What it is for, for people.")] = "",
    quiet: Quiet = False,
) -> None:
    """Makes a key. Its secret is shown this once: whoever holds it is let in.

    The secret alone goes to stdout, on one line; what else is said goes to stderr.
    """
    federation = session.federation
    request = pb.CreateApiKeyRequest(
        name=name,
        role=pb.Role.Value(f"ROLE_{role.name}"),
        ttl=duration(ttl),
        description=description,
    )
    answer = federation.call(federation.access.CreateApiKey, request)
    key = answer.api_key
    _show_secret(session, answer, f"{key.name}, {_role(key)}, {_end(key)}", quiet=quiet)


@leaf(app, "list", example="api-key list")
def list_keys(
    session: Session,
    *,
    limit: Limit = 50,
) -> None:
    """The keys, newest first, also those that no longer work."""
    method, request = session.federation.access.ListApiKeys, pb.ListApiKeysRequest()
    shown = Listing("api_keys", COLUMNS, _row)
    shown.show(session, method, request, limit=limit, nothing="there is no key")


@leaf(app, "rotate", example="api-key rotate ci --overlap 1h")
def rotate(
    session: Session,
    name: Name,
    *,
    overlap: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.overlap,
            metavar="SPAN",
            help="How long the secret before works too; 0: it ends at once.",
            show_default="24h",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Gives a key a new secret, shown this once. The one before works until the overlap is over.

    The secret alone goes to stdout, on one line; what else is said goes to stderr.
    """
    federation, out = session.federation, session.out
    request = pb.RotateApiKeyRequest(name=name, overlap=duration(overlap))
    answer = federation.call(federation.access.RotateApiKey, request)
    if not out.json and not quiet:
        old = answer.api_key.old_secret_expire_time
        out.note(f"the secret before ends {both(old) if moment(old) else 'now'}")
        if name in KEPT_IN:
            out.note(f"put the new one into {KEPT_IN[name]}")
    _show_secret(session, answer, f"{name}, {_end(answer.api_key)}", quiet=quiet)


@leaf(app, "expire", example="api-key expire ci 7d")
def expire(
    session: Session,
    name: Name,
    at: Annotated[
        datetime,
        typer.Argument(
            parser=values.future, metavar="WHEN", help="A time, or how far ahead it is: 7d."
        ),
    ],
) -> None:
    """Sets when a key stops to work, sooner or later than it would."""
    federation, out = session.federation, session.out
    request = pb.ExpireApiKeyRequest(name=name, expire_time=timestamp(at))
    answer = federation.call(federation.access.ExpireApiKey, request)
    if out.json:
        out.document(answer.api_key)
    else:
        out.line(f"{name} {_end(answer.api_key)}")
        _warn_of_restart(session, name, "from then on ")


@leaf(app, "revoke", example="api-key revoke ci")
def revoke(session: Session, name: Name) -> None:
    """Ends a key for good, within seconds everywhere, and the streams that it has opened."""
    federation, out = session.federation, session.out
    answer = federation.call(federation.access.RevokeApiKey, pb.RevokeApiKeyRequest(name=name))
    if out.json:
        out.document(answer.api_key)
    else:
        used = answer.api_key.last_use_time
        said = f"last used {relative(used)}" if moment(used) else "never used"
        out.line(f"{name} is revoked; it was {said}")
        _warn_of_restart(session, name)


def _warn_of_restart(session: Session, name: str, since: str = "") -> None:
    """An ended key is not brought back by a start, which stops at it."""
    if name == CONFIGURED:
        session.out.note(
            f"{since}no server starts whose ADMIN_API_KEY is still that key: set another, or none"
        )


def _show_secret(
    session: Session,
    answer: pb.CreateApiKeyResponse | pb.RotateApiKeyResponse,
    said: str,
    *,
    quiet: bool,
) -> None:
    out = session.out
    if out.json:
        out.document(answer)
        return
    if not answer.secret:
        raise Failure("the federation made a key and kept its secret to itself")
    if not quiet:
        out.note(said)
        out.note("the secret, shown this once:")
    out.line(answer.secret)


def _row(key: pb.ApiKey) -> tuple[str, ...]:
    return (
        key.name,
        _role(key),
        _state(key),
        relative(key.expire_time) if key.HasField("expire_time") else "never",
        relative(key.last_use_time) if key.HasField("last_use_time") else "never",
        relative(key.create_time),
        key.creator or NOTHING,
        key.description,
    )


def _role(key: pb.ApiKey) -> str:
    return enum(pb.Role, key.role)


def _state(key: pb.ApiKey) -> str:
    if key.HasField("revoke_time"):
        return "revoked"
    if _expired(key):
        return "expired"
    return "two secrets" if key.HasField("old_secret_expire_time") else "good"


def _end(key: pb.ApiKey) -> str:
    if not key.HasField("expire_time"):
        return "never expires"
    verb = "expired" if _expired(key) else "expires"
    return f"{verb} {both(key.expire_time)}"


def _expired(key: pb.ApiKey) -> bool:
    """By this machine's clock; 1970, which `moment` takes for no time, is one to expire at."""
    return key.HasField("expire_time") and key.expire_time.seconds <= time.time()
