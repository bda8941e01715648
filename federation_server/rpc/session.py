"""SessionService: what neurons call."""

from __future__ import annotations

import grpc.aio

from federation.v1 import session_service_pb2 as pb
from federation.v1 import session_service_pb2_grpc as pb_grpc
from federation_server.rpc import auth, convert_stream, limits, pull
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.rpc.receipt import Receipt
from federation_server.rpc.registration import Registration
from federation_server.rpc.stream import NeuronStream, StreamParts
from federation_server.store.ingest import DurableItem, HeartbeatItem


class SessionServicer(pb_grpc.SessionServiceServicer):
    """Thin: registration, streams and pulling have modules of their own."""

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
        with self._parts.admission.under_way():
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
        identity = auth.current_neuron()
        beat = convert_stream.heartbeat(request.heartbeat)
        receipt = Receipt(self._parts.database, identity)
        item = HeartbeatItem(identity.neuron_id, 0, request.instance_id, beat)
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
        identity = auth.current_neuron()
        report = convert_stream.report(request.report, from_timestamp(request.send_time))
        receipt = Receipt(self._parts.database, identity)
        item = DurableItem(identity.neuron_id, 0, request.spool_id, request.sequence, report)
        mark = await receipt.store(self._parts.writer, item, request.ByteSize())
        return pb.ReportAnalyticsResponse(ack_sequence=mark)

    async def PullCommands(
        self,
        request: pb.PullCommandsRequest,
        context: grpc.aio.ServicerContext[pb.PullCommandsRequest, pb.PullCommandsResponse],
    ) -> pb.PullCommandsResponse:
        """See the contract."""
        limits.check(request)
        return await pull.pull(self._parts, auth.current_neuron(), request)

    async def ReportCommand(
        self,
        request: pb.ReportCommandRequest,
        context: grpc.aio.ServicerContext[pb.ReportCommandRequest, pb.ReportCommandResponse],
    ) -> pb.ReportCommandResponse:
        """See the contract."""
        limits.check(request)
        return await pull.report(self._parts, auth.current_neuron(), request)
