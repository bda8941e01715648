"""One servicer behind a real gRPC server: everything but the gate that asks who calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from federation_server.domain.access import Admin, Role
from federation_server.rpc import auth
from federation_server.rpc.error_mapping import ErrorMapping

ADMIN = Admin("tester", Role.ADMIN)


class _AsAdmin(grpc.aio.ServerInterceptor):
    """Every call is an admin's."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        auth._principal.set(ADMIN)
        return await continuation(handler_call_details)


@asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server on a port of its own, which serves what `add` adds to it."""
    server = grpc.aio.server(interceptors=[ErrorMapping(), _AsAdmin()])
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """How a call fails: its code, the reason, and what is wrong with which field."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        code = error.code()
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is needed
    else:
        raise AssertionError("the call did not fail")
    assert status is not None, "no rich status"
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad):
            detail.Unpack(message)
    violations = {violation.field: violation.description for violation in bad.field_violations}
    return code, info.reason, violations
