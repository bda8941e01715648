"""SessionService: what neurons call."""

from __future__ import annotations

import asyncio
from datetime import datetime

import grpc.aio

from federation.v1 import session_service_pb2 as pb
from federation.v1 import session_service_pb2_grpc as pb_grpc
from federation_server.domain.violation import Violation
from federation_server.rpc import auth, convert_stream, errors, limits
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.rpc.registration import Registration
from federation_server.rpc.stream import NeuronStream, StreamParts
from federation_server.store.ingest import DurableItem, HeartbeatItem

STORE_TIMEOUT_S = 10.0
"""How long a call without a stream waits for its message to be stored."""


class SessionServicer(pb_grpc.SessionServiceServicer):
    """Thin: registration and streams have modules of their own."""

    def __init__(self, registration: Registration, parts: StreamParts) -> None:
        """Serves with what the composition root has built."""
        self._registration = registration
        self._parts = parts

    async def Register(
        self,
        request: pb.RegisterRequest,
        context: grpc.aio.ServicerContext[pb.RegisterRequest, pb.RegisterResponse],
    ) -> pb.RegisterResponse:
        """See the contract."""
        limits.check(request)
        return await self._registration.register(request, context.invocation_metadata())

    async def RefreshToken(
        self,
        request: pb.RefreshTokenRequest,
        context: grpc.aio.ServicerContext[pb.RefreshTokenRequest, pb.RefreshTokenResponse],
    ) -> pb.RefreshTokenResponse:
        """See the contract."""
        return await self._registration.refresh_token(auth.current_neuron())

    async def Deregister(
        self,
        request: pb.DeregisterRequest,
        context: grpc.aio.ServicerContext[pb.DeregisterRequest, pb.DeregisterResponse],
    ) -> pb.DeregisterResponse:
        """See the contract."""
        limits.check(request)
        return await self._registration.deregister(auth.current_neuron(), request)

    async def Connect(  # type: ignore[override]  # read and write in place of the iterators
        self,
        request_iterator: object,
        context: grpc.aio.ServicerContext[pb.NeuronMessage, pb.FederationMessage],
    ) -> None:
        """See the contract."""
        await NeuronStream(self._parts, auth.current_neuron(), context).run()

    async def SendHeartbeat(
        self,
        request: pb.SendHeartbeatRequest,
        context: grpc.aio.ServicerContext[pb.SendHeartbeatRequest, pb.SendHeartbeatResponse],
    ) -> pb.SendHeartbeatResponse:
        """See the contract."""
        limits.check(request)
        neuron_id = auth.current_neuron().neuron_id
        beat = convert_stream.heartbeat(request.heartbeat)
        receipt = Receipt()
        item = HeartbeatItem(neuron_id, 0, request.instance_id, beat)
        self._parts.writer.heartbeat(receipt, item)
        self._parts.writer.hurry()
        _, time = await receipt.wait()
        return pb.SendHeartbeatResponse(
            receive_time=to_timestamp(time), settings=convert_stream.settings(self._parts.settings)
        )

    async def ReportAnalytics(
        self,
        request: pb.ReportAnalyticsRequest,
        context: grpc.aio.ServicerContext[pb.ReportAnalyticsRequest, pb.ReportAnalyticsResponse],
    ) -> pb.ReportAnalyticsResponse:
        """See the contract."""
        limits.check(request)
        neuron_id = auth.current_neuron().neuron_id
        report = convert_stream.report(request.report, from_timestamp(request.send_time))
        receipt = Receipt()
        item = DurableItem(neuron_id, 0, request.spool_id, request.sequence, report)
        self._parts.writer.durable(receipt, item, request.ByteSize())
        mark, _ = await receipt.wait()
        return pb.ReportAnalyticsResponse(ack_sequence=mark)


class Receipt:
    """The sender of a message without a stream: a call that waits until it is stored."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._stored: asyncio.Future[tuple[int, datetime]] = asyncio.Future()

    def stored(self, mark: int, time: datetime) -> None:
        """The message is committed."""
        if not self._stored.done():
            self._stored.set_result((mark, time))

    def fenced(self) -> None:
        """The neuron has been deleted since it called."""
        if not self._stored.done():
            self._stored.set_exception(errors.credential_invalid())

    def refused(self, sequence: int, message: str) -> None:
        """The database would not take the message."""
        if not self._stored.done():
            detail = "a value in it cannot be stored"
            self._stored.set_exception(errors.invalid_fields([Violation(message, detail)]))

    async def wait(self) -> tuple[int, datetime]:
        """The spool's mark and the time of the commit.

        Raises:
            errors.Refused: it was not stored, or not in time.
        """
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await self._stored
        except TimeoutError:
            raise errors.database_unavailable() from None
