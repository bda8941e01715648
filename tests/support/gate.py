"""A real server with the real gate before it, whose handlers answer with the principal they see."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from sqlalchemy import update

import federation.v1
from federation_server.domain.access import Role, TokenLifetime
from federation_server.live.admission import Admission
from federation_server.live.key_uses import KeyUses
from federation_server.live.metrics import Metrics
from federation_server.live.rates import Limit, Rates
from federation_server.rpc import auth
from federation_server.rpc.auth import Authentication
from federation_server.rpc.error_mapping import ErrorMapping
from federation_server.rpc.tokens import Tokens
from federation_server.store.access import SigningKey
from federation_server.store.database import Database
from federation_server.store.schema import api_keys, neurons
from tests.support.neurons import GENERATION, put_neuron

WITHIN_S = 10.0
UNLISTED = "/federation.v1.FleetService/NotInTheTable"

Metadata = tuple[tuple[str, str], ...]


def rpcs() -> Iterator[MethodDescriptor]:
    """Every RPC that a server may have, from the descriptors."""
    ours = (
        importlib.import_module(f"federation.v1.{module.name}")
        for module in pkgutil.iter_modules(federation.v1.__path__)
        if module.name.endswith("_pb2")
    )
    for module in (health_pb2, reflection_pb2, channelz_pb2, *ours):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


RPCS = {f"/{rpc.containing_service.full_name}/{rpc.name}": rpc for rpc in rpcs()}


def whom() -> bytes:
    principal = auth._principal.get()
    return principal.actor.encode() if principal is not None else b"anyone"


async def unary(request: bytes, context: Any) -> bytes:
    return whom()


async def generator(request: Any, context: Any) -> AsyncIterator[bytes]:
    await asyncio.sleep(0)
    yield whom()


async def writer(request: Any, context: Any) -> None:
    await context.read()
    await context.write(whom())


def handler(rpc: MethodDescriptor) -> Any:
    if rpc.client_streaming and rpc.server_streaming:
        return grpc.stream_stream_rpc_method_handler(writer)
    assert not rpc.client_streaming
    if rpc.server_streaming:
        return grpc.unary_stream_rpc_method_handler(generator)
    return grpc.unary_unary_rpc_method_handler(unary)


class Handlers(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == UNLISTED:
            return grpc.unary_unary_rpc_method_handler(unary)
        rpc = RPCS.get(handler_call_details.method)
        return None if rpc is None else handler(rpc)


class Clock:
    """Seconds that pass by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A server, and a way to knock at it."""

    def __init__(self, channel: grpc.aio.Channel, database: Database, tokens: Tokens) -> None:
        self.channel = channel
        self.database = database
        self.tokens = tokens
        self.clock = Clock()

    async def call(self, rpc: str, metadata: Metadata = (), timeout: float = WITHIN_S) -> str:  # noqa: ASYNC109 - gRPC's deadline
        """Whom the handler saw.

        Raises:
            grpc.aio.AioRpcError: it was refused.
        """
        found = RPCS.get(rpc)
        kind = "unary_unary"
        if found is not None and found.server_streaming:
            kind = "stream_stream" if found.client_streaming else "unary_stream"
        method: Any = getattr(self.channel, kind)(rpc)
        request = [b""] if kind == "stream_stream" else b""
        call = method(request, metadata=metadata, timeout=timeout)
        answer = await call if kind == "unary_unary" else await anext(aiter(call))
        return bytes(answer).decode()

    async def knock(self, rpc: str, metadata: Metadata = ()) -> str:
        """Whom the handler saw, or the code and reason of the refusal."""
        try:
            return await self.call(rpc, metadata)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {info(error).reason}"

    async def neuron(self, neuron_id: str = "n1", **values: Any) -> None:
        async with self.database.begin() as connection:
            await put_neuron(connection, neuron_id)
        if values:
            await self.change_neuron(neuron_id, **values)

    async def change_neuron(self, neuron_id: str = "n1", **values: Any) -> None:
        async with self.database.begin() as connection:
            await connection.execute(
                update(neurons).where(neurons.c.neuron_id == neuron_id).values(**values)
            )

    async def change_key(self, role: Role, **values: Any) -> None:
        async with self.database.begin() as connection:
            await connection.execute(
                update(api_keys).where(api_keys.c.name == role.name.lower()).values(**values)
            )

    def token(
        self,
        neuron_id: str = "n1",
        age: timedelta = timedelta(),
        generation: int = GENERATION,
    ) -> Metadata:
        time = datetime.now(UTC) - age
        return bearer(self.tokens.issue(neuron_id, generation, time).token)


def bearer(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    trailers = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(bytes(trailers["grpc-status-details-bin"]))


def info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    found = error_details_pb2.ErrorInfo()
    assert details(error).details[0].Unpack(found)
    assert found.domain == "federation"
    return found


@asynccontextmanager
async def gate_of(
    database: Database, limits: Mapping[Limit, float] | None = None
) -> AsyncIterator[Gate]:
    tokens = Tokens([SigningKey("k", b"k" * 32)], TokenLifetime())
    clock = Clock()
    metrics = Metrics()
    admission = Admission(metrics, rate=1000.0, burst=1000)
    rates = Rates(metrics, limits or dict.fromkeys(Limit, 1000.0), clock=clock)
    gatekeeper = Authentication(database, tokens, admission, rates, KeyUses(database), clock=clock)
    server = grpc.aio.server(interceptors=[ErrorMapping(), gatekeeper])
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            gate = Gate(channel, database, tokens)
            gate.clock = clock
            yield gate
    finally:
        await server.stop(None)
        await database.close()
