"""Registering a neuron, renewing what it says of itself, and taking it out again.

A neuron's row in `neurons` is locked before its row in `neuron_states`, and without keeping
others from referring to it (FOR NO KEY UPDATE): the writer holds state rows while it inserts
rows that refer to neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Select, case, cast, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.neuron import (
    DEFAULT_ALERT_THRESHOLDS,
    JsonObject,
    Lifecycle,
    NeuronDescription,
    Presence,
)
from federation_server.store.database import Connection
from federation_server.store.schema import neuron_states, neurons

_DESCRIBED = tuple(field.name for field in fields(NeuronDescription) if field.name != "neuron_id")
"""The columns of a description; the table's have the dataclass's names."""

_LISTS = frozenset({"api_endpoints", "capabilities", "dependencies", "command_types"})


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Standing:
    """Which tokens of a neuron are good, and whether it may take part."""

    generation: int
    """The lowest that is good: that of the newest token that was used, if none has been revoked
    since."""
    lifecycle: Lifecycle
    create_time: datetime

    @property
    def generation_time(self) -> datetime:
        """When the generation began; what was allowed before counts no more."""
        return generation_time(self.generation)


@dataclass(frozen=True, slots=True)
class EndedSession:
    """A session that may no longer write; its stream has yet to be told."""

    server_id: str
    next_epoch: int
    """All of the neuron's sessions below this epoch have ended."""


def generation_at(time: ColumnElement[datetime]) -> ColumnElement[int]:
    """The token generation that begins at that time: microseconds since 1970.

    Being a time, it is higher for an id that was deleted and made again, so that tokens of its
    earlier life stay dead.
    """
    return cast(func.extract("epoch", time) * 1_000_000, BigInteger)


def generation_time(generation: int) -> datetime:
    """When that token generation began."""
    return _EPOCH + timedelta(microseconds=generation)


def newer_generation(than: int, now: datetime) -> int:
    """The generation of a token that is issued now, to whom has one of that generation. The neuron
    must be locked meanwhile: who revokes its tokens comes before, or finds this one old.
    """
    return max(than + 1, (now - _EPOCH) // timedelta(microseconds=1))


_GOOD = b"""
SELECT neuron_id, token_generation, now() FROM neurons
WHERE neuron_id = ANY (%s) AND lifecycle = 'ACTIVE'
FOR SHARE SKIP LOCKED
"""


async def good_generations(
    connection: Connection, neuron_ids: Sequence[str]
) -> dict[str, tuple[int, datetime]]:
    """The lowest generation that is good of each of those neurons, and the time; they are locked
    against who revokes tokens until the transaction ends. Those that are locked, gone or not active
    are left out.
    """
    found = await connection.execute(_GOOD, (list(neuron_ids),))
    return {neuron_id: (lowest, now) async for neuron_id, lowest, now in found}


async def use_generation(connection: AsyncConnection, neuron_id: str, generation: int) -> None:
    """Takes note that a token of that generation was used: older ones are no longer good."""
    await connection.execute(
        update(neurons)
        .where(neurons.c.neuron_id == neuron_id, neurons.c.token_generation < generation)
        .values(token_generation=generation)
    )


async def insert_neuron(
    connection: AsyncConnection,
    description: NeuronDescription,
    lifecycle: Lifecycle = Lifecycle.ACTIVE,
) -> int | None:
    """Takes a neuron in, and returns its token generation; None if the id is taken.

    Waits for another transaction that is taking the same id in.
    """
    made = await connection.execute(
        insert(neurons)
        .values(
            neuron_id=description.neuron_id,
            token_generation=generation_at(func.now()),
            **_columns(description),
            overridden_fields=[],
            lifecycle=lifecycle,
            lifecycle_reason="",
            create_time=func.now(),
            update_time=func.now(),
        )
        .on_conflict_do_nothing(index_elements=["neuron_id"])
        .returning(neurons.c.token_generation)
    )
    generation: int | None = made.scalar_one_or_none()
    if generation is not None:
        await connection.execute(insert(neuron_states).values(_first_state(description)))
    return generation


async def find_standing(connection: AsyncConnection, neuron_id: str) -> Standing | None:
    """How a neuron stands now; None if there is none."""
    row = (await connection.execute(_standing(neuron_id))).one_or_none()
    return None if row is None else Standing(*row)


async def lock_neuron(connection: AsyncConnection, neuron_id: str) -> Standing | None:
    """How a neuron stands until the transaction ends; None if there is none."""
    query = _standing(neuron_id).with_for_update(key_share=True)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else Standing(*row)


def _standing(neuron_id: str) -> Select[int, Lifecycle, datetime]:
    columns = (neurons.c.token_generation, neurons.c.lifecycle, neurons.c.create_time)
    return select(*columns).where(neurons.c.neuron_id == neuron_id)


async def update_description(connection: AsyncConnection, description: NeuronDescription) -> bool:
    """Sets what the neuron says of itself, but for what an admin has set over it.

    The neuron must be locked. Returns whether anything changed.
    """
    columns = [neurons.c[name] for name in (*_DESCRIBED, "overridden_fields")]
    this = neurons.c.neuron_id == description.neuron_id
    stored = (await connection.execute(select(*columns).where(this))).mappings().one()
    changes = {
        name: value
        for name, value in _columns(description).items()
        if name not in stored["overridden_fields"] and value != stored[name]
    }
    if not changes:
        return False
    await connection.execute(update(neurons).where(this).values(**changes, update_time=func.now()))
    if "alert_thresholds" in changes:
        await connection.execute(
            update(neuron_states)
            .where(neuron_states.c.neuron_id == description.neuron_id)
            .values(heartbeat_timeout=heartbeat_timeout(description.alert_thresholds))
        )
    return True


async def raise_generation(connection: AsyncConnection, neuron_id: str) -> int:
    """Kills all tokens that a locked neuron has, and returns the new generation."""
    raised = await connection.execute(
        update(neurons)
        .where(neurons.c.neuron_id == neuron_id)
        .values(token_generation=_next_generation())
        .returning(neurons.c.token_generation)
    )
    generation: int = raised.scalar_one()
    return generation


async def deregister(connection: AsyncConnection, neuron_id: str, reason: str) -> None:
    """Deactivates a locked neuron and kills its tokens."""
    await connection.execute(
        update(neurons)
        .where(neurons.c.neuron_id == neuron_id)
        .values(
            token_generation=_next_generation(),
            lifecycle=Lifecycle.DEACTIVATED,
            lifecycle_reason=reason,
        )
    )


async def end_session(
    connection: AsyncConnection, neuron_id: str, presence: Presence, reason: str
) -> EndedSession | None:
    """Ends the session of a neuron that has one, and leaves the neuron with that presence.

    The epoch is raised, so that nothing the session still sends is written; its lease is over.
    Without an open session only a presence of OFFLINE is taken over. Returns None if no session was
    open.
    """
    state = neuron_states.c
    open_before = (
        await connection.execute(
            select(state.session_open, state.server_id, state.presence)
            .where(state.neuron_id == neuron_id)
            .with_for_update(key_share=True)
        )
    ).one()
    values: dict[str, Any] = {
        "session_epoch": state.session_epoch + 1,
        # least() passes over NULL, and there may be no lease.
        "lease_expire_time": case(
            (state.lease_expire_time.is_not(None), func.least(state.lease_expire_time, func.now()))
        ),
    }
    if open_before.session_open:
        values |= {"session_open": False, "session_close_time": func.now()}
    if open_before.session_open or presence is Presence.OFFLINE:
        values |= {"presence": presence, "presence_reason": reason}
        if open_before.presence is not presence:
            values["presence_time"] = func.now()
    changed = await connection.execute(
        update(neuron_states)
        .where(state.neuron_id == neuron_id)
        .values(values)
        .returning(state.session_epoch)
    )
    epoch: int = changed.scalar_one()
    return EndedSession(open_before.server_id, epoch) if open_before.session_open else None


def heartbeat_timeout(alert_thresholds: JsonObject) -> timedelta:
    """The heartbeat timeout that alert thresholds as stored name."""
    default = DEFAULT_ALERT_THRESHOLDS["heartbeat_timeout_s"]
    value = alert_thresholds.get("heartbeat_timeout_s", default)
    return timedelta(seconds=value if isinstance(value, int | float) else default)


def _next_generation() -> ColumnElement[int]:
    # Not the transaction's time: tokens may have been issued while it waited for the neuron.
    return func.greatest(neurons.c.token_generation + 1, generation_at(func.clock_timestamp()))


def _columns(description: NeuronDescription) -> dict[str, Any]:
    return {
        name: list(value) if name in _LISTS else value
        for name in _DESCRIBED
        for value in (getattr(description, name),)
    }


def _first_state(description: NeuronDescription) -> dict[str, Any]:
    return {
        "neuron_id": description.neuron_id,
        "presence": Presence.OFFLINE,
        "presence_time": func.now(),
        "presence_reason": "registered",
        "heartbeat_timeout": heartbeat_timeout(description.alert_thresholds),
        "session_epoch": 0,
        "session_open": False,
        "instance_id": "",
        "sdk_name": "",
        "sdk_version": "",
        "server_id": "",
        "peer": "",
        "spool_id": "",
        "backlog_sequence": 0,
        "requests_total": 0,
        "failed_requests_total": 0,
        "response_ms_total": 0.0,
        "uptime_s_total": 0.0,
        "counted_instance_id": "",
        "counted_requests": 0,
        "counted_failed_requests": 0,
        "counted_response_ms": 0.0,
        "counted_uptime_s": 0.0,
        "counted_before": [],
    }
