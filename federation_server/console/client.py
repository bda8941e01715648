"""The way to the federation: its address, the admin's key, and the calls.

A call answers, or raises a Failure that says why in words for people. The key is never printed,
logged or part of an error.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.message import Message

from federation.v1.access_service_pb2_grpc import AccessServiceStub
from federation.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from federation.v1.command_service_pb2_grpc import CommandServiceStub
from federation.v1.fleet_service_pb2_grpc import FleetServiceStub
from federation_server.console.failure import EXIT_USAGE, Failure
from federation_server.console.problem import CallFailure, failure, no_answer
from federation_server.console.trust import Trust
from federation_server.settings import default_data_dir

if TYPE_CHECKING:
    from types import TracebackType

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

DEFAULT_PORT = 50051
SCHEMES = {
    "federations": True,
    "grpcs": True,
    "https": True,
    "federation": False,
    "grpc": False,
    "http": False,
}
"""Each scheme of an address: whether it means TLS."""
LARGEST_PAGE = 1000
KEEPALIVE_MS = 20_000


@dataclass(frozen=True)
class Address:
    """Where a federation answers."""

    host: str
    port: int
    tls: bool | None = None
    """What the scheme says; None without one."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads HOST, HOST:PORT or [IPV6]:PORT, with or without a scheme before it.

        Raises:
            Failure: it is none of them.
        """
        scheme, separator, bare = text.removesuffix("/").rpartition("://")
        if separator and scheme not in SCHEMES:
            bare = ""
        if bare.startswith("["):
            host, _, rest = bare[1:].partition("]")
            port = rest.removeprefix(":")
        elif bare.count(":") > 1:
            host, port = bare, ""
        else:
            host, _, port = bare.partition(":")
        try:
            number = int(port or DEFAULT_PORT)
        except ValueError:
            number = 0
        if not host or "/" in host or not 0 < number < 65536:
            raise Failure(
                f"{text!r} is not an address: write HOST:PORT, or federations://HOST:PORT for TLS",
                exit_code=EXIT_USAGE,
            )
        return cls(host, number, SCHEMES.get(scheme))

    @property
    def loopback(self) -> bool:
        """It is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def uses_tls(self, trust: Trust) -> bool:
        """Whether it is spoken to by TLS: without a scheme all is but loopback, and that too where
        files for TLS are named.
        """
        return self.tls if self.tls is not None else trust.wanted or not self.loopback

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Key:
    """An admin's API key, and where it came from."""

    secret: str = field(repr=False)
    source: str


def find_key(given: str) -> Key:
    """The key of --key, of the environment, or of the file that `federation up` keeps.

    Raises:
        Failure: there is none, or it cannot be one.
    """
    file = _key_file()
    key = (
        _key_of(given, "--key")
        or _key_of(os.environ.get("FEDERATION_ADMIN_KEY", ""), "FEDERATION_ADMIN_KEY")
        or _key_of(os.environ.get("ADMIN_API_KEY", ""), "ADMIN_API_KEY")
        or _key_of(_read_key(file), str(file))
    )
    if key is None:
        raise _no_key(f"there is none in {file}")
    return key


def _key_of(text: str, source: str) -> Key | None:
    secret = text.strip()
    if not secret:
        return None
    if not (secret.isascii() and secret.isprintable()):
        raise Failure(f"the key from {source} is not printable ASCII", exit_code=EXIT_USAGE)
    return Key(secret, source)


def _key_file() -> Path:
    named = os.environ.get("FEDERATION_DATA_DIR")
    return (Path(named) if named else default_data_dir()) / "admin.key"


def _read_key(file: Path) -> str:
    try:
        return file.read_text("ascii", errors="replace")
    except PermissionError:
        why = f"{file} is not yours to read (run as its owner, perhaps with sudo)"
        raise _no_key(why) from None
    except OSError:
        return ""


def _no_key(why: str) -> Failure:
    return Failure(
        f"no admin key: {why}; give one with --key, FEDERATION_ADMIN_KEY or ADMIN_API_KEY,"
        " or name the server's folder with FEDERATION_DATA_DIR",
        exit_code=EXIT_USAGE,
    )


class Federation:
    """A federation to call; closed at the end of its `with`."""

    def __init__(
        self, address: Address, key: Key, timeout: float, trust: Trust | None = None
    ) -> None:
        self.address = address
        self._trust = trust or Trust()
        self._tls = address.uses_tls(self._trust)
        self.timeout = timeout
        self._key = key

    def __enter__(self) -> Federation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    @cached_property
    def _channel(self) -> grpc.Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            # A server that comes back is found soon, and not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.address.loopback:
            options.append(("grpc.enable_http_proxy", 0))
        if not self._tls:
            return grpc.insecure_channel(str(self.address), options)
        credentials = grpc.ssl_channel_credentials(*self._trust.read())
        return grpc.secure_channel(str(self.address), credentials, options)

    @cached_property
    def fleet(self) -> FleetServiceStub:
        """The fleet."""
        return FleetServiceStub(self._channel)

    @cached_property
    def commands(self) -> CommandServiceStub:
        """The commands."""
        return CommandServiceStub(self._channel)

    @cached_property
    def analytics(self) -> AnalyticsServiceStub:
        """The analytics."""
        return AnalyticsServiceStub(self._channel)

    @cached_property
    def access(self) -> AccessServiceStub:
        """Who may take part."""
        return AccessServiceStub(self._channel)

    def call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """The answer.

        Raises:
            CallFailure: there is none, or it is a refusal.
        """
        try:
            return method(request, timeout=self.timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def pages(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        items: str,
        *,
        limit: int = 0,
    ) -> Response:
        """All pages of a list in one response.

        Args:
            method: an RPC with AIP-158 pages.
            request: its request.
            items: the field that holds them.
            limit: no more than this many; 0: all. If there are more, next_page_token is set.

        Raises:
            CallFailure: as `call`.
        """
        page = type(request)()
        page.CopyFrom(request)
        whole: Response | None = None
        while True:
            left = limit - len(getattr(whole, items, ())) if limit else LARGEST_PAGE
            page.page_size = min(left, LARGEST_PAGE)  # type: ignore[attr-defined]
            response = self.call(method, page)
            if whole is None:
                whole = response
            else:
                getattr(whole, items).extend(getattr(response, items))
            token: str = response.next_page_token  # type: ignore[attr-defined]
            if not token or (limit and len(getattr(whole, items)) >= limit):
                whole.next_page_token = token  # type: ignore[attr-defined]
                return whole
            page.page_token = token  # type: ignore[attr-defined]

    def each_page(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Iterator[Response]:
        """The pages of a list, one after the other, of any length.

        Raises:
            CallFailure: as `call`.
        """
        page = type(request)()
        page.CopyFrom(request)
        page.page_size = LARGEST_PAGE  # type: ignore[attr-defined]
        while True:
            response = self.call(method, page)
            yield response
            page.page_token = response.next_page_token  # type: ignore[attr-defined]
            if not page.page_token:  # type: ignore[attr-defined]
                return

    def follow(
        self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request
    ) -> Iterator[Response]:
        """The messages of a stream. The first must come in time; the others have for ever.

        Raises:
            CallFailure: the stream broke, or was refused.
        """
        stream = method(request, metadata=self._metadata)
        late = threading.Event()

        def give_up() -> None:
            late.set()
            stream.cancel()

        timer = threading.Timer(self.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            for message in stream:
                timer.cancel()
                yield message
        except grpc.RpcError as error:
            raise (self._late() if late.is_set() else self._failure(error)) from None
        finally:
            timer.cancel()
            stream.cancel()

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-admin-key", self._key.secret),)

    def _late(self) -> CallFailure:
        return no_answer(server=str(self.address), timeout=self.timeout)

    def _failure(self, error: grpc.RpcError) -> CallFailure:
        return failure(
            error,
            server=str(self.address),
            timeout=self.timeout,
            key_source=self._key.source,
            tls=self._tls,
        )
