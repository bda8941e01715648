"""What admins do to neurons: change what they say of themselves, shut them out, forget them.

Each function wants the neuron locked (`registration.lock_neuron`) by its transaction.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.neuron import Lifecycle, NeuronDescription, Presence
from federation_server.store import registration
from federation_server.store.registration import EndedSession, Standing
from federation_server.store.schema import (
    heartbeats,
    metric_points,
    metric_series,
    neuron_states,
    neurons,
    reported_events,
)

DEACTIVATED = "deactivated"

_ADMINS = ("overridden_fields", "lifecycle", "lifecycle_reason")


async def described(connection: AsyncConnection, neuron_id: str) -> dict[str, Any]:
    """All that admins can change of a neuron, for the audit log."""
    names = (*registration.DESCRIBED, *_ADMINS)
    columns = [neurons.c[name] for name in names]
    query = select(*columns).where(neurons.c.neuron_id == neuron_id)
    return dict(zip(names, (await connection.execute(query)).one(), strict=True))


async def override(
    connection: AsyncConnection,
    description: NeuronDescription,
    *,
    setting: Set[str],
    releasing: Set[str],
) -> None:
    """Sets fields of a neuron's description to the values in `description` and keeps them over
    its next Register; gives other fields back to it, which keep their values until then.
    """
    this = neurons.c.neuron_id == description.neuron_id
    columns = [neurons.c[name] for name in sorted(setting)]
    stored = (
        (await connection.execute(select(neurons.c.overridden_fields, *columns).where(this)))
        .mappings()
        .one()
    )
    overridden = (set(stored["overridden_fields"]) | setting) - releasing
    changes: dict[str, Any] = {
        name: getattr(description, name)
        for name in sorted(setting)
        if getattr(description, name) != stored[name]
    }
    if changes:
        changes["update_time"] = func.now()
    await connection.execute(
        update(neurons).where(this).values(overridden_fields=sorted(overridden), **changes)
    )
    if "alert_thresholds" in changes:
        timeout = registration.heartbeat_timeout(description.alert_thresholds)
        await connection.execute(
            update(neuron_states)
            .where(neuron_states.c.neuron_id == description.neuron_id)
            .values(heartbeat_timeout=timeout)
        )


async def deactivate(
    connection: AsyncConnection, neuron_id: str, standing: Standing, reason: str
) -> EndedSession | None:
    """Shuts a neuron out and ends its session; returns that one if it was open.

    A neuron that is shut out already keeps its reason unless a new one is said.
    """
    await _set_lifecycle(connection, neuron_id, standing, Lifecycle.DEACTIVATED, reason)
    if standing.lifecycle is Lifecycle.DEACTIVATED:
        return None
    return await registration.end_session(
        connection, neuron_id, Presence.OFFLINE, reason or DEACTIVATED
    )


async def activate(
    connection: AsyncConnection, neuron_id: str, standing: Standing, reason: str
) -> None:
    """Lets a neuron take part again. One that may already keeps its reason unless a new one is
    said.
    """
    await _set_lifecycle(connection, neuron_id, standing, Lifecycle.ACTIVE, reason)


async def _set_lifecycle(
    connection: AsyncConnection,
    neuron_id: str,
    standing: Standing,
    lifecycle: Lifecycle,
    reason: str,
) -> None:
    if standing.lifecycle is lifecycle and not reason:
        return
    await connection.execute(
        update(neurons)
        .where(neurons.c.neuron_id == neuron_id)
        .values(lifecycle=lifecycle, lifecycle_reason=reason)
    )


async def presence(connection: AsyncConnection, neuron_id: str) -> Presence:
    """A neuron's presence now."""
    query = select(neuron_states.c.presence).where(neuron_states.c.neuron_id == neuron_id)
    found: Presence = (await connection.execute(query)).scalar_one()
    return found


async def forget(connection: AsyncConnection, neuron_id: str) -> EndedSession | None:
    """Deletes a neuron and all that is known of it; returns its session if that was open.

    The history may be long and the writer must not wait for it: most of it goes before the
    state row is locked, and what has come meanwhile after that, when nothing more can come.
    """
    await _forget_history(connection, neuron_id)
    ended = await registration.end_session(connection, neuron_id, Presence.OFFLINE, "deleted")
    await _forget_history(connection, neuron_id)
    # Its state, spools, commands and series go with it.
    await connection.execute(delete(neurons).where(neurons.c.neuron_id == neuron_id))
    return ended


async def _forget_history(connection: AsyncConnection, neuron_id: str) -> None:
    series = select(metric_series.c.series_id).where(metric_series.c.neuron_id == neuron_id)
    for statement in (
        delete(heartbeats).where(heartbeats.c.neuron_id == neuron_id),
        delete(reported_events).where(reported_events.c.neuron_id == neuron_id),
        delete(metric_points).where(metric_points.c.series_id.in_(series)),
    ):
        await connection.execute(statement)
