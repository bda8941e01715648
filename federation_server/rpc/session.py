"""SessionService: what neurons call."""

from __future__ import annotations

import grpc
import grpc.aio

from federation.v1 import session_service_pb2 as pb
from federation.v1 import session_service_pb2_grpc as pb_grpc
from federation_server.domain.address import source_of
from federation_server.live.admission import Entry
from federation_server.live.rates import Limit, token_of
from federation_server.rpc import auth, convert_stream, errors, limits, pull
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.rpc.receipt import Receipt
from federation_server.rpc.registration import Registration
from federation_server.rpc.stream import NeuronStream, StreamParts
from federation_server.store.ingest import DurableItem, HeartbeatItem

FAILED_REGISTER_CALLS = 50
"""As so many calls counts a Register whose credentials or neuron_id are not taken: an honest fleet
registers at once and in thousands, but does not guess."""

_NOT_LET_IN = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ALREADY_EXISTS,
    }
)


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
        metadata = context.invocation_metadata()
        rates = self._parts.rates
        own = self._registration.shown_token(request, metadata)
        if own is None:
            limit, caller = Limit.REGISTER_RATE, source_of(context.peer())
            wait_s = rates.take(limit, caller)
        else:
            limit, caller = Limit.NEURON_CALL_RATE, token_of(own)
            wait_s = rates.take_neuron(own)
        if wait_s:
            raise errors.rate_limited(limit, wait_s)
        limits.check(request)
        if wait_s := self._parts.admission.admit(Entry.REGISTER):
            raise errors.server_busy(wait_s)
        try:
            with self._parts.admission.under_way(Entry.REGISTER):
                response = await self._registration.register(request, metadata)
        except errors.Refused as refused:
            if refused.code in _NOT_LET_IN:
                rates.charge(limit, caller, FAILED_REGISTER_CALLS - 1)
            raise
        if own is not None:
            rates.count_neuron(own)
        return response

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
