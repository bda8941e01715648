"""A private certificate authority (CA) and the certificates that it gives to server and clients.

Everything is EC P-256, which every gRPC client takes. Nothing is read or written here: what is made
is PEM in memory, and the time is passed in. The rules for certificates of other makers are in
`domain/certificate.py`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation_server.domain.certificate import read_certificates

CA_LIFE = timedelta(days=3650)
BACKDATED = timedelta(minutes=5)
"""A certificate begins a little before it is made, for clocks that are behind."""
MAX_COMMON_NAME = 64
"""Characters (RFC 5280, ub-common-name)."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names, so that its own machine reaches it."""


class AuthorityError(ValueError):
    """A CA, or a certificate of it, cannot be made or used; the text says why."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key, both as PEM."""

    certificate: bytes
    key: bytes
    expire_time: datetime
    names: tuple[str, ...] = ()
    """The host names and addresses that it is for; none for a client's."""


class Authority:
    """A CA that can give certificates."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def make(cls, now: datetime) -> Authority:
        """A new CA with a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        # With a number, so that two CAs are told apart in an error's text.
        serial = x509.random_serial_number()
        name = _name(f"Federation private CA {serial:x}"[:MAX_COMMON_NAME])
        certificate = (
            _builder(name, name, key.public_key(), now, now + CA_LIFE)
            .serial_number(serial)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def read(cls, certificate: bytes, key: bytes) -> Authority:
        """The CA of these PEM texts.

        Raises:
            AuthorityError: they are not a CA that was made here, or do not belong together.
        """
        try:
            private = serialization.load_pem_private_key(key, password=None)
            own, *_ = read_certificates(certificate)
        except (ValueError, TypeError):
            raise AuthorityError("its files are damaged, or not those of a CA") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise AuthorityError("its key is not one that `federation tls init` has made")
        if private.public_key() != own.public_key():
            raise AuthorityError("its key does not fit its certificate")
        return cls(own, private)

    @property
    def certificate(self) -> bytes:
        """The CA's own certificate as PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key(self) -> bytes:
        """The CA's private key as PEM. Whoever has it can be anybody."""
        return _pem(self._key)

    @property
    def expire_time(self) -> datetime:
        """When nothing that it has given is taken any more."""
        return self._certificate.not_valid_after_utc

    def server(self, names: Sequence[str], now: datetime, life: timedelta) -> Issued:
        """A certificate for a server that is reached by these names and addresses.

        Raises:
            AuthorityError: one of them is neither a host name nor an address, or the CA has
                expired.
        """
        known = tuple(dict.fromkeys([*names, *LOCAL_NAMES]))
        alternative = x509.SubjectAlternativeName([_general_name(name) for name in known])
        return self._give(
            known[0], now, life, ExtendedKeyUsageOID.SERVER_AUTH, names=known, san=alternative
        )

    def client(self, name: str, now: datetime, life: timedelta) -> Issued:
        """A certificate for a client, for people known by that name.

        Raises:
            AuthorityError: the CA has expired.
        """
        return self._give(name, now, life, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _give(
        self,
        name: str,
        now: datetime,
        life: timedelta,
        use: x509.ObjectIdentifier,
        *,
        names: tuple[str, ...] = (),
        san: x509.SubjectAlternativeName | None = None,
    ) -> Issued:
        if now >= self.expire_time:
            raise AuthorityError(f"the CA expired on {self.expire_time:%Y-%m-%d}")
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(now + life, self.expire_time)
        issuer = self._certificate
        builder = (
            _builder(_name(name[:MAX_COMMON_NAME]), issuer.subject, key.public_key(), now, until)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(_issued_by(issuer), critical=False)
        )
        if san is not None:
            builder = builder.add_extension(san, critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        pem = made.public_bytes(serialization.Encoding.PEM)
        return Issued(pem, _pem(key), made.not_valid_after_utc, names)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issued_by(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _general_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            raise AuthorityError(f"{name!r} is an address of this machine's own network card")
        return x509.IPAddress(address)
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or not all(map(_is_label, labels)):
        raise AuthorityError(f"{name!r} is neither a host name nor an IP address")
    return x509.DNSName(name)


def _is_label(text: str) -> bool:
    plain = text.replace("-", "").replace("_", "")
    return 0 < len(text) < 64 and plain.isascii() and plain.isalnum() and text.strip("-") == text


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
