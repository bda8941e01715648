"""The files that a client on TLS needs: whom it trusts, and its own certificate where it needs one.

They come from the environment, under the names that neurons use as well. gRPC is not needed here,
so that what starts a client can read them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from federation_server.console.failure import EXIT_USAGE, Failure

CA_FILE = "FEDERATION_CA_FILE"
CERT_FILE = "FEDERATION_CLIENT_CERT_FILE"
KEY_FILE = "FEDERATION_CLIENT_KEY_FILE"


@dataclass(frozen=True)
class Trust:
    """The files of one client; "" for one that was not named."""

    ca_file: str = ""
    """The CAs of the server; "": those that the system trusts."""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def from_environment(cls) -> Trust:
        """What the environment names."""
        return cls(_named(CA_FILE), _named(CERT_FILE), _named(KEY_FILE))

    @property
    def wanted(self) -> bool:
        """Whether somebody has named a file, and so expects TLS."""
        return bool(self.ca_file or self.cert_file or self.key_file)

    @property
    def has_certificate(self) -> bool:
        """Whether a server that asks for a client's certificate gets one."""
        return bool(self.cert_file and self.key_file)

    def environment(self) -> Mapping[str, str]:
        """The variables that name these files."""
        named = {CA_FILE: self.ca_file, CERT_FILE: self.cert_file, KEY_FILE: self.key_file}
        return {name: file for name, file in named.items() if file}

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The CAs, the key and the certificate, as gRPC takes them.

        Raises:
            Failure: one cannot be read, or only one of certificate and key is named.
        """
        if bool(self.cert_file) != bool(self.key_file):
            raise Failure(
                f"{CERT_FILE} and {KEY_FILE} belong together: set both or none",
                exit_code=EXIT_USAGE,
            )
        return (
            _content(CA_FILE, self.ca_file),
            _content(KEY_FILE, self.key_file),
            _content(CERT_FILE, self.cert_file),
        )


def _named(variable: str) -> str:
    """The file's path from anywhere; "" if none is named."""
    file = os.environ.get(variable, "").strip()
    return str(Path(file).expanduser().absolute()) if file else ""


def _content(variable: str, file: str) -> bytes | None:
    if not file:
        return None
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise Failure(
            f"{variable}: {file} cannot be read ({error.strerror})", exit_code=EXIT_USAGE
        ) from None
    if b"-----BEGIN " not in content:
        raise Failure(f"{variable}: {file} is not in PEM format", exit_code=EXIT_USAGE)
    return content
