"""The server side of a fake federation: the servicer, its streams, and its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from federation.v1 import command_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import SessionServiceServicer
from neuron_sdk.convert import from_duration, from_struct
from neuron_sdk.outcome import CommandFault, CommandOutcome, FinalState
from neuron_sdk.payload import JsonObject

Context = Any  # grpc.aio.ServicerContext[Any, Any]

_STATUS = {
    "CREDENTIAL_MISSING": grpc.StatusCode.UNAUTHENTICATED,
    "CREDENTIAL_INVALID": grpc.StatusCode.UNAUTHENTICATED,
    "CREDENTIAL_EXPIRED": grpc.StatusCode.UNAUTHENTICATED,
    "ENROLLMENT_REFUSED": grpc.StatusCode.PERMISSION_DENIED,
    "NEURON_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "NEURON_DEACTIVATED": grpc.StatusCode.FAILED_PRECONDITION,
    "PROTOCOL_VIOLATION": grpc.StatusCode.FAILED_PRECONDITION,
    "SESSION_SUPERSEDED": grpc.StatusCode.ABORTED,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "DATABASE_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "SERVER_BUSY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "RATE_LIMITED": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(eq=False)
class Refused(Exception):
    """The end of a call, by an ErrorReason's name."""

    reason: str
    message: str = ""
    retry_after: float = 0.0


@dataclass(eq=False, slots=True)
class Stream:
    """One open stream."""

    neuron_id: str
    down: asyncio.Queue[pb.FederationMessage | Refused | None] = field(
        default_factory=asyncio.Queue
    )


class Desk(Protocol):
    """Who decides; every method is called on the server's loop, and may raise Refused."""

    def register(self, request: pb.RegisterRequest, bearer: str) -> pb.RegisterResponse: ...
    def owner(self, bearer: str) -> str: ...
    def make_token(self, neuron_id: str) -> pb.NeuronToken: ...
    def open_stream(self, neuron_id: str, hello: pb.Hello) -> tuple[Stream, pb.Welcome]: ...
    def close_stream(self, stream: Stream) -> None: ...
    def take(self, stream: Stream, message: pb.NeuronMessage, spool_id: str) -> None: ...


class Servicer(SessionServiceServicer):
    """SessionService over a `Desk`."""

    def __init__(self, federation: Desk) -> None:
        self._federation = federation

    async def Register(  # noqa: N802 - gRPC's name
        self, request: pb.RegisterRequest, context: Context
    ) -> pb.RegisterResponse:
        try:
            return self._federation.register(request, _bearer(context))
        except Refused as refused:
            raise await _abort(context, refused) from None

    async def RefreshToken(  # noqa: N802 - gRPC's name
        self, request: pb.RefreshTokenRequest, context: Context
    ) -> pb.RefreshTokenResponse:
        try:
            owner = self._federation.owner(_bearer(context))
        except Refused as refused:
            raise await _abort(context, refused) from None
        return pb.RefreshTokenResponse(token=self._federation.make_token(owner))

    async def Connect(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[pb.NeuronMessage], context: Context
    ) -> AsyncIterator[pb.FederationMessage]:
        federation = self._federation
        try:
            owner = federation.owner(_bearer(context))
            hello = (await anext(request_iterator)).hello
            stream, welcome = federation.open_stream(owner, hello)
        except Refused as refused:
            raise await _abort(context, refused) from None
        yield pb.FederationMessage(welcome=welcome)
        reader = asyncio.create_task(self._read(stream, request_iterator, hello.spool_id))
        try:
            while (message := await stream.down.get()) is not None:
                if isinstance(message, Refused):
                    raise await _abort(context, message)
                yield message
        finally:
            reader.cancel()
            federation.close_stream(stream)

    async def _read(
        self, stream: Stream, up: AsyncIterator[pb.NeuronMessage], spool_id: str
    ) -> None:
        async for message in up:
            self._federation.take(stream, message, spool_id)
        stream.down.put_nowait(None)


def to_outcome(finished: pb.CommandFinished) -> CommandOutcome:
    """A command's end as the SDK's own value."""
    name = command_pb2.CommandState.Name(finished.state).removeprefix("COMMAND_STATE_")
    response: JsonObject | None = None
    if finished.HasField("response"):
        response = from_struct(finished.response)
    error: CommandFault | None = None
    if finished.HasField("error"):
        said = finished.error
        details = from_struct(said.details) if said.HasField("details") else None
        error = CommandFault(said.code, said.message, details)
    timed = finished.HasField("run_duration")
    return CommandOutcome(
        FinalState(name),
        response,
        error,
        from_duration(finished.run_duration) if timed else None,
        finished.log_tail,
    )


def _bearer(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return str(value).removeprefix("Bearer ")
    return ""


async def _abort(context: Context, refused: Refused) -> BaseException:
    """End the call as the contract says; `raise await` tells readers that it does not return."""
    code = _STATUS[refused.reason]
    info = error_details_pb2.ErrorInfo(reason=refused.reason, domain="federation")
    details = [_pack(info)]
    if refused.retry_after:
        delay = Duration()
        delay.FromMilliseconds(int(refused.retry_after * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=code.value[0], message=refused.message, details=details)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(code, refused.message)
    return AssertionError("abort raises")


def _pack(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
