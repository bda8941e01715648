"""What a TLS certificate and its key must be to serve with them, and when they must be renewed.

It works on the bytes of PEM files; the time is passed in, and who reads the files says their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

LONGEST_WARNING = timedelta(days=14)
"""A certificate that lives long is due this long before its end; others for their last quarter."""

SHORTEST_RSA_BITS = 1024
"""With a shorter key nobody agrees to a handshake."""

_ODD_KEY = (
    "holds a key of a kind that gRPC cannot serve with:"
    " use EC P-256 (by its name) or RSA (not RSA-PSS) of 2048 bits"
)
_BEGINS = re.compile(rb"-----BEGIN (?:X509 )?CERTIFICATE-----")


class CertificateProblem(ValueError):
    """A file is not what a server can serve with. The text goes on after the file's name."""


class KeyProblem(CertificateProblem):
    """It is the key's file, or it does not fit the certificate."""


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when certificates are all valid."""

    begin_time: datetime
    expire_time: datetime

    @property
    def due_time(self) -> datetime:
        """When it is high time to renew them."""
        quarter = (self.expire_time - self.begin_time) / 4
        return self.expire_time - min(quarter, LONGEST_WARNING)


def read_certificates(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one.

    Raises:
        CertificateProblem: there is none, or one is damaged.
    """
    try:
        known = x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion):
        raise CertificateProblem("holds no certificate in PEM format") from None
    if len(known) < len(_BEGINS.findall(pem)):
        raise CertificateProblem("holds a certificate that is cut off")
    return known


def host_names(pem: bytes) -> tuple[str, ...]:
    """The host names and addresses that a certificate is for.

    Raises:
        CertificateProblem: it cannot be read.
    """
    try:
        names = read_certificates(pem)[0].extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return ()
    hosts = names.value.get_values_for_type(x509.DNSName)
    addresses = names.value.get_values_for_type(x509.IPAddress)
    return (*hosts, *map(str, addresses))


@dataclass(frozen=True, slots=True)
class Pair:
    """A server's certificate with its chain, and its key: PEM that holds nothing else."""

    certificate: bytes
    key: bytes
    validity: Validity


@dataclass(frozen=True, slots=True)
class Authorities:
    """The CAs of clients: PEM that holds nothing else."""

    certificates: bytes
    validity: Validity


def read_pair(certificate: bytes, key: bytes, now: datetime) -> Pair:
    """A server's certificate (with those that follow it in its chain) and its key, written anew:
    what was checked here is then what gRPC reads, whose reader knows fewer ways to write it.

    Raises:
        CertificateProblem: it cannot be read, or is not valid now.
        KeyProblem: the key cannot be read, or belongs to another certificate.
    """
    chain = read_certificates(certificate)
    own = _read_key(key, chain[0])
    return Pair(_to_pem(chain), own, _check_validity(chain, now))


def read_authorities(pem: bytes, now: datetime) -> Authorities:
    """The CAs of clients, and how long those of them that are valid now are all valid.

    Raises:
        CertificateProblem: there is none that is valid now.
    """
    known = read_certificates(pem)
    usable = [each for each in known if each.not_valid_before_utc <= now < _end(each)]
    return Authorities(_to_pem(known), _check_validity(usable or known, now))


def _read_key(pem: bytes, certificate: x509.Certificate) -> bytes:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        public = certificate.public_key()
    except TypeError:
        raise KeyProblem("is encrypted: give the key without a passphrase") from None
    except UnsupportedAlgorithm:
        raise KeyProblem(_ODD_KEY) from None
    except ValueError:
        raise KeyProblem("holds no private key in PEM format") from None
    if not (_serves(key) and _is_plain(certificate)):
        raise KeyProblem(_ODD_KEY)
    if key.public_key() != public:
        raise KeyProblem("does not fit the certificate: name the key that it was made with")
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _serves(key: object) -> bool:
    """Whether gRPC's clients (BoringSSL as it comes) agree to that kind of key."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1))
    return isinstance(key, rsa.RSAPrivateKey) and key.key_size >= SHORTEST_RSA_BITS


def _is_plain(certificate: x509.Certificate) -> bool:
    """Whether its key is written as BoringSSL reads one: not as RSA-PSS, nor as a curve that is
    spelled out in place of its name.
    """
    plain = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return plain in certificate.tbs_certificate_bytes


def _to_pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def _check_validity(certificates: list[x509.Certificate], now: datetime) -> Validity:
    begin = max(each.not_valid_before_utc for each in certificates)
    end = min(map(_end, certificates))
    if now >= end:
        raise CertificateProblem(f"expired on {_moment(end)}")
    if now < begin:
        raise CertificateProblem(f"is not valid before {_moment(begin)}")
    return Validity(begin, end)


def _end(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
