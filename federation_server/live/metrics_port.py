"""The HTTP port of `/metrics`, which anybody may ask who reaches it.

So what it does at a time is bounded, and so is the time of each connection, from its beginning to
its answer. `prometheus_client` answers; by itself it would keep a thread for everyone who connects
and says nothing.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_S = 5.0
MOST_REQUESTS = 16
"""Connections at one time; one more is closed at once."""


class MetricsPort(ThreadingMixIn, WSGIServer):
    """Serves on threads of its own from the beginning."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Port 0 is any free one.

        Raises:
            OSError: it cannot be listened on.
        """
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = info[0]
        self._room = threading.BoundedSemaphore(MOST_REQUESTS)
        super().__init__((str(info[4][0]), port), _Handler)
        self.set_app(make_wsgi_app(registry))
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Has it served by a thread, if there is room."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves it, in a thread of its own, within its time."""
        late = threading.Timer(REQUEST_TIMEOUT_S, _shut, [request])
        late.daemon = True
        late.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was too late, is no news."""
        log.debug("a request for metrics broke off", action="metrics_broken")

    def close(self) -> None:
        """Serves no more."""
        self.shutdown()
        self.server_close()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Nothing: a scraper comes all the time."""


def _shut(request: socket.socket) -> None:
    with suppress(OSError):  # it has gone by itself
        request.shutdown(socket.SHUT_RDWR)
