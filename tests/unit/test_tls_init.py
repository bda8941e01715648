"""`federation tls init`: what it makes, what it never overwrites, and what it says to set next."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from federation_server import cli
from federation_server.domain.certificate import host_names
from tests.support.pki import serial


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tls"


def init(folder: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["tls", "init", "--dir", str(folder), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(folder: Path, *arguments: str) -> str:
    result = init(folder, *arguments)
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fit(folder: Path, name: str) -> None:
    """Fails unless OpenSSL takes the certificate and its key as a pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")


def test_keys_and_the_folder_are_their_owners_alone(folder: Path) -> None:
    assert init(folder, "--client", "ops").exit_code == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    of = modes(folder)
    assert {name: mode for name, mode in of.items() if name.endswith(".key")} == {
        "ca.key": 0o600,
        "server.key": 0o600,
        "client-ops.key": 0o600,
    }
    assert set(of) - {name for name in of if name.endswith(".key")} == {
        "ca.crt",
        "server.crt",
        "client-ops.crt",
    }
    fit(folder, "server")
    fit(folder, "client-ops")


def test_again_it_keeps_the_ca_and_the_names_and_renews_the_servers_certificate(
    folder: Path,
) -> None:
    init(folder, "--host", "fed.example", "--client", "ops")
    before = contents(folder)
    assert "as it was" in init(folder).stdout
    after = contents(folder)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"server.crt", "server.key"}
    assert set(host_names(after["server.crt"])) == set(host_names(before["server.crt"]))
    assert serial(after["server.crt"]) != serial(before["server.crt"])
    fit(folder, "server")


def test_other_hosts_replace_those_before(folder: Path) -> None:
    init(folder, "--host", "old.example")
    init(folder, "--host", "new.example", "--host", "10.0.0.7")
    names = host_names((folder / "server.crt").read_bytes())
    assert set(names) == {"new.example", "10.0.0.7", "localhost", "127.0.0.1", "::1"}


def test_names_that_are_given_up_are_told(folder: Path) -> None:
    assert not init(folder, "--host", "old.example", "--host", "kept.example").stderr
    said = init(folder, "--host", "new.example", "--host", "kept.example").stderr
    assert "the certificate before was for old.example too" in said
    assert "kept.example" not in said
    assert not init(folder).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_renews_is_still_the_folders_owners(folder: Path) -> None:
    init(folder)
    owner = 12345
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner, owner)
    init(folder, "--client", "ops")
    assert {path.name: path.stat().st_uid for path in folder.iterdir()} == dict.fromkeys(
        contents(folder), owner
    )


def test_an_ipv6_address_is_written_as_urls_want_it(folder: Path) -> None:
    said = init(folder, "--host", "2001:db8::1").stdout
    assert "FEDERATION_URL=federations://[2001:db8::1]:50051" in said
    assert "[2001:db8::1]:50051 list" in said
    assert not init(folder, "--host", "2001:DB8:0::1").stderr, "it is the same one"


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_half_a_ca_is_not_overwritten(folder: Path, lost: str) -> None:
    init(folder)
    (folder / lost).unlink()
    before = contents(folder)
    assert lost in fails(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("room", [0, 1], ids=["for no key", "for no certificate"])
def test_a_full_disk_leaves_no_half_of_a_ca(folder: Path, room: int) -> None:
    """A limit of so many blocks of 512 bytes to each file stands for it."""
    command = [sys.executable, "-m", "federation_server.cli", "tls", "init", "--dir", str(folder)]
    limited = ["sh", "-c", f'ulimit -f {room}; exec "$@"', "sh", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"{folder} cannot be used (File too large)" in ended.stderr
    assert contents(folder) == {}
    assert init(folder).exit_code == 0


def test_a_ca_that_is_damaged_is_not_overwritten(folder: Path) -> None:
    init(folder)
    (folder / "ca.key").write_bytes(b"nonsense")
    before = contents(folder)
    assert "it is not overwritten" in fails(folder)
    assert contents(folder) == before


def test_a_folder_that_others_enter_gets_no_keys(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "something").touch()
    assert "chmod 700" in fails(folder)
    assert modes(folder).keys() == {"something"}


def test_an_empty_folder_is_closed_to_others(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    assert init(folder).exit_code == 0
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "fed:50051"], "'fed:50051' is neither a host name nor an IP address"),
        (["--host", "fe80::1%eth0"], "'fe80::1%eth0' is an address of this machine's own"),
        (["--client", "../x"], "--client '../x'"),
    ],
)
def test_a_name_that_cannot_be_is_one_line(folder: Path, arguments: list[str], words: str) -> None:
    assert words in fails(folder, *arguments)
    assert not (folder / "server.crt").exists()


def test_the_port_that_is_set_is_in_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDERATION_PORT", "7777")
    said = init(folder, "--host", "*.fed.example", "--host", "fed.example").stdout
    assert "FEDERATION_URL=federations://fed.example:7777" in said
    assert "fed.example:7777 list" in said
    assert "50051" not in said


def test_it_says_what_to_set_where(folder: Path) -> None:
    said = init(folder, "--host", "fed.example", "--client", "ops").stdout
    for setting in (
        f"FEDERATION_TLS_CERT_FILE={folder}/server.crt",
        f"FEDERATION_TLS_KEY_FILE={folder}/server.key",
        f"FEDERATION_TLS_CLIENT_CA_FILE={folder}/ca.crt",
        "FEDERATION_URL=federations://fed.example:50051",
        f"FEDERATION_CA_FILE={folder}/ca.crt",
        f"FEDERATION_CLIENT_CERT_FILE={folder}/client-ops.crt",
        f"FEDERATION_CLIENT_KEY_FILE={folder}/client-ops.key",
        f"grpcurl -cacert {folder}/ca.crt -cert {folder}/client-ops.crt",
    ):
        assert setting in said, setting
    assert "PRIVATE KEY" not in said


def test_it_lies_in_the_data_folder_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDERATION_DATA_DIR", str(tmp_path / "data"))
    assert CliRunner().invoke(cli.app, ["tls", "init"]).exit_code == 0
    assert (tmp_path / "data/tls/ca.crt").exists()
