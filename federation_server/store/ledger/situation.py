"""What there is to know of why a command is where it is, read at one moment."""

from __future__ import annotations

from sqlalchemy import and_, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.command import IN_FLIGHT_STATES, CommandState
from federation_server.domain.explain import FailedAttempt, Situation
from federation_server.domain.neuron import Activity
from federation_server.store.ledger.commands import CommandRecord, CommandTransition
from federation_server.store.schema import commands, heartbeats, neuron_states, neurons

_OF_COMMAND = (
    "state_reason",
    "attempt",
    "max_attempts",
    "create_time",
    "not_before_time",
    "next_attempt_time",
    "expire_time",
    "send_time",
    "start_time",
    "end_time",
    "progress_fraction",
    "progress_message",
    "progress_time",
    "accept_timeout",
    "run_timeout",
    "progress_timeout",
)


async def situation(
    connection: AsyncConnection,
    record: CommandRecord,
    transitions: list[CommandTransition],
) -> Situation:
    """The situation of a command, of which the record and all transitions have been read."""
    own, state = commands.c, neuron_states.c
    in_flight = record.state in IN_FLIGHT_STATES
    told = own.session_epoch == state.session_epoch if in_flight else true()
    row = (
        await connection.execute(
            select(
                func.now().label("now"),
                own.control,
                own.held,
                own.accept_time,
                own.cancel_time,
                neurons.c.lifecycle,
                neurons.c.max_concurrent_commands,
                state.presence,
                state.presence_time,
                state.presence_reason,
                (state.session_open & told).label("connected"),
            )
            .join(neurons, neurons.c.neuron_id == own.neuron_id)
            .join(neuron_states, state.neuron_id == own.neuron_id)
            .where(own.command_id == record.command_id)
        )
    ).one()
    return Situation(
        now=row.now,
        state=record.state,
        control=row.control,
        held=row.held,
        accept_time=row.accept_time,
        cancel_time=row.cancel_time,
        lifecycle=row.lifecycle,
        presence=row.presence,
        presence_time=row.presence_time,
        presence_reason=row.presence_reason,
        connected=row.connected,
        activity=await _activity(connection, record.neuron_id),
        max_concurrent=row.max_concurrent_commands,
        taken=await _taken(connection, record),
        ahead=await _ahead(connection, record, control=row.control),
        failed=[
            FailedAttempt(each.transition_time, each.reason)
            for each in reversed(transitions)
            if each.state is CommandState.QUEUED and each.attempt
        ],
        **{name: getattr(record, name) for name in _OF_COMMAND},
    )


async def _activity(connection: AsyncConnection, neuron_id: str) -> Activity:
    """What the neuron said last of what it does."""
    newest = (
        select(heartbeats.c.activity)
        .where(heartbeats.c.neuron_id == neuron_id)
        .order_by(heartbeats.c.receive_time.desc())
        .limit(1)
    )
    return (await connection.execute(newest)).scalar_one_or_none() or Activity.UNSPECIFIED


async def _taken(connection: AsyncConnection, record: CommandRecord) -> int:
    own = commands.c
    return (
        await connection.execute(
            select(func.count()).where(
                own.neuron_id == record.neuron_id,
                ~own.control,
                own.state.in_(IN_FLIGHT_STATES),
                own.command_id != record.command_id,
            )
        )
    ).scalar_one()


async def _ahead(connection: AsyncConnection, record: CommandRecord, *, control: bool) -> int:
    own = commands.c
    return (
        await connection.execute(
            select(func.count()).where(
                own.neuron_id == record.neuron_id,
                own.control == control,
                own.state == CommandState.QUEUED,
                or_(own.not_before_time.is_(None), own.not_before_time <= func.now()),
                or_(own.next_attempt_time.is_(None), own.next_attempt_time <= func.now()),
                or_(
                    own.priority > record.priority,
                    and_(own.priority == record.priority, own.create_time < record.create_time),
                ),
            )
        )
    ).scalar_one()
