"""What a command is in the ledger, before it is issued and after, and how one is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.command import (
    DEFAULT_BACKOFF,
    FINAL_STATES,
    CommandState,
    Execution,
)
from federation_server.domain.neuron import JsonObject
from federation_server.store.schema import (
    command_transitions,
    commands,
    neuron_states,
)


@dataclass(frozen=True, slots=True)
class CommandTransition:
    """One change of a command's state."""

    revision: int
    state: CommandState
    transition_time: datetime
    attempt: int
    actor: str
    reason: str


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """A command as the ledger holds it; the fields are those of the table."""

    command_id: str
    neuron_id: str
    issuer: str
    type: str
    data: JsonObject
    priority: int
    not_before_time: datetime | None
    expire_time: datetime
    accept_timeout: timedelta | None
    run_timeout: timedelta | None
    progress_timeout: timedelta | None
    execution: Execution
    max_attempts: int
    retry_backoff: timedelta
    allow_unadvertised: bool
    retry_of_command_id: str | None
    batch_id: str | None
    state: CommandState
    state_reason: str
    attempt: int
    revision: int
    next_attempt_time: datetime | None
    progress_fraction: float | None
    progress_message: str | None
    progress_time: datetime | None
    checkpoint: JsonObject | None
    response: JsonObject | None
    error_code: str | None
    error_message: str | None
    error_details: JsonObject | None
    log_tail: str
    run_duration: timedelta | None
    create_time: datetime
    send_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None

    @property
    def final(self) -> bool:
        """True once nothing can change it any more."""
        return self.state in FINAL_STATES


RECORD_COLUMNS = tuple(commands.c[name] for name in CommandRecord.__slots__)

_TEXTS = {"command_id", "retry_of_command_id", "batch_id", "state", "execution"}
_STATE = CommandRecord.__slots__.index("state")
_EXECUTION = CommandRecord.__slots__.index("execution")


def select_list(table: str) -> str:
    """What plain SQL selects of a row of `table` for `record_of`."""
    return ", ".join(
        f"{table}.{name}::text" if name in _TEXTS else f"{table}.{name}"
        for name in CommandRecord.__slots__
    )


def record_of(row: list[Any]) -> CommandRecord:
    """The command of a row that plain SQL has selected by `select_list`."""
    row[_STATE] = CommandState(row[_STATE])
    row[_EXECUTION] = Execution(row[_EXECUTION])
    return CommandRecord(*row)


@dataclass(frozen=True, slots=True)
class NewCommand:
    """A command about to be issued."""

    neuron_id: str
    issuer: str
    request_id: str | None
    request_hash: bytes
    type: str
    data: JsonObject
    control: bool
    priority: int
    not_before_time: datetime | None
    expire_time: datetime
    accept_timeout: timedelta | None = None
    run_timeout: timedelta | None = None
    progress_timeout: timedelta | None = None
    execution: Execution = Execution.AT_LEAST_ONCE
    max_attempts: int = 1
    retry_backoff: timedelta = DEFAULT_BACKOFF
    allow_unadvertised: bool = False
    retry_of_command_id: str | None = None


def is_control(advertised: JsonObject | None) -> bool:
    """Whether a command type, as a neuron advertises it, goes through the control lane."""
    return bool(advertised and advertised.get("control"))


async def home(connection: AsyncConnection, neuron_id: str) -> str | None:
    """The server that holds a neuron's stream, if one does."""
    state = neuron_states.c
    query = select(state.server_id).where(state.neuron_id == neuron_id, state.session_open)
    return (await connection.execute(query)).scalar_one_or_none()


def preview(new: NewCommand, now: datetime) -> CommandRecord:
    """The command that issuing would make, without an id."""
    issued = {name: getattr(new, name) for name in NewCommand.__slots__}
    for name in ("request_id", "request_hash", "control"):
        del issued[name]
    return CommandRecord(
        command_id="",
        batch_id=None,
        state=CommandState.QUEUED,
        state_reason="",
        attempt=0,
        revision=0,
        next_attempt_time=None,
        progress_fraction=None,
        progress_message=None,
        progress_time=None,
        checkpoint=None,
        response=None,
        error_code=None,
        error_message=None,
        error_details=None,
        log_tail="",
        run_duration=None,
        create_time=now,
        send_time=None,
        start_time=None,
        end_time=None,
        **issued,
    )


async def get(connection: AsyncConnection, command_id: str) -> CommandRecord | None:
    """One command."""
    row = (
        await connection.execute(select(*RECORD_COLUMNS).where(commands.c.command_id == command_id))
    ).one_or_none()
    return None if row is None else _record(row)


async def transitions(
    connection: AsyncConnection, record: CommandRecord, *, after: int = 0
) -> list[CommandTransition]:
    """A command's changes of state beyond a revision, oldest first, and up to where the record
    shows it: it may have gone on since that was read.
    """
    names = CommandTransition.__slots__
    rows = await connection.execute(
        select(*(command_transitions.c[name] for name in names))
        .where(
            and_(
                command_transitions.c.command_id == record.command_id,
                command_transitions.c.revision > after,
                command_transitions.c.revision <= record.revision,
            )
        )
        .order_by(command_transitions.c.revision)
    )
    return [CommandTransition(*row) for row in rows]


def _record(row: Sequence[Any]) -> CommandRecord:
    return CommandRecord(*row[: len(RECORD_COLUMNS)])
