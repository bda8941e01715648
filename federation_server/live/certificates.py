"""The certificate that the gRPC port shows, renewed from its files while the server runs.

gRPC asks `renewed` before every handshake, on threads of its own: the files are looked at, and read
when they have changed. What is read is used only if it is whole: a certificate that is valid now,
its own key, CAs. Otherwise what was there before goes on, and a problem that lasts is logged once:
certificate and key are two files, so that a renewal passes through a moment in which they do not
fit. Streams that are open have had their handshake and notice nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from federation_server.domain.certificate import (
    CertificateProblem,
    KeyProblem,
    Validity,
    read_authorities,
    read_pair,
)
from federation_server.live.metrics import Metrics
from federation_server.settings import TlsFiles

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 10.0
"""The files are read this often, whether or not somebody connects and they seem to have changed."""
SETTLES_WITHIN = timedelta(seconds=5)
"""How long a renewal may take from its first file to its last."""


class CertificateUnusable(ValueError):
    """The port cannot speak TLS with these files: the text names the setting and the remedy."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What a handshake needs: PEM that was checked to be whole."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    validity: dict[str, Validity]
    """Of each certificate, by its name in the metric."""


def utc_now() -> datetime:
    """The time that certificates are judged by."""
    return datetime.now(UTC)


class Certificates:
    """Keeps what the port speaks TLS with as new as its files. Belongs to any thread."""

    def __init__(
        self, files: TlsFiles, metrics: Metrics, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        """Reads the files.

        Raises:
            CertificateUnusable: a server cannot start with them.
        """
        self.files = files
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._marks()
        self._current = self._read()
        self._broken_since: datetime | None = None
        self._told_broken = False
        self._told_age: dict[str, str] = {}
        self._show_expiry()

    def renewed(self, *, thorough: bool = False) -> TlsMaterial:
        """The newest that is whole.

        thorough: read the files also if they look as they did.
        """
        with self._lock:
            marks = self._marks()
            if thorough or marks != self._seen:
                # Marks of before the reading: what changes meanwhile is read the next time.
                self._seen = marks
                self._renew()
            return self._current

    async def run(self) -> None:
        """Looks at the files now and then, and says when they are to be renewed. To be cancelled.

        A server to which nobody connects must say so as well.
        """
        while True:
            self._note_age()
            await asyncio.sleep(LOOK_INTERVAL_S)
            await asyncio.to_thread(self.renewed, thorough=True)

    def _renew(self) -> None:
        try:
            fresh = self._read()
        except CertificateUnusable as problem:
            self._note_broken(str(problem))
            return
        if self._told_broken and fresh == self._current:
            log.info("the certificate's files are whole again", action="certificate_whole")
        self._broken_since, self._told_broken = None, False
        if fresh != self._current:
            self._current = fresh
            self._told_age = {}
            self._show_expiry()
            log.info(
                "new connections get the renewed certificate",
                action="certificate_renewed",
                expire_time=fresh.validity["server"].expire_time.isoformat(),
            )

    def _note_broken(self, problem: str) -> None:
        now = self._clock()
        self._broken_since = self._broken_since or now
        if not self._told_broken and now - self._broken_since >= SETTLES_WITHIN:
            self._told_broken = True
            log.error(
                "the renewed certificate cannot be used; the one before it stays",
                action="certificate_renewal_failed",
                problem=problem,
            )

    def _note_age(self) -> None:
        """Says once that a certificate is soon to expire, and once that it has."""
        now = self._clock()
        for name, validity in self._current.validity.items():
            if now < validity.due_time:
                continue
            age = "expired" if now >= validity.expire_time else "due"
            if self._told_age.get(name) == age:
                continue
            self._told_age[name] = age
            expire_time = validity.expire_time.isoformat()
            if age == "expired":
                log.error(
                    "a certificate has expired: clients do not connect any more",
                    action="certificate_expired",
                    certificate=name,
                    expire_time=expire_time,
                )
            else:
                log.warning(
                    "a certificate expires soon: renew its file",
                    action="certificate_due",
                    certificate=name,
                    expire_time=expire_time,
                )

    def _show_expiry(self) -> None:
        for name, validity in self._current.validity.items():
            gauge = self._metrics.certificate_expire_time.labels(certificate=name)
            gauge.set(validity.expire_time.timestamp())

    def _marks(self) -> tuple[object, ...]:
        """What changes when a file does."""
        return tuple(map(_mark, (self.files.certificate, self.files.key, self.files.client_ca)))

    def _read(self) -> TlsMaterial:
        files, now = self.files, self._clock()
        certificate = _content("TLS_CERT_FILE", files.certificate)
        key = _content("TLS_KEY_FILE", files.key)
        try:
            own = read_pair(certificate, key, now)
        except KeyProblem as problem:
            raise _unusable("TLS_KEY_FILE", files.key, str(problem)) from None
        except CertificateProblem as problem:
            raise _unusable("TLS_CERT_FILE", files.certificate, _renew_it(problem)) from None
        if files.client_ca is None:
            return TlsMaterial(own.certificate, own.key, None, {"server": own.validity})
        client_ca = _content("TLS_CLIENT_CA_FILE", files.client_ca)
        try:
            theirs = read_authorities(client_ca, now)
        except CertificateProblem as problem:
            raise _unusable("TLS_CLIENT_CA_FILE", files.client_ca, _renew_it(problem)) from None
        validity = {"server": own.validity, "client_ca": theirs.validity}
        return TlsMaterial(own.certificate, own.key, theirs.certificates, validity)


def _mark(path: Path | None) -> object:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _content(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "let this user read it, or name another file"
        raise _unusable(setting, path, f"cannot be read ({error.strerror}): {remedy}") from None


def _renew_it(problem: CertificateProblem) -> str:
    return f"{problem}; renew it (`federation tls init` does that for its own) or name another file"


def _unusable(setting: str, path: Path, problem: str) -> CertificateUnusable:
    return CertificateUnusable(f"FEDERATION_{setting}: {path} {problem}")
