"""A private CA in a folder, whose certificates tests renew, break and show to each other."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509

from federation_server.domain.authority import Authority, Issued

A_DAY = timedelta(days=1)


class Pki:
    """A CA, a server's certificate for loopback, and clients' certificates."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.authority = Authority.make(datetime.now(UTC))
        self.ca = self.write("ca.crt", self.authority.certificate)
        self.certificate, self.key = folder / "server.crt", folder / "server.key"
        self.renew()

    def write(self, name: str, content: bytes) -> Path:
        """A file of the folder, replaced in one step as a good renewal does it."""
        path = self._folder / name
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)
        return path

    def server(
        self, *names: str, since: timedelta = timedelta(), life: timedelta = A_DAY
    ) -> Issued:
        """A certificate for a server, made that long ago."""
        return self.authority.server(names, datetime.now(UTC) - since, life)

    def renew(self, issued: Issued | None = None) -> int:
        """Gives the server another certificate. Returns its serial number."""
        issued = issued or self.server()
        self.write("server.key", issued.key)
        self.write("server.crt", issued.certificate)
        return serial(issued.certificate)

    def client(self, name: str = "n", *, life: timedelta = A_DAY) -> tuple[Path, Path]:
        """The files of a client's certificate and of its key, made now."""
        issued = self.authority.client(name, datetime.now(UTC), life)
        return (
            self.write(f"client-{name}.crt", issued.certificate),
            self.write(f"client-{name}.key", issued.key),
        )

    def settings(self, *, mtls: bool = False) -> dict[str, str]:
        """A server's settings, by their names in Settings."""
        files = {"tls_cert_file": str(self.certificate), "tls_key_file": str(self.key)}
        return files | ({"tls_client_ca_file": str(self.ca)} if mtls else {})

    def environment(self, *, mtls: bool = False) -> dict[str, str]:
        """A server's settings, as variables."""
        return {
            f"FEDERATION_{name.upper()}": file for name, file in self.settings(mtls=mtls).items()
        }

    def client_environment(self, client: tuple[Path, Path] | None = None) -> dict[str, str]:
        """What a neuron or the command line is told."""
        trusted = {"FEDERATION_CA_FILE": str(self.ca)}
        if client is None:
            return trusted
        certificate, key = map(str, client)
        return trusted | {
            "FEDERATION_CLIENT_CERT_FILE": certificate,
            "FEDERATION_CLIENT_KEY_FILE": key,
        }

    def credentials(self, client: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """What a channel speaks TLS with."""
        ca = self.ca.read_bytes()
        if client is None:
            return grpc.ssl_channel_credentials(ca)
        certificate, key = client
        return grpc.ssl_channel_credentials(ca, key.read_bytes(), certificate.read_bytes())


def serial(certificate: bytes) -> int:
    """The serial number of a certificate in PEM."""
    return x509.load_pem_x509_certificate(certificate).serial_number


def shown_serial(address: str) -> int:
    """The serial number of the certificate that a server shows now."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    return serial(pem.encode())
