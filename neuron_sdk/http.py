"""The neuron's local HTTP: `/health`, `/status` and `/metrics`, for probes and scrapers.

Everything here is bounded: the requests at one time, the time of each, what is read of it. An
error in an answer is a 500 and a log line, and never reaches the service.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from neuron_sdk.health import HealthReport
from neuron_sdk.logs import get_logger
from neuron_sdk.redaction import redact

DEFAULT_HOST: Final = "127.0.0.1"
"""Only this machine may ask; 0.0.0.0 lets others."""

REQUEST_TIMEOUT: Final = 5.0
"""Seconds that one request may take, from its connection to its answer."""

MAX_REQUESTS: Final = 16
"""Requests at one time; one more is turned away with 503."""

_POLL = 0.25  # seconds until stop() is noticed, and between two looks for late requests

_log = get_logger(__name__)

Answer = tuple[HTTPStatus, str, bytes]


class PortInUse(OSError):
    """METRICS_PORT belongs to another program. The neuron can go on without its local HTTP."""


class StatusServer:
    """Serves the three pages on a thread of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        health: Callable[[], HealthReport],
        status: Callable[[], Mapping[str, object]],
        registry: CollectorRegistry,
    ) -> None:
        """Nothing is opened before `start`.

        Args:
            host: the address to listen on; `DEFAULT_HOST` unless others may ask.
            port: the TCP port; 0 takes a free one.
            health: answers `/health`; called for each request, by several threads.
            status: answers `/status`, in the same way; secrets in it are taken out.
            registry: answers `/metrics`.
        """
        self._host = host
        self._port = port
        self._pages: dict[str, Callable[[str], Answer]] = {
            "/health": lambda _accept: _health_page(health()),
            "/status": lambda _accept: _json(HTTPStatus.OK, redact(status())),
            "/metrics": lambda accept: _metrics_page(registry, accept),
        }
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Begin to serve; returns the port.

        Raises:
            PortInUse: another program listens there.
            OSError: the address cannot be listened on.
        """
        try:
            self._server = _Server(self._host, self._port, self._pages)
        except OSError as error:
            raise _named(error, self._host, self._port) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL,), name="neuron-http", daemon=True
        )
        self._thread.start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Close the port and end every request. Harmless if it was never started."""
        server, self._server = self._server, None
        thread, self._thread = self._thread, None
        if server is None or thread is None:
            return
        server.shutdown()
        server.close_requests()
        server.server_close()
        thread.join(REQUEST_TIMEOUT)


class _Server(ThreadingHTTPServer):
    """A threading server that bounds how many requests there are, and how long each takes."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[str], Answer]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the DNS for the host's name, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            admitted = len(self._deadlines) < MAX_REQUESTS
            if admitted:
                self._deadlines[request] = time.monotonic() + REQUEST_TIMEOUT
        if admitted:
            super().process_request(request, client_address)
        else:
            _turn_away(request)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called every `_POLL` seconds: end what takes too long."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, deadline in self._deadlines.items() if now > deadline]
        for request in late:
            _shut(request)

    def close_requests(self) -> None:
        with self._lock:
            requests = list(self._deadlines)
        for request in requests:
            _shut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news, and nothing is printed to stderr."""
        _log.debug("request broke off", action="http.broken", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One request on one connection: HTTP/1.0, so that every answer ends it."""

    timeout = REQUEST_TIMEOUT
    server_version = "neuron"
    sys_version = ""
    default_request_version = "HTTP/1.0"  # a request that cannot be read gets a whole answer too
    server: _Server

    def do_GET(self) -> None:
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            known = ", ".join(self.server.pages)
            self._answer(_error(HTTPStatus.NOT_FOUND, f"no such page; there are {known}"))
            return
        try:
            answer = page(self.headers.get("Accept", ""))
        except Exception:  # noqa: BLE001 - logged, and the client gets a 500
            _log.exception("page failed", action="http.failed", path=self.path)
            answer = _error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the log")
        self._answer(answer)

    do_HEAD = do_GET  # noqa: N815 - the base class finds it by this name

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser refuses, in JSON. It says 501 to a method that has no `do_…`."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            status, message = HTTPStatus.METHOD_NOT_ALLOWED, "use GET or HEAD"
        self._answer(_error(status, message or status.phrase))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        _log.debug("request", action="http.request", line=format % args)

    def _answer(self, answer: Answer) -> None:
        status, content_type, body = answer
        self.send_response(status)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _health_page(report: HealthReport) -> Answer:
    unhealthy = report.status == "unhealthy"
    page = {
        "status": report.status,
        "uptime": round(report.uptime, 3),
        "health_score": report.score,
        "dependencies": [
            asdict(found) | {"state": found.state.value} for found in report.dependencies
        ],
        "spool_in_memory": report.spool_in_memory,
    }
    return _json(HTTPStatus.SERVICE_UNAVAILABLE if unhealthy else HTTPStatus.OK, page)


def _metrics_page(registry: CollectorRegistry, accept: str) -> Answer:
    encode, content_type = choose_encoder(accept)
    return HTTPStatus.OK, content_type, encode(registry)


def _json(status: HTTPStatus, page: object) -> Answer:
    return status, "application/json", msgspec.json.encode(page) + b"\n"


def _error(status: HTTPStatus, message: str) -> Answer:
    return _json(status, {"error": message})


def _named(error: OSError, host: str, port: int) -> OSError:
    """The same error in words that name the setting."""
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            errno.EADDRINUSE,
            f"METRICS_PORT {port} on {host} is in use by another program: "
            "set METRICS_PORT to a free port, or METRICS_ENABLED=false",
        )
    reason = error.strerror or str(error)
    return OSError(error.errno, f"METRICS_PORT {port} on {host} cannot be listened on: {reason}")


def _turn_away(request: socket.socket) -> None:
    try:
        request.settimeout(0)
        request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
    except OSError:
        return  # it went away by itself


def _shut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it went away by itself
