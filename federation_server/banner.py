"""What `federation up` tells a person once it serves."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from federation_server.console.trust import Trust
from federation_server.settings import Settings, default_data_dir

DEFAULT_URL = "127.0.0.1:50051"
"""What clients call that were told nothing."""

OVERVIEW = "federation.v1.FleetService/GetFleetOverview"


def show_admin_key(settings: Settings, secret: str) -> None:
    """The first admin key, the one time that it is shown."""
    _say("", *_admin_key(settings, secret), "")


def show(
    settings: Settings,
    *,
    admin_key: str | None,
    lost_key: str,
    enrollment_token: str,
    demo: str | None,
    trust: Trust,
) -> None:
    """Where everything is, and three commands to try next.

    admin_key: the first admin key, if it was made now. lost_key: why the file of an earlier one is
    of no use, if it is of none. demo: the id of the demo neuron, if one runs. trust: what clients
    on this machine connect with, on TLS.
    """
    database = "PostgreSQL of DATABASE_URL" if settings.database_url else settings.data_dir
    _say(
        "",
        f"  federation serves  {settings.local_url}",
        f"  data               {database}",
        *_admin_key(settings, admin_key, lost_key),
        f"  enrollment token   {enrollment_token}",
        "                     for 24 h it enrolls neurons, and lets known ones in again:",
        f"                     {_neuron(settings, enrollment_token, trust)}",
        "",
        *_certificate(settings, trust),
        "  Try, in another terminal:",
        "",
        *(f"    {command}" for command in _commands(settings, demo, trust)),
        "",
        "  Ctrl-C stops everything.",
        "",
    )


def _admin_key(settings: Settings, secret: str | None, lost: str = "") -> list[str]:
    if secret is not None:
        return [
            f"  admin key          {secret}",
            f"                     shown this once; kept in {settings.admin_key_file}",
        ]
    if settings.admin_api_key is not None:
        return ["  admin key          the one in ADMIN_API_KEY"]
    if lost:
        return [
            f"  admin key          {lost}: {settings.admin_key_file}",
            "                     name another with --key, or start once with a new ADMIN_API_KEY",
        ]
    return [f"  admin key          kept in {settings.admin_key_file}"]


def _neuron(settings: Settings, token: str, trust: Trust) -> str:
    """How a neuron is started in the folder of its file."""
    named = {"ENROLLMENT_TOKEN": token, **trust.environment()}
    if settings.local_url != DEFAULT_URL:
        named["FEDERATION_URL"] = settings.local_url
    return f"{_assigned(named)}{shlex.quote(sys.executable)} my_neuron.py"


def _certificate(settings: Settings, trust: Trust) -> list[str]:
    """What clients have to do first where they need a certificate and there is none."""
    if settings.tls_client_ca_file is None or trust.has_certificate:
        return []
    return [
        "  Clients show a certificate here: set FEDERATION_CLIENT_CERT_FILE and",
        "  FEDERATION_CLIENT_KEY_FILE first (`federation tls init --client NAME` makes both).",
        "",
    ]


def _assigned(variables: Mapping[str, str]) -> str:
    """Variables before a command of a shell."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())


def _commands(settings: Settings, demo: str | None, trust: Trust) -> list[str]:
    """Commands that work as they are printed, from any folder."""
    programs = Path(sys.executable).parent
    named = dict(trust.environment())
    if settings.admin_api_key is None and settings.data_dir != default_data_dir():
        named["FEDERATION_DATA_DIR"] = str(settings.data_dir.absolute())
    federation = _assigned(named) + shlex.quote(str(programs / "federation"))
    key = _key_argument(settings)
    neuron = demo or "NEURON_ID"
    url = settings.local_url
    server = "" if url == DEFAULT_URL else f" --server {url}"
    return [
        f"{federation} neurons list{server}",
        f"{federation} command exec {neuron} greet name=World{server}",
        f"{_curl(programs, trust)} -d '{{}}' {key} {_web_url(url)}/{OVERVIEW}",
    ]


def _curl(programs: Path, trust: Trust) -> str:
    buf = programs / "buf"
    name = shlex.quote(str(buf)) if buf.exists() else "buf"
    named = {"--cacert": trust.ca_file, "--cert": trust.cert_file, "--key": trust.key_file}
    files = "".join(f" {option} {shlex.quote(file)}" for option, file in named.items() if file)
    plaintext = "" if trust.wanted else " --http2-prior-knowledge"
    return f"{name} curl{plaintext} --protocol grpc{files}"


def _web_url(url: str) -> str:
    """The same address for a program that knows the web's schemes alone."""
    scheme, _, address = url.rpartition("://")
    return f"https://{address}" if scheme == "federations" else f"http://{address}"


def _key_argument(settings: Settings) -> str:
    if settings.admin_api_key is not None:
        return '-H "x-admin-key: $ADMIN_API_KEY"'
    file = shlex.quote(str(settings.admin_key_file.absolute()))
    return f'-H "x-admin-key: $(cat {file})"'


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)  # noqa: T201 - this is what the command is for
