"""PullCommands and ReportCommand: commands for neurons that hold no stream."""

from __future__ import annotations

from datetime import timedelta

import structlog

from federation.v1 import session_service_pb2 as pb
from federation_server.domain.access import NeuronIdentity
from federation_server.live.dispatcher import cancel, delivery
from federation_server.live.notifier import hint_end
from federation_server.live.session import SessionEnd
from federation_server.rpc import convert_stream, errors
from federation_server.rpc.convert import optional_span, to_timestamp
from federation_server.rpc.receipt import Receipt
from federation_server.rpc.standing import just_let_in, turned_away
from federation_server.rpc.stream import StreamParts
from federation_server.store.database import driver
from federation_server.store.ingest import DurableItem
from federation_server.store.ledger import dispatch, leases
from federation_server.store.ledger.changes import is_command_id

log = structlog.get_logger(__name__)

DEFAULT_LEASE = timedelta(minutes=1)
MOST_AT_ONCE = 12
"""How many commands that were not sent before one answer holds, so that it stays within the
contract's 4 MiB."""


async def pull(
    parts: StreamParts, identity: NeuronIdentity, request: pb.PullCommandsRequest
) -> pb.PullCommandsResponse:
    """Begins or renews the session of a process, and gives it what waits for its neuron.

    Raises:
        errors.Refused: the neuron may hold no session, or another one began since its epoch.
    """
    neuron_id = identity.neuron_id
    async with parts.database.begin_for_neurons() as connection:
        raw = await driver(connection)
        lease = await leases.open_lease(
            raw,
            neuron_id,
            identity.generation,
            request.instance_id,
            optional_span(request, "lease_duration") or DEFAULT_LEASE,
            epoch=request.epoch,
        )
        if lease is None:
            if refused := await turned_away(connection, identity):
                raise refused
            if request.epoch:
                raise errors.session_superseded(neuron_id)
            raise just_let_in(neuron_id)
        if lease.previous_server_id is not None:
            await hint_end(
                connection,
                lease.previous_server_id,
                neuron_id,
                SessionEnd.SUPERSEDED,
                below_epoch=lease.epoch,
            )
        pulled = await leases.pull(
            raw,
            parts.server_id,
            neuron_id,
            lease.epoch,
            running=[
                (each.command_id, each.attempt)
                for each in request.running_commands
                if is_command_id(each.command_id)
            ],
            most=min(request.max_commands or MOST_AT_ONCE, MOST_AT_ONCE),
        )
    parts.changed(pulled.lost)
    parts.metrics.commands_sent.inc(len(pulled.commands))
    if lease.begun:
        log.info(
            "session without a stream",
            action="lease_opened",
            neuron_id=neuron_id,
            epoch=lease.epoch,
        )
    return pb.PullCommandsResponse(
        epoch=lease.epoch,
        commands=[convert_stream.delivery(delivery(each)) for each in pulled.commands],
        cancel_commands=[convert_stream.cancel(cancel(each)) for each in pulled.cancels],
        lease_expire_time=to_timestamp(lease.expire_time),
    )


async def report(
    parts: StreamParts, identity: NeuronIdentity, request: pb.ReportCommandRequest
) -> pb.ReportCommandResponse:
    """Stores what became of a command, and renews the lease.

    Raises:
        errors.Refused: another session began since, or it was not stored in time.
    """
    neuron_id, epoch = identity.neuron_id, request.epoch
    receipt = Receipt(parts.database, identity, fenced=errors.session_superseded(neuron_id))
    update = convert_stream.command_update(request.update)
    item = DurableItem(neuron_id, epoch, request.spool_id, request.sequence, update)
    mark = await receipt.store(parts.writer, item, request.ByteSize())
    async with parts.database.begin_for_neurons() as connection:
        raw = await driver(connection)
        expire_time = await leases.renew(raw, neuron_id, epoch)
        cancels = await dispatch.claim_cancels(raw, neuron_id, epoch) if expire_time else []
    return pb.ReportCommandResponse(
        ack_sequence=mark,
        lease_expire_time=to_timestamp(expire_time),
        cancel_commands=[convert_stream.cancel(cancel(each)) for each in cancels],
    )
