"""TLS as processes see it: certificates of `federation tls init`, a server, the command line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from tests.e2e.test_up import banner_commands, fails, run, up
from tests.support.pki import Pki, shown_serial
from tests.support.postgres import Server, passable_folder
from tests.support.processes import FEDERATION, FederationProcess, clean_environment
from tests.support.waiting import eventually_sync

EMPTY = (0, "no neuron has registered yet\n")
"""How the list of an empty fleet ends."""


def tls_init(folder: Path, *arguments: str) -> str:
    """What it says."""
    done = subprocess.run(
        [FEDERATION, "tls", "init", "--dir", str(folder / "tls"), *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def said_settings(output: str) -> dict[str, str]:
    """Each VARIABLE=value that a command has printed; of one printed twice, the last."""
    return dict(re.findall(r"(FEDERATION_\w+)=(\S+)", output))


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with passable_folder() as folder:
        yield Pki(folder)


@pytest.fixture(scope="module")
def servers(postgres: Server, pki: Pki) -> Iterator[dict[str, FederationProcess]]:
    """A server of each kind, that every test of the command line here shares."""
    with (
        postgres.database() as url,
        passable_folder() as folder,
        up(folder, "migrate", DATABASE_URL=url) as migrating,
    ):
        assert migrating.ended() == 0
        with (
            up(folder, "serve", DATABASE_URL=url) as plain,
            up(folder, "serve", DATABASE_URL=url, **pki.environment()) as tls,
            up(folder, "serve", DATABASE_URL=url, **pki.environment(mtls=True)) as mutual,
        ):
            started = {"plain": plain, "tls": tls, "mutual": mutual}
            for server in started.values():
                server.says("server_started")
            yield started


def listing(server: FederationProcess, url: str, **environment: str) -> tuple[int, str]:
    """How `federation neurons list` ends at that URL of the server: its exit code, and stderr."""
    done = subprocess.run(
        [FEDERATION, "neurons", "list", "--server", url.format(server.address, port=server.port)],
        env=clean_environment(FEDERATION_DATA_DIR=str(server.data_dir), **environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_what_tls_init_says_to_set_is_enough_for_server_and_command_line(
    folder: Path, postgres: Server
) -> None:
    settings = said_settings(tls_init(folder, "--client", "ops"))
    of_server = {name: file for name, file in settings.items() if "_TLS_" in name}
    of_client = {name: file for name, file in settings.items() if name not in of_server}
    of_client.pop("FEDERATION_URL")
    of_client.pop("FEDERATION_SERVER")
    with postgres.database() as url:
        with up(folder, "migrate", DATABASE_URL=url) as migrating:
            assert migrating.ended() == 0
        with up(folder, "serve", DATABASE_URL=url, **of_server) as server:
            server.says("server_started")
            assert listing(server, "federations://{}", **of_client) == EMPTY
            assert listing(server, "grpcs://localhost:{port}", **of_client) == EMPTY
            before = shown_serial(server.address)
            tls_init(folder)
            assert shown_serial(server.address) != before
            assert listing(server, "federations://{}", **of_client) == EMPTY


def test_up_on_tls_runs_the_demo_neuron_and_its_commands_work_as_printed(
    folder: Path, pki: Pki
) -> None:
    with up(folder, "up", **pki.environment()) as federation:
        output = federation.says("Ctrl-C stops everything")
        assert f"federations://127.0.0.1:{federation.port}" in output
        commands = banner_commands(output)

        def listed() -> bool:
            return "ONLINE" in run(federation, commands[0]).stdout

        eventually_sync(listed, within=30, describe="the demo neuron is online")
        for command in commands:
            done = run(federation, command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_up_on_mtls_runs_the_demo_neuron_with_the_certificate_that_is_named(
    folder: Path, pki: Pki
) -> None:
    named = pki.environment(mtls=True) | pki.client_environment(pki.client())
    with up(folder, "up", **named) as federation:
        commands = banner_commands(federation.says("Ctrl-C stops everything"))

        def listed() -> bool:
            return "ONLINE" in run(federation, commands[0]).stdout

        eventually_sync(listed, within=30, describe="the demo neuron is online")
        assert run(federation, commands[2]).returncode == 0


def test_up_on_mtls_without_a_certificate_says_why_there_is_no_demo_neuron(
    folder: Path, pki: Pki
) -> None:
    with up(folder, "up", **pki.environment(mtls=True)) as federation:
        output = federation.says("Ctrl-C stops everything")
        assert "demo_without_certificate" in output
        assert "Clients show a certificate here: set FEDERATION_CLIENT_CERT_FILE" in output
        assert "demo-neuron" not in output


def test_the_command_line_takes_its_files_from_the_environment(
    servers: dict[str, FederationProcess], pki: Pki
) -> None:
    trusted, known = pki.client_environment(), pki.client_environment(pki.client())
    assert listing(servers["plain"], "{}") == EMPTY
    assert listing(servers["plain"], "federation://{}", **trusted) == EMPTY
    assert listing(servers["tls"], "federations://{}", **trusted) == EMPTY
    assert listing(servers["tls"], "{}", **trusted) == EMPTY
    assert listing(servers["mutual"], "federations://{}", **known) == EMPTY


@dataclass(frozen=True)
class Wrong:
    """A way to get no connection, and what is said of it."""

    server: str
    url: str
    files: str
    words: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("tls", "{}", "none", "if it speaks TLS, write federations://"),
        Wrong("tls", "federations://{}", "none", "from a CA that is not trusted here"),
        Wrong("tls", "federations://{}", "other", "from a CA that is not trusted here"),
        Wrong("plain", "federations://{}", "ca", "speaks plaintext and not TLS"),
        Wrong("mutual", "federations://{}", "ca", "it may ask for a client's certificate"),
        Wrong("mutual", "federations://{}", "half", "belong together: set both or none"),
        Wrong("tls", "federations://{}", "lost", "cannot be read (No such file or directory)"),
        Wrong("tls", "federations://{}", "no pem", "is not in PEM format"),
    ],
    ids=lambda wrong: f"{wrong.files}-{wrong.server}",
)
def test_the_command_line_says_in_one_line_why_it_gets_no_connection(
    servers: dict[str, FederationProcess], pki: Pki, tmp_path: Path, wrong: Wrong
) -> None:
    certificate, _ = pki.client()
    environment: dict[str, str] = {
        "none": {},
        "ca": pki.client_environment(),
        "other": Pki(tmp_path).client_environment(),
        "half": {"FEDERATION_CLIENT_CERT_FILE": str(certificate)},
        "lost": {"FEDERATION_CA_FILE": str(tmp_path / "nowhere")},
        "no pem": {"FEDERATION_CA_FILE": __file__},
    }[wrong.files]
    code, errors = listing(servers[wrong.server], wrong.url, **environment)
    assert code in {2, 3}
    assert wrong.words in errors
    assert len(errors.splitlines()) == 1


def test_an_expired_certificate_is_one_line_that_says_what_to_do(folder: Path, pki: Pki) -> None:
    own = Pki(folder / "pki")
    own.renew(own.server(since=timedelta(days=2)))
    with up(folder, "up", "--no-demo", **own.environment()) as federation:
        fails(federation, "FEDERATION_TLS_CERT_FILE", "expired on", "tls init")
    assert not federation.data_dir.exists(), "it is found out before anything is made"


def test_plaintext_beyond_loopback_is_refused_with_the_way_to_tls(folder: Path) -> None:
    with up(folder, "up", "--no-demo", "--host", "0.0.0.0") as federation:
        fails(federation, "FEDERATION_TLS_CERT_FILE", "federation tls init", "--insecure")


def test_half_of_tls_is_a_setting_that_is_named(folder: Path, pki: Pki) -> None:
    with up(folder, "serve", FEDERATION_TLS_CERT_FILE=str(pki.certificate)) as federation:
        assert federation.ended() == 2
        assert "FEDERATION_TLS_KEY_FILE: must be set" in federation.output
        assert len(federation.output.splitlines()) == 1
