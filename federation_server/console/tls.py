"""`federation tls …`: a private CA and certificates for a first deployment.

It asks no federation and needs no key: what it makes lies in a folder.
"""

from __future__ import annotations

import os
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from federation_server.console import tls_folder
from federation_server.console.failure import Failure
from federation_server.console.leaf import noun, report
from federation_server.console.tls_folder import CA, SERVER, TlsFolder
from federation_server.console.trust import CA_FILE, CERT_FILE, KEY_FILE
from federation_server.domain.authority import Authority, Issued
from federation_server.domain.certificate import host_names
from federation_server.settings import default_data_dir

app = noun("TLS certificates for a first deployment, from a private CA.")

_EPILOG = (
    "Example:  federation tls init --host fed.example.com --client ops\n\n"
    "Exit codes: 0 done; 1 the folder or its CA cannot be used; 2 wrong usage."
)


@app.command("init", epilog=_EPILOG)
def init(
    *,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where the CA and the certificates lie.",
            show_default="tls in FEDERATION_DATA_DIR",
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME_OR_IP",
            help="What clients call the server by, beside localhost: every name, each with a "
            "--host. Those before that are not among them are given up.",
            show_default="as before",
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Make a client's certificate of that name too, for mTLS; may be repeated.",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long the new certificates are valid.")
    ] = 365,
) -> None:
    """Makes a private CA, and a certificate for the server; again, to renew what the CA gave.

    A CA that is there is used and never overwritten. A running server takes the renewed certificate
    for new connections, and keeps the streams that are open.
    """
    now = datetime.now(UTC)
    try:
        place = TlsFolder(folder.absolute() if folder else _default_folder())
        authority, is_new = place.authority(now)
        before = place.server_names()
        made = tls_folder.issue(
            place,
            authority,
            hosts=host or (),
            clients=client or (),
            now=now,
            life=timedelta(days=days),
        )
    except Failure as failure:
        report(failure)
        raise typer.Exit(failure.exit_code) from None
    for line in _told(place, authority, made, is_new=is_new):
        typer.echo(line)
    now_for = host_names(made[SERVER].certificate)
    gone = [name for name in before if name not in now_for]
    if gone:
        typer.echo(_gone(gone), err=True)


def _default_folder() -> Path:
    named = os.environ.get("FEDERATION_DATA_DIR")
    return (Path(named).absolute() if named else default_data_dir()) / "tls"


def _told(
    place: TlsFolder, authority: Authority, made: dict[str, Issued], *, is_new: bool
) -> list[str]:
    """What was made, and what to set next."""
    ca = _quoted(place.certificate(CA))
    how = "made now" if is_new else "as it was"
    lines = [f"{ca}: the CA, {how}, until {authority.expire_time:%Y-%m-%d}"]
    for name, issued in made.items():
        whom = f"for {', '.join(issued.names)}" if issued.names else "for a client"
        where = _quoted(place.certificate(name))
        lines.append(f"{where}: {whom}, until {issued.expire_time:%Y-%m-%d}")
    clients = [name for name in made if name != SERVER]
    return [*lines, "", *_for_server(place), "", *_for_clients(place, made[SERVER], clients)]


def _gone(names: list[str]) -> str:
    whom = ", ".join(names)
    return (
        f"federation: the certificate before was for {whom} too: clients that use that name do not"
        " connect any more; run this again with a --host for every name to bring it back"
    )


def _for_server(place: TlsFolder) -> list[str]:
    return [
        "The server:",
        f"  FEDERATION_TLS_CERT_FILE={_quoted(place.certificate(SERVER))}",
        f"  FEDERATION_TLS_KEY_FILE={_quoted(place.key(SERVER))}",
        "and, to let in clients with a certificate alone (--client makes them):",
        f"  FEDERATION_TLS_CLIENT_CA_FILE={_quoted(place.certificate(CA))}",
    ]


def _for_clients(place: TlsFolder, server: Issued, clients: list[str]) -> list[str]:
    called = [name for name in server.names if not name.startswith("*")]
    name, ca = called[0], _quoted(place.certificate(CA))
    host = f"[{name}]" if ":" in name else name
    address = f"{host}:{os.environ.get('FEDERATION_PORT') or 50051}"
    url = f"federations://{address}"
    lines = [
        f"Neurons, with a copy of {ca}:",
        f"  FEDERATION_URL={url} {CA_FILE}=ca.crt",
        "This command line:",
        f"  FEDERATION_SERVER={url} {CA_FILE}={ca}",
    ]
    curl = f"grpcurl -cacert {ca}"
    for name in clients[:1]:
        certificate, key = _quoted(place.certificate(name)), _quoted(place.key(name))
        lines += ["Both, where the server asks for a certificate:"]
        lines += [f"  {CERT_FILE}={certificate} {KEY_FILE}={key}"]
        curl += f" -cert {certificate} -key {key}"
    return [
        *lines,
        "grpcurl:",
        f'  {curl} -H "x-admin-key: $KEY" {address} list',
        "",
        f"Keep {_quoted(place.key(CA))} apart: who has it makes certificates that are trusted.",
        "Run this again before the certificates expire.",
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
