"""A server's certificate: what it must be, and how its files are followed while it is in use."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from structlog.testing import capture_logs

from federation_server.domain.authority import Authority, AuthorityError
from federation_server.domain.certificate import host_names, read_pair
from federation_server.live.certificates import (
    SETTLES_WITHIN,
    Certificates,
    CertificateUnusable,
)
from federation_server.live.metrics import Metrics
from federation_server.settings import TlsFiles
from tests.support.pki import A_DAY, Pki

METRIC = "federation_tls_certificate_expire_time_seconds"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def files(pki: Pki, *, mtls: bool = False) -> TlsFiles:
    return TlsFiles(pki.certificate, pki.key, pki.ca if mtls else None)


def actions(logs: list[Any]) -> list[str]:
    return [line["action"] for line in logs]


def edited(pem: bytes, old: bytes, new: bytes) -> bytes:
    """A PEM text in whose content some bytes are replaced."""
    begin, *lines, end = pem.decode().splitlines()
    der = base64.b64decode("".join(lines))
    assert old in der
    content = base64.b64encode(der.replace(old, new)).decode()
    return "\n".join([begin, *textwrap.wrap(content, 64), end, ""]).encode()


def pem(key: Any, password: bytes | None = None) -> bytes:
    how = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(encoding, form, how))


# ---- what it must be


def missing(pki: Pki) -> None:
    pki.certificate.unlink()


def other_key(pki: Pki) -> None:
    pki.write("server.key", pki.server().key)


def expired(pki: Pki) -> None:
    pki.renew(pki.server(since=timedelta(days=3)))


def to_come(pki: Pki) -> None:
    pki.renew(pki.server(since=timedelta(days=-3)))


def no_pem(pki: Pki) -> None:
    pki.write("server.crt", b"nonsense")


def no_key(pki: Pki) -> None:
    pki.write("server.key", pki.certificate.read_bytes())


def encrypted(pki: Pki) -> None:
    key = serialization.load_pem_private_key(pki.key.read_bytes(), None)
    pki.write("server.key", pem(key, b"secret"))


def odd_key(pki: Pki) -> None:
    pki.write("server.key", pem(ed25519.Ed25519PrivateKey.generate()))


def odd_curve(pki: Pki) -> None:
    pki.write("server.key", pem(ec.generate_private_key(ec.SECP521R1())))


def unheard_of_curve(pki: Pki) -> None:
    p256, prime239v1 = (bytes.fromhex(f"06082a8648ce3d0301{last}") for last in ("07", "04"))
    pki.write("server.key", edited(pki.key.read_bytes(), p256, prime239v1))


def rsa_pss(pki: Pki) -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + A_DAY).sign(
        key, hashes.SHA256()
    )
    rsa_plain, pss = (bytes.fromhex(f"2a864886f70d0101{last}") for last in ("010500", "0a3000"))
    own = made.public_bytes(serialization.Encoding.PEM)
    pki.write("server.crt", edited(own, rsa_plain, pss))
    pki.write("server.key", pem(key))


def cut_off(pki: Pki) -> None:
    ca = pki.authority.certificate
    pki.write("server.crt", pki.certificate.read_bytes() + ca[: len(ca) // 2])


def old_ca(pki: Pki) -> None:
    then = datetime.now(UTC) - timedelta(days=4000)
    pki.write("ca.crt", Authority.make(then).certificate)


@pytest.mark.parametrize(
    ("break_it", "setting", "words"),
    [
        (missing, "FEDERATION_TLS_CERT_FILE", "cannot be read (No such file"),
        (other_key, "FEDERATION_TLS_KEY_FILE", "does not fit the certificate: name the key"),
        (expired, "FEDERATION_TLS_CERT_FILE", "renew it (`federation tls init`"),
        (to_come, "FEDERATION_TLS_CERT_FILE", "is not valid before"),
        (no_pem, "FEDERATION_TLS_CERT_FILE", "no certificate in PEM format"),
        (no_key, "FEDERATION_TLS_KEY_FILE", "no private key in PEM format"),
        (encrypted, "FEDERATION_TLS_KEY_FILE", "without a passphrase"),
        (odd_key, "FEDERATION_TLS_KEY_FILE", "use EC P-256"),
        (odd_curve, "FEDERATION_TLS_KEY_FILE", "use EC P-256"),
        (unheard_of_curve, "FEDERATION_TLS_KEY_FILE", "use EC P-256"),
        (rsa_pss, "FEDERATION_TLS_KEY_FILE", "not RSA-PSS"),
        (cut_off, "FEDERATION_TLS_CERT_FILE", "holds a certificate that is cut off"),
        (old_ca, "FEDERATION_TLS_CLIENT_CA_FILE", "expired on"),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line_with_the_remedy(
    pki: Pki, break_it: Callable[[Pki], None], setting: str, words: str
) -> None:
    Certificates(files(pki, mtls=True), Metrics())
    break_it(pki)
    with pytest.raises(CertificateUnusable) as caught:
        Certificates(files(pki, mtls=True), Metrics())
    assert str(caught.value).startswith(f"{setting}: {pki.ca.parent}/")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_certificate_and_key_may_be_one_file(pki: Pki) -> None:
    both = pki.write("both.pem", pki.key.read_bytes() + pki.certificate.read_bytes())
    Certificates(TlsFiles(both, both, None), Metrics())


def test_what_is_shown_is_the_certificate_alone_however_its_file_is_written(pki: Pki) -> None:
    own, key = pki.certificate.read_bytes(), pki.key.read_bytes()
    mark = b"\xef\xbb\xbf"
    pki.write("server.crt", mark + b"  ".join((b"subject=x\n" + own).splitlines(keepends=True)))
    pki.write("server.key", mark + key.replace(b"\n", b"\r\n"))
    pki.write("ca.crt", mark + b"issuer=x\n" + pki.authority.certificate)
    shown = Certificates(files(pki, mtls=True), Metrics()).renewed()
    assert (shown.certificate, shown.key) == (own, key)
    assert shown.client_ca == pki.authority.certificate


def test_clients_cas_may_be_many_of_which_some_have_expired(pki: Pki) -> None:
    current = pki.ca.read_bytes()
    old_ca(pki)
    pki.write("ca.crt", pki.ca.read_bytes() + current)
    Certificates(files(pki, mtls=True), Metrics())


def test_a_server_is_always_found_on_its_own_machine(pki: Pki) -> None:
    names = host_names(pki.server("fed.example", "10.0.0.7").certificate)
    assert set(names) == {"fed.example", "10.0.0.7", "localhost", "127.0.0.1", "::1"}


def test_no_certificate_outlives_its_ca(pki: Pki) -> None:
    issued = pki.server(life=timedelta(days=10_000))
    assert issued.expire_time == pki.authority.expire_time
    with pytest.raises(AuthorityError, match="the CA expired on"):
        pki.server(since=timedelta(days=-4000))


@pytest.mark.parametrize("name", ["", "a b", "-x", "a..b", "x" * 64, "http://x", "fed:50051"])
def test_what_is_no_host_gets_no_certificate(pki: Pki, name: str) -> None:
    with pytest.raises(AuthorityError, match="neither a host name nor an IP address"):
        pki.server(name)


@pytest.mark.parametrize(
    ("life", "warned_before"),
    [(timedelta(days=365), timedelta(days=14)), (timedelta(hours=23), timedelta(hours=6))],
)
def test_it_is_due_two_weeks_before_its_end_or_in_its_last_quarter(
    pki: Pki, life: timedelta, warned_before: timedelta
) -> None:
    issued = pki.server(life=life)
    validity = read_pair(issued.certificate, issued.key, datetime.now(UTC)).validity
    assert abs(validity.expire_time - validity.due_time - warned_before) < timedelta(minutes=20)


# ---- how it is followed


def test_a_renewal_is_used_from_the_next_look_on_and_shown_by_the_metric(pki: Pki) -> None:
    metrics = Metrics()
    certificates = Certificates(files(pki, mtls=True), metrics)
    first = certificates.renewed()
    assert certificates.renewed() is first
    issued = pki.server(life=timedelta(days=30))
    pki.renew(issued)
    assert certificates.renewed().certificate == issued.certificate
    shown = metrics.registry.get_sample_value(METRIC, {"certificate": "server"})
    assert shown == issued.expire_time.timestamp()
    ca = metrics.registry.get_sample_value(METRIC, {"certificate": "client_ca"})
    assert ca == pki.authority.expire_time.timestamp()


def test_a_renewed_ca_of_clients_is_used(pki: Pki) -> None:
    certificates = Certificates(files(pki, mtls=True), Metrics())
    other = Authority.make(datetime.now(UTC)).certificate
    pki.write("ca.crt", other)
    assert certificates.renewed().client_ca == other


def test_between_its_two_files_a_renewal_changes_nothing_and_is_no_error(pki: Pki) -> None:
    certificates = Certificates(files(pki), Metrics())
    before = certificates.renewed()
    issued = pki.server()
    with capture_logs() as logs:
        pki.write("server.key", issued.key)
        assert certificates.renewed() is before
        pki.write("server.crt", issued.certificate)
        assert certificates.renewed().certificate == issued.certificate
    assert actions(logs) == ["certificate_renewed"]


@pytest.mark.parametrize(
    "break_it", [missing, other_key, expired, no_pem, unheard_of_curve, cut_off]
)
def test_a_broken_renewal_keeps_the_old_certificate_and_is_logged_once(
    pki: Pki, break_it: Callable[[Pki], None]
) -> None:
    clock = Clock()
    certificates = Certificates(files(pki), Metrics(), clock=clock)
    before = certificates.renewed()
    with capture_logs() as logs:
        break_it(pki)
        assert certificates.renewed() is before
        assert logs == []
        for _ in range(3):
            clock.now += SETTLES_WITHIN
            assert certificates.renewed(thorough=True) is before
    assert actions(logs) == ["certificate_renewal_failed"]
    assert logs[0]["log_level"] == "error"
    assert "FEDERATION_TLS_" in logs[0]["problem"]
    with capture_logs() as logs:
        pki.renew()
        assert certificates.renewed() is not before
    assert actions(logs) == ["certificate_renewed"]


def test_files_that_are_as_before_again_are_said_to_be_whole(pki: Pki) -> None:
    clock = Clock()
    certificates = Certificates(files(pki), Metrics(), clock=clock)
    before = certificates.renewed()
    key = pki.key.read_bytes()
    with capture_logs() as logs:
        pki.key.unlink()
        certificates.renewed()
        clock.now += SETTLES_WITHIN
        certificates.renewed(thorough=True)
        pki.write("server.key", key)
        assert certificates.renewed() is before
    assert actions(logs) == ["certificate_renewal_failed", "certificate_whole"]


def test_that_a_certificate_ends_soon_and_has_ended_is_each_said_once(pki: Pki) -> None:
    clock = Clock()
    certificates = Certificates(files(pki, mtls=True), Metrics(), clock=clock)
    with capture_logs() as logs:
        certificates._note_age()
        for step in (A_DAY * 0.9, A_DAY * 0.01, A_DAY, A_DAY):
            clock.now += step
            certificates._note_age()
    assert [(line["action"], line["certificate"], line["log_level"]) for line in logs] == [
        ("certificate_due", "server", "warning"),
        ("certificate_expired", "server", "error"),
    ]
