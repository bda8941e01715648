"""What neurons send, applied: one transaction for everything that waits.

`apply` is the store's side of the hot path (see `live/writer.py`). Within one transaction it

    1. locks the state rows of the neurons that sent durable messages, and with that finds which
       of the sessions are still the newest (the fence) and how far each spool has been applied;
    2. writes the reports, events and command updates beyond those marks, and the new marks;
    3. rewrites the state rows of the neurons that sent heartbeats, again only where the session
       is the newest, and copies those heartbeats into the history;
    4. closes the sessions whose streams have ended.

Before all that it opens again the sessions that were closed although their streams are open.

What comes from a session that is no longer the newest changes nothing. Epoch 0 stands for a
neuron without a stream: its token was checked when it called, and no session can supersede it,
but the neuron may have been deactivated since.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeAlias

from federation_server.domain.analytics import AnalyticsReport
from federation_server.domain.command import CommandUpdate, answers_cancel
from federation_server.domain.command import apply as change
from federation_server.domain.heartbeat import Heartbeat
from federation_server.domain.neuron import Presence
from federation_server.store.analytics import ingest as ingest_analytics
from federation_server.store.analytics.ingest import ReceivedReport
from federation_server.store.database import Connection
from federation_server.store.ledger import changes, following
from federation_server.store.ledger.changes import ChangedCommand
from federation_server.store.ledger.following import Followed, News
from federation_server.store.pipeline import Answer, Pipeline, pipeline, roll_back

DurablePayload: TypeAlias = AnalyticsReport | CommandUpdate | None
"""What a durable message holds; None for one that this server does not know or has refused: it
only moves the mark."""


class HeartbeatItem(NamedTuple):
    """A heartbeat and the session that it came on."""

    neuron_id: str
    epoch: int
    instance_id: str
    heartbeat: Heartbeat


class DurableItem(NamedTuple):
    """A durable message, its place in its spool, and the session that it came on."""

    neuron_id: str
    epoch: int
    spool_id: str
    sequence: int
    payload: DurablePayload
    receive_clock: float | None = None
    """When it came, by `time.monotonic`; None: at this moment."""


class ClosedItem(NamedTuple):
    """A session whose stream has ended, and the presence that this leaves its neuron in."""

    neuron_id: str
    epoch: int
    presence: Presence
    reason: str


@dataclass(slots=True)
class Outcome:
    """What a committed batch has done."""

    time: datetime
    """When, by PostgreSQL's clock."""
    fenced: set[tuple[str, int]] = field(default_factory=set)
    """The sessions (neuron_id, epoch) that are no longer the newest: nothing of theirs was
    written."""
    marks: dict[tuple[str, str], int] = field(default_factory=dict)
    """For each (neuron_id, spool_id): the last sequence that has been applied."""
    changed: Sequence[ChangedCommand] = ()
    """The commands that changed."""
    news: Mapping[str, News | None] = field(default_factory=dict)
    """What is new of those that are followed."""


_FENCE = b"""
SELECT s.neuron_id, b.epoch
FROM unnest($1::text[], $2::int8[]) AS b (neuron_id, epoch)
JOIN neuron_states s USING (neuron_id)
WHERE CASE WHEN b.epoch = 0
           THEN (SELECT n.lifecycle = 'ACTIVE' FROM neurons n WHERE n.neuron_id = s.neuron_id)
           ELSE s.session_epoch = b.epoch END
ORDER BY s.neuron_id
FOR NO KEY UPDATE OF s
"""

_MARKS = b"""
SELECT p.neuron_id, p.spool_id, p.last_sequence
FROM unnest($1::text[], $2::text[]) AS b (neuron_id, spool_id)
JOIN spools p USING (neuron_id, spool_id)
"""

_ADVANCE = b"""
INSERT INTO spools (neuron_id, spool_id, last_sequence, update_time)
SELECT neuron_id, spool_id, last_sequence, now()
FROM unnest($1::text[], $2::text[], $3::int8[]) AS b (neuron_id, spool_id, last_sequence)
ON CONFLICT (neuron_id, spool_id) DO UPDATE
SET last_sequence = excluded.last_sequence, update_time = excluded.update_time
"""

# A neuron's totals go on over its restarts, and over processes that take turns: only what a process
# has grown by since it was counted is added. That is known of the process that was heard last, and
# of the few before it (`counted_before`, newest first). `greatest` passes over NULL: what a
# heartbeat does not say adds nothing. No total grows beyond what its column holds.
_BEFORE = "(SELECT e FROM jsonb_array_elements(s.counted_before) e WHERE e->>0 = b.instance_id)"


def _counted(column: str, place: int, kind: str) -> str:
    """What was counted of the process that sends."""
    return f"""CASE WHEN s.counted_instance_id = b.instance_id THEN s.{column}
        ELSE coalesce(({_BEFORE}->>{place})::{kind}, 0) END"""


_MOST_BEFORE = 4
_MOST_COUNT = 2**63 - 1
_MOST_SUM = 1e300
_TOTALS = ",\n".join(
    f"""
    {total} = s.{total} + least(
        greatest(0, b.{said} - {_counted(counted, place, kind)}), {most}::{kind} - s.{total}),
    {counted} = coalesce(b.{said}, {_counted(counted, place, kind)})"""
    for place, (total, said, counted, kind, most) in enumerate(
        (
            ("requests_total", "requests", "counted_requests", "int8", _MOST_COUNT),
            (
                "failed_requests_total",
                "failed_requests",
                "counted_failed_requests",
                "int8",
                _MOST_COUNT,
            ),
            ("response_ms_total", "response_ms_sum", "counted_response_ms", "float8", _MOST_SUM),
            ("uptime_s_total", "uptime_s", "counted_uptime_s", "float8", _MOST_SUM),
        ),
        1,
    )
)

# A heartbeat that is written after its session has closed does not make its neuron ONLINE again.
_STATE = f"""
UPDATE neuron_states s SET
    last_heartbeat_time = now(),
    health_score = b.health_score,
    cpu_percent = b.cpu_percent,
    memory_percent = b.memory_percent,
    error_rate_percent = b.error_rate_percent,
    mean_response_ms = b.mean_response_ms,
    uptime_s = b.uptime_s,
    host = coalesce(b.host::jsonb,
        CASE WHEN s.counted_instance_id = b.instance_id THEN s.host END),
    presence = CASE WHEN s.session_open OR b.epoch = 0 THEN 'ONLINE' ELSE s.presence END,
    presence_time = CASE WHEN (s.session_open OR b.epoch = 0) AND s.presence <> 'ONLINE'
        THEN now() ELSE s.presence_time END,
    presence_reason = CASE WHEN (s.session_open OR b.epoch = 0) AND s.presence <> 'ONLINE'
        THEN 'heartbeat received' ELSE s.presence_reason END,
    {_TOTALS},
    counted_instance_id = b.instance_id,
    counted_before = CASE
        WHEN s.counted_instance_id = b.instance_id OR s.counted_instance_id = ''
            THEN s.counted_before
        ELSE jsonb_build_array(jsonb_build_array(
                s.counted_instance_id, s.counted_requests, s.counted_failed_requests,
                s.counted_response_ms, s.counted_uptime_s))
            || coalesce((SELECT jsonb_agg(e ORDER BY place) FROM
                jsonb_array_elements(s.counted_before) WITH ORDINALITY AS k (e, place)
                WHERE e->>0 <> b.instance_id AND place < {_MOST_BEFORE}), '[]')
        END
FROM unnest(
    $1::text[], $2::int8[], $3::text[], $4::float8[], $5::float8[], $6::float8[], $7::float8[],
    $8::float8[], $9::float8[], $10::int8[], $11::int8[], $12::float8[], $13::text[]
) AS b (neuron_id, epoch, instance_id, health_score, cpu_percent, memory_percent,
        error_rate_percent, mean_response_ms, uptime_s, requests, failed_requests,
        response_ms_sum, host)
WHERE s.neuron_id = b.neuron_id AND
    CASE WHEN b.epoch = 0
         THEN (SELECT n.lifecycle = 'ACTIVE' FROM neurons n WHERE n.neuron_id = s.neuron_id)
         ELSE s.session_epoch = b.epoch END
RETURNING s.neuron_id, b.epoch
""".encode()

_REOPEN = b"""
UPDATE neuron_states s SET
    session_open = true,
    session_close_time = NULL,
    presence = 'ONLINE',
    presence_time = CASE WHEN s.presence <> 'ONLINE' THEN now() ELSE s.presence_time END,
    presence_reason = 'its stream is open'
FROM unnest($1::text[], $2::int8[]) AS b (neuron_id, epoch)
WHERE s.neuron_id = b.neuron_id AND s.session_epoch = b.epoch AND NOT s.session_open
"""

# A session that is no longer the newest has nothing left to close.
_CLOSE = b"""
UPDATE neuron_states s SET
    session_open = false,
    session_close_time = now(),
    presence = b.presence::presence,
    presence_time = CASE WHEN s.presence <> b.presence::presence THEN now()
                         ELSE s.presence_time END,
    presence_reason = b.reason
FROM unnest($1::text[], $2::int8[], $3::text[], $4::text[])
     AS b (neuron_id, epoch, presence, reason)
WHERE s.neuron_id = b.neuron_id AND s.session_epoch = b.epoch AND s.session_open
"""

_COPY_HEARTBEATS = f"COPY heartbeats (neuron_id, epoch, {', '.join(Heartbeat._fields)}) FROM STDIN"


async def apply(
    connection: Connection,
    heartbeats: Sequence[HeartbeatItem],
    durables: Sequence[DurableItem],
    closed: Sequence[ClosedItem],
    *,
    reopened: Sequence[tuple[str, int]] = (),
    oldest_point: timedelta,
    followed: Followed = lambda command_ids: (),
) -> Outcome:
    """Applies a batch in one transaction and says what it did.

    `heartbeats` holds at most one item for each neuron. `durables` is in the order of arrival.
    `reopened` are sessions (neuron_id, epoch) whose streams are open.
    `oldest_point` is how far back a late report may be placed in time. `followed` says which of the
    changed commands are to be read, for those who follow them.

    Raises:
        psycopg.DataError: a value does not fit its column; nothing was written. The caller
            bisects the batch to find whose it is.
        psycopg.OperationalError: PostgreSQL is away; whether the batch was committed is unknown,
            and applying it again is safe.
    """
    if heartbeats or any(isinstance(item.payload, AnalyticsReport) for item in durables):
        # COPY cannot be sent in a pipeline: the transaction outlives it.
        try:
            async with pipeline(connection) as send:
                send.simple(b"BEGIN")
                applied = await _apply(
                    send, heartbeats, durables, closed, reopened, followed=followed
                )
            if applied.reports:
                await ingest_analytics.write(connection, applied.reports, oldest=oldest_point)
            if heartbeats:
                await _copy(connection, heartbeats, applied)
            await connection.execute(b"COMMIT")
        except BaseException:
            await roll_back(connection)
            raise
    else:
        async with pipeline(connection, transaction=True) as send:
            applied = await _apply(send, heartbeats, durables, closed, reopened, followed=followed)
    outcome = applied.outcome
    outcome.changed, outcome.news = await applied.changed(), await applied.news()
    return outcome


@dataclass(slots=True)
class _Applied:
    """A batch, applied but for what is copied."""

    outcome: Outcome
    changed: Callable[[], Awaitable[Sequence[ChangedCommand]]]
    news: Callable[[], Awaitable[Mapping[str, News | None]]]
    reports: Sequence[ReceivedReport]
    beating: set[tuple[Any, ...]]
    """The sessions (neuron_id, epoch) that are the newest, of those that sent heartbeats."""


async def _apply(
    send: Pipeline,
    heartbeats: Sequence[HeartbeatItem],
    durables: Sequence[DurableItem],
    closed: Sequence[ClosedItem],
    reopened: Sequence[tuple[str, int]],
    *,
    followed: Followed,
) -> _Applied:
    """Sends as much at a time as does not need another statement's answer."""
    clock = send(b"SELECT now()")
    if reopened:
        send(_REOPEN, *_columns(reopened))
    fresh = await _judge(send, durables, clock) if durables else _Fresh()
    ((now,),) = await clock
    if fresh.advanced:
        rows = [(*spool, fresh.marks[spool]) for spool in sorted(fresh.advanced)]
        send(_ADVANCE, *_columns(rows))
    _update(fresh, now)
    changed = changes.save_later(send, fresh.commands.values())
    changing = [command_id for command_id, row in fresh.commands.items() if row.changed]
    news = following.read_later(send, followed(changing))
    state = send(_STATE, *_state_columns(heartbeats)) if heartbeats else None
    if closed:
        send(_CLOSE, *_columns(closed))
    return _Applied(
        outcome=Outcome(now, fresh.fenced, fresh.marks),
        changed=changed,
        news=news,
        reports=fresh.reports,
        beating=set(await state) if state is not None else set(),
    )


@dataclass(slots=True)
class _Fresh:
    """What of a batch's durable messages has not been applied, and may be."""

    fenced: set[tuple[str, int]] = field(default_factory=set)
    marks: dict[tuple[str, str], int] = field(default_factory=dict)
    advanced: set[tuple[str, str]] = field(default_factory=set)
    reports: list[ReceivedReport] = field(default_factory=list)
    updates: list[tuple[str, CommandUpdate]] = field(default_factory=list)
    commands: dict[str, changes.Row] = field(default_factory=dict)
    """The commands that the updates speak of, locked."""


async def _judge(send: Pipeline, durables: Sequence[DurableItem], clock: Answer) -> _Fresh:
    sessions = {(item.neuron_id, item.epoch) for item in durables}
    spools = {(item.neuron_id, item.spool_id) for item in durables}
    updates = [i.payload.command_id for i in durables if isinstance(i.payload, CommandUpdate)]
    # In this order: the marks, and the commands, as they are once the fence's locks are held.
    fence = send(_FENCE, *_columns(sessions))
    found_marks = send(_MARKS, *_columns(spools))
    locked = changes.lock_later(send, updates)

    fresh = _Fresh(fenced=sessions - set(await fence))
    marks = {
        (item.neuron_id, item.spool_id): 0
        for item in durables
        if (item.neuron_id, item.epoch) not in fresh.fenced
    }
    for neuron_id, spool_id, last_sequence in await found_marks:
        if (neuron_id, spool_id) in marks:
            marks[neuron_id, spool_id] = last_sequence
    ((now,),) = await clock
    for item in durables:
        spool = (item.neuron_id, item.spool_id)
        if (item.neuron_id, item.epoch) in fresh.fenced or item.sequence <= marks[spool]:
            continue
        marks[spool] = item.sequence
        fresh.advanced.add(spool)
        if isinstance(item.payload, AnalyticsReport):
            waited = timedelta()
            if item.receive_clock is not None:
                waited = timedelta(seconds=time.monotonic() - item.receive_clock)
            fresh.reports.append(ReceivedReport(item.neuron_id, now - waited, item.payload))
        elif isinstance(item.payload, CommandUpdate):
            fresh.updates.append((item.neuron_id, item.payload))
    fresh.marks = marks
    fresh.commands = await locked()
    return fresh


def _update(fresh: _Fresh, now: datetime) -> None:
    """What neurons say of their commands, in order. An update for an unknown command, for another
    neuron's, of another attempt, or backwards, changes nothing; but what it says of an attempt that
    was to be given up is an answer.
    """
    for neuron_id, update in fresh.updates:
        row = fresh.commands.get(update.command_id)
        if row is None or row.entry.neuron_id != neuron_id:
            continue
        if answers_cancel(row.entry, update):
            row.answer()
        after = change(row.entry, update, now)
        if after is not None:
            row.become(after, f"neuron:{neuron_id}")


def _state_columns(heartbeats: Sequence[HeartbeatItem]) -> list[list[Any]]:
    return _columns(
        (
            item.neuron_id,
            item.epoch,
            item.instance_id,
            beat.health_score,
            beat.cpu_percent,
            beat.memory_percent,
            beat.error_rate_percent,
            beat.mean_response_ms,
            beat.uptime_s,
            beat.requests,
            beat.failed_requests,
            beat.response_ms_sum,
            beat.host,
        )
        for item in heartbeats
        for beat in (item.heartbeat,)
    )


async def _copy(
    connection: Connection,
    heartbeats: Sequence[HeartbeatItem],
    applied: _Applied,
) -> None:
    """Copies the heartbeats whose sessions are the newest into the history."""
    async with connection.cursor() as cursor, cursor.copy(_COPY_HEARTBEATS) as copy:
        for item in heartbeats:
            if (item.neuron_id, item.epoch) in applied.beating:
                await copy.write_row((item.neuron_id, item.epoch, *item.heartbeat))
            else:
                applied.outcome.fenced.add((item.neuron_id, item.epoch))


def _columns(rows: Any) -> list[list[Any]]:
    """The same rows as columns, for unnest; at least one row."""
    return [list(column) for column in zip(*rows, strict=True)]
