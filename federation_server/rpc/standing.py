"""Why a neuron may not go on that its token has let in: what became of it in the meantime."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.access import NeuronIdentity
from federation_server.domain.neuron import Lifecycle
from federation_server.rpc import errors
from federation_server.rpc.errors import Refused
from federation_server.store.registration import find_standing


async def turned_away(connection: AsyncConnection, identity: NeuronIdentity) -> Refused | None:
    """What to tell it: that it was deactivated or deleted, that its token was revoked, or that it
    waits for its approval. None if it may go on: an admin has let it in since it was asked for.
    """
    standing = await find_standing(connection, identity.neuron_id)
    if standing is not None and standing.lifecycle is Lifecycle.DEACTIVATED:
        return errors.neuron_deactivated(identity.neuron_id)
    if standing is None or standing.generation > identity.generation:
        return errors.credential_invalid()
    if standing.lifecycle is Lifecycle.PENDING:
        return errors.neuron_pending(identity.neuron_id)
    return None


def just_let_in(neuron_id: str) -> Refused:
    """What to tell one that may go on, and was turned away a moment ago: to call again."""
    return errors.conflict(f"{neuron_id} was activated at this moment")
