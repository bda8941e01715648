"""What gRPC says of a handshake that failed is recognized, by the SDK and by the command line.

Its words are no contract: these tests say when a new version has others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from federation_server.console.problem import handshake_problem
from federation_server.domain import authority
from federation_server.domain.authority import Issued
from neuron_sdk.tls import explain
from tests.support.pki import Pki

DAY = timedelta(days=1)


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    """The address of a server that has no service."""
    server = grpc.aio.server()
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def said(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """What gRPC says of a call to that server."""
    channel = (
        grpc.aio.secure_channel(address, credentials)
        if credentials
        else grpc.aio.insecure_channel(address)
    )
    async with channel:
        call: Any = channel.unary_unary("/x/y")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details() or ""


def shows(issued: Issued) -> grpc.ServerCredentials:
    """Shows a certificate without looking at it."""
    return grpc.ssl_server_credentials([(issued.key, issued.certificate)])


def for_another_name(pki: Pki) -> Issued:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "LOCAL_NAMES", ())
        return pki.server("fed.example")


def asks(pki: Pki) -> grpc.ServerCredentials:
    """Asks for a client's certificate."""
    own = pki.server()
    pairs = [(own.key, own.certificate)]
    return grpc.ssl_server_credentials(pairs, pki.ca.read_bytes(), require_client_auth=True)


def damaged(_: Pki) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(b"nonsense")


def another_ca(pki: Pki) -> grpc.ChannelCredentials:
    return Pki(pki.ca.parent / "other").credentials()


def foreign(pki: Pki) -> grpc.ChannelCredentials:
    return pki.credentials(Pki(pki.ca.parent / "other").client())


@dataclass(frozen=True)
class Case:
    """A server, a client, and what both of ours say of it."""

    name: str
    server: Callable[[Pki], grpc.ServerCredentials | None]
    client: Callable[[Pki], grpc.ChannelCredentials | None]
    to_neuron: str
    to_admin: str


TRUSTS = Pki.credentials
CASES = [
    Case("expired", lambda pki: shows(pki.server(since=2 * DAY)), TRUSTS, "expired", "expired"),
    Case(
        "to come",
        lambda pki: shows(pki.server(since=-2 * DAY)),
        TRUSTS,
        "not valid yet",
        "not valid yet",
    ),
    Case(
        "another name",
        lambda pki: shows(for_another_name(pki)),
        TRUSTS,
        "not for the name in FEDERATION_URL",
        "is for other names",
    ),
    Case(
        "another CA",
        lambda pki: shows(pki.server()),
        another_ca,
        "a CA that is not trusted here",
        "a CA that is not trusted here",
    ),
    Case(
        "a damaged file",
        lambda pki: shows(pki.server()),
        damaged,
        "is damaged or does not fit together",
        "is damaged or does not fit together",
    ),
    Case("no TLS there", lambda _: None, TRUSTS, "speaks plaintext", "speaks plaintext"),
    Case(
        "no TLS here",
        lambda pki: shows(pki.server()),
        lambda _: None,
        "if it speaks TLS, write federations://",
        "if it speaks TLS, write federations://",
    ),
    Case(
        "no certificate", asks, TRUSTS, "it may ask for a certificate", "it may ask for a client's"
    ),
    Case("a foreign certificate", asks, foreign, "or not take this one", "or not take this one"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_failed_handshake_is_told_in_words_that_help(case: Case, tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    credentials = case.client(pki)
    tls = credentials is not None
    async with serving(case.server(pki)) as address:
        text = await said(address, credentials)
    assert case.to_neuron in explain(text, tls=tls), text
    assert case.to_admin in handshake_problem(text, server=address, tls=tls), text


async def test_a_port_that_does_not_speak_grpc_is_said() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        text = await said(f"{host}:{port}", None)
    assert explain(text, tls=False).endswith("does not speak gRPC: is its port right?"), text


@pytest.mark.parametrize("tls", [True, False])
async def test_a_server_that_is_not_there_is_no_matter_of_tls(tls: bool, tmp_path: Path) -> None:
    text = await said("127.0.0.1:1", Pki(tmp_path).credentials() if tls else None)
    assert explain(text, tls=tls) == text
    assert handshake_problem(text, server="127.0.0.1:1", tls=tls) == ""
