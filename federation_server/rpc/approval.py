"""Whom an admin lets take part, and whom no longer: a part of AccessService."""

from __future__ import annotations

import structlog

from federation.v1 import access_service_pb2 as pb
from federation_server.domain.access import approval_code, same_code
from federation_server.domain.neuron import Lifecycle, Presence
from federation_server.live.session import SessionEnd
from federation_server.rpc import audit, auth, errors
from federation_server.rpc.neuron_changes import SessionEnding, lock, recorded, shown
from federation_server.store import fleet, registration
from federation_server.store.database import Database

log = structlog.get_logger(__name__)


async def approve(database: Database, request: pb.ApproveNeuronRequest) -> pb.ApproveNeuronResponse:
    """Makes a PENDING neuron ACTIVE; its stream finds that out (`live/approvals.py`).

    Raises:
        errors.Refused: as the contract says.
    """
    neuron_id = request.neuron_id
    async with database.begin() as connection:
        standing = await lock(connection, neuron_id)
        if standing.lifecycle is Lifecycle.DEACTIVATED:
            raise errors.neuron_not_pending(neuron_id, "is deactivated: activate it")
        code = approval_code(neuron_id, standing.create_time)
        if request.approval_code and not same_code(code, request.approval_code):
            words = "has another approval_code: compare it with what the neuron logs"
            raise errors.neuron_not_pending(neuron_id, words)
        if standing.lifecycle is Lifecycle.PENDING:
            async with recorded(connection, neuron_id):
                await fleet.activate(connection, neuron_id, standing, request.reason or "approved")
        neuron = await shown(connection, neuron_id)
    _log("neuron approved", "neuron_approved", neuron_id)
    return pb.ApproveNeuronResponse(neuron=neuron)


async def reject(database: Database, request: pb.RejectNeuronRequest) -> pb.RejectNeuronResponse:
    """Makes a PENDING neuron DEACTIVATED, and revokes its token.

    Raises:
        errors.Refused: as the contract says.
    """
    neuron_id = request.neuron_id
    async with database.begin() as connection:
        standing = await lock(connection, neuron_id)
        if standing.lifecycle is Lifecycle.ACTIVE:
            raise errors.neuron_not_pending(neuron_id, "is active: deactivate it")
        if standing.lifecycle is Lifecycle.PENDING:
            async with recorded(connection, neuron_id):
                await registration.deregister(connection, neuron_id, request.reason or "rejected")
        neuron = await shown(connection, neuron_id)
    _log("neuron rejected", "neuron_rejected", neuron_id)
    return pb.RejectNeuronResponse(neuron=neuron)


async def revoke_tokens(
    database: Database, ending: SessionEnding, request: pb.RevokeNeuronTokensRequest
) -> pb.RevokeNeuronTokensResponse:
    """Kills the tokens that a neuron has, and ends its session.

    Raises:
        errors.Refused: as the contract says.
    """
    neuron_id = request.neuron_id
    async with database.begin() as connection:
        await lock(connection, neuron_id)
        await registration.raise_generation(connection, neuron_id)
        after = {"tokens_revoked": True, "reason": request.reason}
        await audit.record(connection, "neuron", neuron_id, {}, after)
        ended = await registration.end_session(
            connection, neuron_id, Presence.OFFLINE, request.reason or "token revoked"
        )
        await ending.elsewhere(connection, neuron_id, ended, SessionEnd.REVOKED)
        neuron = await shown(connection, neuron_id)
    ending.here(neuron_id, ended, SessionEnd.REVOKED)
    _log("tokens revoked", "neuron_tokens_revoked", neuron_id)
    return pb.RevokeNeuronTokensResponse(neuron=neuron)


def _log(event: str, action: str, neuron_id: str) -> None:
    log.info(event, action=action, neuron_id=neuron_id, admin=auth.current_admin().name)
