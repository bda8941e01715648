"""FleetService: the neurons, how they are, and who may take part."""

from __future__ import annotations

import grpc.aio
import structlog

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import fleet_service_pb2_grpc as pb_grpc
from federation.v1 import neuron_pb2
from federation_server.domain.neuron import Lifecycle, NeuronDescription, Presence
from federation_server.live.session import SessionEnd
from federation_server.rpc import audit, auth, errors, limits
from federation_server.rpc.convert import optional_time
from federation_server.rpc.convert_heartbeat import stored_heartbeat_to_proto
from federation_server.rpc.convert_neuron import (
    description_from_proto,
    neuron_to_proto,
    overview_to_proto,
)
from federation_server.rpc.neuron_changes import SessionEnding, lock, recorded, shown
from federation_server.store import fleet, heartbeats, neuron_list, overview, registration
from federation_server.store.database import Database
from federation_server.store.registration import Standing

log = structlog.get_logger(__name__)

DEFAULT_TOP = 5


class FleetServicer(pb_grpc.FleetServiceServicer):
    """Shows the fleet to admins, and does to neurons what they say."""

    def __init__(self, database: Database, ending: SessionEnding) -> None:
        """Serves from `database`."""
        self._database = database
        self._ending = ending

    async def GetNeuron(
        self,
        request: pb.GetNeuronRequest,
        context: grpc.aio.ServicerContext[pb.GetNeuronRequest, pb.GetNeuronResponse],
    ) -> pb.GetNeuronResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            return pb.GetNeuronResponse(neuron=await shown(connection, request.neuron_id))

    async def ListNeurons(
        self,
        request: pb.ListNeuronsRequest,
        context: grpc.aio.ServicerContext[pb.ListNeuronsRequest, pb.ListNeuronsResponse],
    ) -> pb.ListNeuronsResponse:
        """See the contract."""
        limits.check(request)
        order_by = limits.order(request.order_by, neuron_list.ORDERS)
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
            await lock(connection, request.neuron_id)
            async with recorded(connection, request.neuron_id):
                await fleet.override(connection, description, setting=setting, releasing=releasing)
            neuron = await shown(connection, request.neuron_id)
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
            standing = await lock(connection, neuron_id)
            _refuse_pending(standing, neuron_id)
            async with recorded(connection, neuron_id):
                ended = await fleet.deactivate(connection, neuron_id, standing, request.reason)
            await self._ending.elsewhere(connection, neuron_id, ended, SessionEnd.DEACTIVATED)
            neuron = await shown(connection, neuron_id)
        self._ending.here(neuron_id, ended, SessionEnd.DEACTIVATED)
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
            standing = await lock(connection, request.neuron_id)
            _refuse_pending(standing, request.neuron_id)
            async with recorded(connection, request.neuron_id):
                await fleet.activate(connection, request.neuron_id, standing, request.reason)
            neuron = await shown(connection, request.neuron_id)
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
            await lock(connection, neuron_id)
            presence = await fleet.presence(connection, neuron_id)
            if presence is not Presence.OFFLINE and not request.force:
                raise errors.neuron_not_offline(neuron_id)
            before = await fleet.described(connection, neuron_id)
            await audit.record(connection, "neuron", neuron_id, before, None)
            ended = await fleet.forget(connection, neuron_id)
            await self._ending.elsewhere(connection, neuron_id, ended, SessionEnd.REVOKED)
        self._ending.here(neuron_id, ended, SessionEnd.REVOKED)
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


def _refuse_pending(standing: Standing, neuron_id: str) -> None:
    """Who waits for an approval is approved or rejected, by an ADMIN."""
    if standing.lifecycle is Lifecycle.PENDING:
        raise errors.neuron_pending(neuron_id)


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
