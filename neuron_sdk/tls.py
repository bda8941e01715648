"""The files of a neuron that reaches its federation over TLS, and what failed handshakes mean.

The files are checked when the neuron starts, and read anew for each connection: one that was
renewed counts from the next connection on. gRPC itself is not needed here.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from neuron_sdk.errors import ConfigError
from neuron_sdk.logs import get_logger

CA_FILE = "FEDERATION_CA_FILE"
CERT_FILE = "FEDERATION_CLIENT_CERT_FILE"
KEY_FILE = "FEDERATION_CLIENT_KEY_FILE"
_BEGINS = b"-----BEGIN "

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Whom a neuron trusts, and its own certificate where the federation asks for one."""

    ca: Path | None = None
    """The CAs of the federation's certificate, as PEM; None: those that gRPC trusts by itself."""
    certificate: Path | None = None
    key: Path | None = None
    _last: dict[Path, bytes] = field(default_factory=dict, compare=False, repr=False)

    def check(self) -> None:
        """See whether the files can be used, as far as that shows without a server.

        Raises:
            ConfigError: one cannot; the text names the variable and what is wrong.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            self._first(CA_FILE, self.ca)
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError:
                raise ConfigError(
                    f"{CA_FILE} {self.ca} holds no certificate in PEM format"
                ) from None
        if (self.certificate is None) != (self.key is None):
            missing, there = (KEY_FILE, CERT_FILE) if self.certificate else (CERT_FILE, KEY_FILE)
            raise ConfigError(f"{missing} is not set, and {there} is: set both or none")
        if self.certificate is None or self.key is None:
            return
        self._first(CERT_FILE, self.certificate)
        self._first(KEY_FILE, self.key)
        try:
            # With a password, or OpenSSL asks whoever sits at the terminal for one.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError):
            raise ConfigError(
                f"{CERT_FILE} {self.certificate} and {KEY_FILE} {self.key} cannot be used: give a "
                "certificate in PEM format, and its own key without a passphrase"
            ) from None

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The CAs, the key and the certificate, as gRPC takes them.

        A file that cannot be read any more, or holds nothing, is as it was the last time; `check`
        comes first.
        """
        return self._content(self.ca), self._content(self.key), self._content(self.certificate)

    def _first(self, variable: str, path: Path) -> None:
        try:
            self._last[path] = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{variable} {path} cannot be read: {error.strerror}") from None

    def _content(self, path: Path | None) -> bytes | None:
        if path is None:
            return None
        try:
            content = path.read_bytes()
            if _BEGINS not in content:  # to gRPC no CAs means the public ones
                raise ValueError("it holds nothing in PEM format")
            self._last[path] = content
        except (OSError, ValueError) as error:
            _log.warning(
                "a file for TLS cannot be read; what it held before is used",
                action="tls.unreadable",
                file=str(path),
                error=str(error),
            )
        return self._last[path]


def is_loopback(target: str) -> bool:
    """Whether "host:port" is this machine."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_MEANINGS = {
    "WRONG_VERSION_NUMBER": "the federation speaks plaintext, and FEDERATION_URL asks for TLS, "
    "as an address without a scheme does beyond loopback: set up TLS on the server, or write "
    "federation:// before the address",
    "certificate has expired": "the federation's certificate has expired: it must be renewed there",
    "certificate is not yet valid": "the federation's certificate is not valid yet: is the clock "
    "of this machine right?",
    "CERTIFICATE_VERIFY_FAILED": "the federation's certificate is from a CA that is not trusted "
    f"here: set {CA_FILE} to the file of its CA",
    "Hostname Verification": "the federation's certificate is not for the name in FEDERATION_URL: "
    "use one of its names, or have this one added to it",
    "create security handshaker": f"what is in {CA_FILE}, {CERT_FILE} or {KEY_FILE} is damaged or "
    "does not fit together",
    "handshake failed": "there was no agreement on TLS",
}
"""What gRPC says of a handshake, to look for in this order; and what it means."""
_CLOSED = "Socket closed"


def handshake_problem(message: str) -> str:
    """What is wrong with a handshake, by what gRPC says of it; "" if it was none that failed."""
    found = (meaning for sign, meaning in _MEANINGS.items() if sign.lower() in message.lower())
    return next(found, "")


def explain(message: str, *, tls: bool) -> str:
    """What gRPC says of a connection that came to nothing, in words that help; else as it was."""
    problem = handshake_problem(message) if tls else ""
    if problem:
        return problem
    if "Failed parsing HTTP/2" in message:
        return "what answers at FEDERATION_URL does not speak gRPC: is its port right?"
    if not ("failed to connect" in message and _CLOSED in message):
        return message
    if tls:
        return (
            f"the federation closed the connection: it may ask for a certificate ({CERT_FILE} and "
            f"{KEY_FILE}), or not take this one"
        )
    return (
        "what answers at FEDERATION_URL closed the connection: if it speaks TLS, write "
        "federations:// in it"
    )
