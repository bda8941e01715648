"""FleetService: the neurons, how they are, and who may take part."""

from __future__ import annotations

import grpc.aio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import fleet_service_pb2_grpc as pb_grpc
from federation.v1 import neuron_pb2
from federation_server.domain.neuron import NeuronDescription, Presence
from federation_server.domain.violation import Violation
from federation_server.live.notifier import hint_end
from federation_server.live.session import SessionEnd, Sessions
from federation_server.rpc import audit, auth, errors, limits
from federation_server.rpc.convert import optional_time
from federation_server.rpc.convert_heartbeat import heartbeat_to_proto, stored_heartbeat_to_proto
from federation_server.rpc.convert_neuron import (
    description_from_proto,
    neuron_to_proto,
    overview_to_proto,
)
from federation_server.store import fleet, heartbeats, neuron_list, neurons, overview, registration
from federation_server.store.database import Database
from federation_server.store.registration import EndedSession, Standing

log = structlog.get_logger(__name__)

DEFAULT_TOP = 5


class FleetServicer(pb_grpc.FleetServiceServicer):
    """Shows the fleet to admins, and does to neurons what they say."""

    def __init__(self, database: Database, sessions: Sessions, server_id: str) -> None:
        """Serves from `database`; `sessions` are those whose streams this server holds."""
        self._database = database
        self._sessions = sessions
        self._server_id = server_id

    async def GetNeuron(
        self,
        request: pb.GetNeuronRequest,
        context: grpc.aio.ServicerContext[pb.GetNeuronRequest, pb.GetNeuronResponse],
    ) -> pb.GetNeuronResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            return pb.GetNeuronResponse(neuron=await _shown(connection, request.neuron_id))

    async def ListNeurons(
        self,
        request: pb.ListNeuronsRequest,
        context: grpc.aio.ServicerContext[pb.ListNeuronsRequest, pb.ListNeuronsResponse],
    ) -> pb.ListNeuronsResponse:
        """See the contract."""
        limits.check(request)
        order_by = " ".join(request.order_by.split())
        if order_by and order_by not in neuron_list.ORDERS:
            words = f"must be one of {', '.join(neuron_list.ORDERS)}"
            raise errors.invalid_fields([Violation("order_by", words)])
        async with self._database.begin() as connection:
            records, next_page_token = await neuron_list.list_neurons(
                connection,
                filter_text=request.filter,
                order_by=order_by,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        return pb.ListNeuronsResponse(
            neurons=[neuron_to_proto(record) for record in records],
            next_page_token=next_page_token,
        )

    async def UpdateNeuron(
        self,
        request: pb.UpdateNeuronRequest,
        context: grpc.aio.ServicerContext[pb.UpdateNeuronRequest, pb.UpdateNeuronResponse],
    ) -> pb.UpdateNeuronResponse:
        """See the contract."""
        limits.check(request)
        setting = frozenset(request.update_mask.paths)
        releasing = frozenset(request.release_mask.paths)
        description = _masked(request, setting)
        async with self._database.begin() as connection:
            await _lock(connection, request.neuron_id)
            before = await fleet.described(connection, request.neuron_id)
            await fleet.override(connection, description, setting=setting, releasing=releasing)
            after = await fleet.described(connection, request.neuron_id)
            await audit.record(connection, "neuron", request.neuron_id, before, after)
            neuron = await _shown(connection, request.neuron_id)
        log.info(
            "neuron updated",
            action="neuron_updated",
            neuron_id=request.neuron_id,
            set=sorted(setting),
            released=sorted(releasing),
            admin=auth.current_admin().name,
        )
        return pb.UpdateNeuronResponse(neuron=neuron)

    async def DeactivateNeuron(
        self,
        request: pb.DeactivateNeuronRequest,
        context: grpc.aio.ServicerContext[pb.DeactivateNeuronRequest, pb.DeactivateNeuronResponse],
    ) -> pb.DeactivateNeuronResponse:
        """See the contract."""
        limits.check(request)
        neuron_id = request.neuron_id
        async with self._database.begin() as connection:
            standing = await _lock(connection, neuron_id)
            before = await fleet.described(connection, neuron_id)
            ended = await fleet.deactivate(connection, neuron_id, standing, request.reason)
            after = await fleet.described(connection, neuron_id)
            await audit.record(connection, "neuron", neuron_id, before, after)
            await self._tell_elsewhere(connection, neuron_id, ended, SessionEnd.DEACTIVATED)
            neuron = await _shown(connection, neuron_id)
        self._end_here(neuron_id, ended, SessionEnd.DEACTIVATED)
        log.info(
            "neuron deactivated",
            action="neuron_deactivated",
            neuron_id=neuron_id,
            reason=request.reason,
            admin=auth.current_admin().name,
        )
        return pb.DeactivateNeuronResponse(neuron=neuron)

    async def ActivateNeuron(
        self,
        request: pb.ActivateNeuronRequest,
        context: grpc.aio.ServicerContext[pb.ActivateNeuronRequest, pb.ActivateNeuronResponse],
    ) -> pb.ActivateNeuronResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            standing = await _lock(connection, request.neuron_id)
            before = await fleet.described(connection, request.neuron_id)
            await fleet.activate(connection, request.neuron_id, standing, request.reason)
            after = await fleet.described(connection, request.neuron_id)
            await audit.record(connection, "neuron", request.neuron_id, before, after)
            neuron = await _shown(connection, request.neuron_id)
        log.info(
            "neuron activated",
            action="neuron_activated",
            neuron_id=request.neuron_id,
            reason=request.reason,
            admin=auth.current_admin().name,
        )
        return pb.ActivateNeuronResponse(neuron=neuron)

    async def DeleteNeuron(
        self,
        request: pb.DeleteNeuronRequest,
        context: grpc.aio.ServicerContext[pb.DeleteNeuronRequest, pb.DeleteNeuronResponse],
    ) -> pb.DeleteNeuronResponse:
        """See the contract."""
        limits.check(request)
        neuron_id = request.neuron_id
        async with self._database.begin() as connection:
            await _lock(connection, neuron_id)
            presence = await fleet.presence(connection, neuron_id)
            if presence is not Presence.OFFLINE and not request.force:
                raise errors.neuron_not_offline(neuron_id)
            before = await fleet.described(connection, neuron_id)
            await audit.record(connection, "neuron", neuron_id, before, None)
            ended = await fleet.forget(connection, neuron_id)
            await self._tell_elsewhere(connection, neuron_id, ended, SessionEnd.REVOKED)
        self._end_here(neuron_id, ended, SessionEnd.REVOKED)
        log.info(
            "neuron deleted",
            action="neuron_deleted",
            neuron_id=neuron_id,
            force=request.force,
            admin=auth.current_admin().name,
        )
        return pb.DeleteNeuronResponse()

    async def GetFleetOverview(
        self,
        request: pb.GetFleetOverviewRequest,
        context: grpc.aio.ServicerContext[pb.GetFleetOverviewRequest, pb.GetFleetOverviewResponse],
    ) -> pb.GetFleetOverviewResponse:
        """See the contract."""
        limits.check(request)
        matching = neuron_list.matching(request.filter)
        async with self._database.begin() as connection:
            numbers = await overview.overview(connection, matching, top=request.top or DEFAULT_TOP)
        return overview_to_proto(numbers)

    async def ListHeartbeats(
        self,
        request: pb.ListHeartbeatsRequest,
        context: grpc.aio.ServicerContext[pb.ListHeartbeatsRequest, pb.ListHeartbeatsResponse],
    ) -> pb.ListHeartbeatsResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            if await registration.find_standing(connection, request.neuron_id) is None:
                raise errors.neuron_not_found(request.neuron_id)
            found, next_page_token = await heartbeats.list_heartbeats(
                connection,
                request.neuron_id,
                start_time=optional_time(request, "start_time"),
                end_time=optional_time(request, "end_time"),
                page_size=request.page_size,
                page_token=request.page_token,
            )
        return pb.ListHeartbeatsResponse(
            heartbeats=[stored_heartbeat_to_proto(stored) for stored in found],
            next_page_token=next_page_token,
        )

    async def _tell_elsewhere(
        self,
        connection: AsyncConnection,
        neuron_id: str,
        ended: EndedSession | None,
        end: SessionEnd,
    ) -> None:
        """Has the server that holds an ended session close its stream, if that is another one."""
        if ended is not None and ended.server_id != self._server_id:
            await hint_end(
                connection, ended.server_id, neuron_id, end, below_epoch=ended.next_epoch
            )

    def _end_here(self, neuron_id: str, ended: EndedSession | None, end: SessionEnd) -> None:
        """Closes an ended session's stream on this server, once that is committed. A session that
        the neuron has opened since is not meant.
        """
        session = self._sessions.get(neuron_id)
        if ended is not None and session is not None and session.epoch < ended.next_epoch:
            session.finish(end)


async def _lock(connection: AsyncConnection, neuron_id: str) -> Standing:
    """How the neuron stands until the transaction ends.

    Raises:
        errors.Refused: NOT_FOUND.
    """
    standing = await registration.lock_neuron(connection, neuron_id)
    if standing is None:
        raise errors.neuron_not_found(neuron_id)
    return standing


async def _shown(connection: AsyncConnection, neuron_id: str) -> neuron_pb2.Neuron:
    """The neuron with its last heartbeat.

    Raises:
        errors.Refused: NOT_FOUND.
    """
    record = await neurons.get(connection, neuron_id)
    if record is None:
        raise errors.neuron_not_found(neuron_id)
    last = None
    if record.last_heartbeat_time is not None:
        last = await heartbeats.get(connection, neuron_id, record.last_heartbeat_time)
    return neuron_to_proto(record, None if last is None else heartbeat_to_proto(last))


def _masked(request: pb.UpdateNeuronRequest, setting: frozenset[str]) -> NeuronDescription:
    """The request's description with the defaults in all fields that are not to be set: those
    have not been checked.
    """
    description = neuron_pb2.NeuronDescription()
    description.CopyFrom(request.description)
    for field in description.DESCRIPTOR.fields:
        if field.name not in setting:
            description.ClearField(field.name)  # type: ignore[arg-type]  # any of its fields
    description.neuron_id = request.neuron_id
    return description_from_proto(description)
