"""The service's HTTP API: POST /data/process, with the standard library alone.

It knows no neuron: it is given a function from a request's body to an answer's. Requests at one
time, their size and their time are bounded, and every refusal says in JSON what would be right.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

PATH = "/data/process"
MAX_BODY_BYTES = 1024 * 1024
MAX_REQUESTS = 32
TIMEOUT_SECONDS = 4.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client gets."""

    status: HTTPStatus
    body: bytes


def problem(status: HTTPStatus, message: str) -> Answer:
    """A refusal, in words for whoever sent the request."""
    return Answer(status, json.dumps({"error": message}).encode())


class WebServer:
    """Serves on a thread of its own, each request on another."""

    def __init__(self, host: str, port: int, answer: Callable[[bytes], Answer]) -> None:
        """Binds the port (0: a free one) at once. `answer` is called by several threads.

        Raises:
            OSError: the port is taken, or not ours to take.
        """
        self._server = _Server((host, port), answer)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.25,), name="web", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, and wait for those that are under way."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for them; each ends by its timeout
    server_address: tuple[str, int]

    def __init__(self, address: tuple[str, int], answer: Callable[[bytes], Answer]) -> None:
        self.answer = answer
        self._free_places = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the DNS for the host's name and may wait for it.
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free_places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            _log.warning("too many requests", extra={"action": "web.overloaded"})
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("connection broke", exc_info=True, extra={"action": "web.broken"})


class _Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    timeout = TIMEOUT_SECONDS
    server_version = "python-processor"
    sys_version = ""
    server: _Server

    def do_POST(self) -> None:
        refusal, length = self._judge_head()
        if refusal is not None:
            self._discard(length)
            self._send(refusal)
            return
        body = self.rfile.read(length)
        if len(body) < length:
            self._send(problem(HTTPStatus.BAD_REQUEST, "the body ended early"))
            return
        try:
            answer = self.server.answer(body)
        except Exception:  # noqa: BLE001 - logged, and the client gets a 500
            _log.exception("request failed", extra={"action": "web.failed"})
            answer = problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the log")
        self._send(answer)

    def _judge_head(self) -> tuple[Answer | None, int]:
        """Why the request is refused, if it is, and how long its body is."""
        text = self.headers.get("Content-Length", "")
        length = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
        if self.path.partition("?")[0] != PATH:
            return problem(HTTPStatus.NOT_FOUND, f"no such path; there is POST {PATH}"), length
        if self.headers.get_content_type() != "application/json":
            return problem(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json"
            ), length
        if not length:
            return problem(HTTPStatus.LENGTH_REQUIRED, "send a body with its Content-Length"), 0
        if length > MAX_BODY_BYTES:
            message = f"the body has {length} bytes; send at most {MAX_BODY_BYTES}"
            return problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message), length
        return None, length

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses; it says 501 to a method that has no `do_…`."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            status, message = HTTPStatus.METHOD_NOT_ALLOWED, f"use POST {PATH}"
        self._send(problem(status, message or status.phrase))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        _log.debug(format, *args, extra={"action": "web.request"})

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "POST")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _discard(self, length: int) -> None:
        """Read a body that nobody wants: unread, it could break the connection under the answer."""
        left = min(length, 4 * MAX_BODY_BYTES)
        while left > 0 and (chunk := self.rfile.read(min(left, 64 * 1024))):
            left -= len(chunk)
