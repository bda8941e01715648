"""The folder of a private CA: ca.crt, ca.key, server.crt, server.key, client-NAME.crt and .key.

The folder is its owner's alone (0700), and so are the keys in it (0600); also if root renews what
belongs to the account of a server. A CA that is there is never overwritten. Every other file is
replaced by a rename, so that a server which reads it meanwhile has the old or the new one in whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from federation_server.console.failure import EXIT_USAGE, Failure
from federation_server.domain.authority import LOCAL_NAMES, Authority, AuthorityError, Issued
from federation_server.domain.certificate import CertificateProblem, host_names

CA = "ca"
SERVER = "server"
CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KEY_MODE = 0o600
_CERTIFICATE_MODE = 0o644


class TlsFolder:
    """One CA's folder."""

    def __init__(self, path: Path) -> None:
        """Makes the folder unless it is there.

        Raises:
            Failure: it cannot be made, or others could read what would be in it.
        """
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_mode & 0o077:
                if any(path.iterdir()):
                    raise Failure(
                        f"others than its owner may enter {path}: `chmod 700` it,"
                        " or name another folder with --dir",
                        exit_code=EXIT_USAGE,
                    )
                path.chmod(0o700)
        except OSError as error:
            raise _unusable(path, error) from None

    def certificate(self, name: str) -> Path:
        """Where a certificate lies."""
        return self.path / f"{name}.crt"

    def key(self, name: str) -> Path:
        """Where its private key lies."""
        return self.path / f"{name}.key"

    def authority(self, now: datetime) -> tuple[Authority, bool]:
        """The folder's CA, and whether it was made now.

        Raises:
            Failure: there is half of one, or one that cannot be used.
        """
        certificate, key = self.certificate(CA), self.key(CA)
        try:
            if not certificate.exists() and not key.exists():
                made = Authority.make(now)
                _create(key, made.key, _KEY_MODE)
                try:
                    _create(certificate, made.certificate, _CERTIFICATE_MODE)
                except BaseException:
                    key.unlink()  # nobody has a certificate of it
                    raise
                return made, True
            for half in (certificate, key):
                if not half.exists():
                    raise Failure(
                        f"{half} is missing, and the CA's other half is not overwritten:"
                        " bring it back, or make another CA with --dir"
                    )
            return Authority.read(certificate.read_bytes(), key.read_bytes()), False
        except AuthorityError as error:
            raise Failure(
                f"the CA in {self.path} cannot be used: {error}; it is not overwritten:"
                " make another one with --dir"
            ) from None
        except OSError as error:
            raise _unusable(self.path, error) from None

    def server_names(self) -> tuple[str, ...]:
        """The names of the server's certificate; if there is none, those that each server has."""
        try:
            return host_names(self.certificate(SERVER).read_bytes())
        except (FileNotFoundError, CertificateProblem):
            return LOCAL_NAMES
        except OSError as error:
            raise _unusable(self.path, error) from None

    def keep(self, name: str, issued: Issued) -> None:
        """Puts a certificate and its key in place of those before.

        Between the two renames they do not fit; a server that runs keeps the old ones meanwhile.
        """
        try:
            _replace(self.key(name), issued.key, _KEY_MODE)
            _replace(self.certificate(name), issued.certificate, _CERTIFICATE_MODE)
        except OSError as error:
            raise _unusable(self.path, error) from None


def issue(
    folder: TlsFolder,
    authority: Authority,
    *,
    hosts: Sequence[str],
    clients: Sequence[str],
    now: datetime,
    life: timedelta,
) -> dict[str, Issued]:
    """Gives the server, and the clients that are named, new certificates in that folder.

    Nothing is written if one of them cannot be made.

    Raises:
        Failure: a name cannot be used, or the folder cannot be written.
    """
    for client in clients:
        if not CLIENT.fullmatch(client):
            raise Failure(
                f"--client {client!r}: use up to 63 letters, digits, '.', '_' and '-'",
                exit_code=EXIT_USAGE,
            )
    try:
        made = {SERVER: authority.server(hosts or folder.server_names(), now, life)}
        made |= {f"client-{each}": authority.client(each, now, life) for each in clients}
    except AuthorityError as error:
        raise Failure(f"no certificate can be made: {error}", exit_code=EXIT_USAGE) from None
    for name, issued in made.items():
        folder.keep(name, issued)
    return made


def _replace(path: Path, content: bytes, mode: int) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    _create(fresh, content, mode)
    fresh.replace(path)


def _create(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that must not be there yet: all of it is on disk when this returns, or none."""
    file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
    try:
        with file:
            if os.geteuid() == 0:
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def _unusable(path: Path, error: OSError) -> Failure:
    return Failure(f"{path} cannot be used ({error.strerror}): name another folder with --dir")
