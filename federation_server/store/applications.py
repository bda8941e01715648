"""Neurons that joined without a credential."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.access import secret_hash
from federation_server.domain.neuron import Lifecycle
from federation_server.store.database import Connection
from federation_server.store.schema import applications, neurons

SECRET_LENGTH = 16
"""A shorter request_id could be guessed, and a repeated call gets the neuron's token."""


async def note(connection: AsyncConnection, neuron_id: str, request_id: str) -> None:
    """Keeps in mind which call has taken the neuron in."""
    if len(request_id) >= SECRET_LENGTH:
        hashed = secret_hash(request_id)
        await connection.execute(
            insert(applications).values(neuron_id=neuron_id, request_hash=hashed)
        )


async def is_repeated(connection: AsyncConnection, neuron_id: str, request_id: str) -> bool:
    """Whether that call has taken the neuron in."""
    query = select(applications.c.request_hash).where(applications.c.neuron_id == neuron_id)
    noted = (await connection.execute(query)).scalar_one_or_none()
    return noted is not None and hmac.compare_digest(noted, secret_hash(request_id))


async def count_pending(connection: AsyncConnection) -> int:
    """How many neurons wait for their approval."""
    pending = neurons.c.lifecycle == Lifecycle.PENDING
    query = select(func.count()).select_from(neurons).where(pending)
    return int((await connection.execute(query)).scalar_one())


_PENDING = b"""
SELECT n.neuron_id
FROM unnest(%s::text[], %s::int8[]) AS w (neuron_id, generation) JOIN neurons n USING (neuron_id)
WHERE n.lifecycle = 'PENDING' AND n.token_generation <= w.generation
"""


async def still_pending(connection: Connection, generations: Mapping[str, int]) -> set[str]:
    """Those of the neurons that wait for their approval, and whose tokens of that generation are
    good.
    """
    found = await connection.execute(_PENDING, ([*generations], [*generations.values()]))
    return {neuron_id async for (neuron_id,) in found}


_FORGET = b"""
DELETE FROM neurons WHERE lifecycle = 'PENDING' AND create_time < now() - %s RETURNING neuron_id
"""


async def forget(connection: Connection, older_than: timedelta) -> list[str]:
    """Forgets the neurons that have waited longer; returns their ids."""
    found = await connection.execute(_FORGET, (older_than,))
    return [neuron_id async for (neuron_id,) in found]
