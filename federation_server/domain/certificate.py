"""What a TLS certificate and its key must be to serve with them, and when they must be renewed.

It works on the bytes of PEM files; the time is passed in, and who reads the files says their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

LONGEST_WARNING = timedelta(days=14)
"""A certificate that lives long is due this long before its end; others for their last quarter."""


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
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise CertificateProblem("holds no certificate in PEM format") from None


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


def check_pair(certificate: bytes, key: bytes, now: datetime) -> Validity:
    """How long a server's certificate (with those that follow it in its chain) is valid.

    Raises:
        CertificateProblem: it cannot be read, or is not valid now.
        KeyProblem: the key cannot be read, or belongs to another certificate.
    """
    chain = read_certificates(certificate)
    _check_key(key, chain[0])
    return _check_validity(chain, now)


def check_authorities(pem: bytes, now: datetime) -> Validity:
    """How long the CAs of clients, or those of them that are valid now, are all valid.

    Raises:
        CertificateProblem: there is none that is valid now.
    """
    known = read_certificates(pem)
    usable = [each for each in known if each.not_valid_before_utc <= now < _end(each)]
    return _check_validity(usable or known, now)


def _check_key(pem: bytes, certificate: x509.Certificate) -> None:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise KeyProblem("is encrypted: give the key without a passphrase") from None
    except ValueError:
        raise KeyProblem("holds no private key in PEM format") from None
    if not _serves(key):
        raise KeyProblem("holds a key of a kind that gRPC cannot serve with: use EC P-256 or RSA")
    if key.public_key() != certificate.public_key():
        raise KeyProblem("does not fit the certificate: name the key that it was made with")


def _serves(key: object) -> bool:
    """Whether gRPC's clients (BoringSSL as it comes) agree to that kind of key."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1))
    return isinstance(key, rsa.RSAPrivateKey)


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
