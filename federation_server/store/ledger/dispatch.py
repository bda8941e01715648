"""What the dispatcher takes from the ledger: commands to send, and attempts to be given up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from federation_server.domain.command import CommandState, Execution, predecessors
from federation_server.domain.neuron import JsonObject
from federation_server.store.database import Connection
from federation_server.store.ledger.changes import CONNECTED, IN_FLIGHT, states
from federation_server.store.pipeline import Pipeline, pipeline


@dataclass(frozen=True, slots=True)
class ClaimedCommand:
    """A command that this server is to write to its neuron's stream."""

    command_id: str
    neuron_id: str
    session_epoch: int
    attempt: int
    type: str
    data: JsonObject
    priority: int
    run_timeout: timedelta | None
    expire_after: timedelta | None
    """None for one that has started: it was sent before, and its fate is unknown."""
    checkpoint: JsonObject | None
    max_attempts: int
    execution: Execution
    again: bool
    """It was sent before, and its fate is unknown."""


@dataclass(frozen=True, slots=True)
class ClaimedCancel:
    """An attempt that this server is to tell its neuron to give up."""

    command_id: str
    neuron_id: str
    session_epoch: int
    attempt: int
    reason: str


@dataclass(slots=True)
class Claim:
    """What sessions get, in the order in which each is to get it."""

    cancels: list[ClaimedCancel] = field(default_factory=list)
    """To be written before the commands."""
    commands: list[ClaimedCommand] = field(default_factory=list)
    full: set[str] = field(default_factory=set)
    """The neurons that got as many commands as they had places for: more may wait."""


_MOST_CONTROL = 16
"""How many control commands a session gets at a time."""

_DUE = f"""
    state IN {states(*predecessors(CommandState.SENT))} AND expire_time > now()
    AND (not_before_time IS NULL OR not_before_time <= now())
    AND (next_attempt_time IS NULL OR next_attempt_time <= now())
    AND (cancel_attempt IS NULL OR cancel_epoch IS NOT NULL)
    AND NOT held
"""
"""What may be sent now. An attempt that is to be given up is, before the next one is sent."""

_TO_CANCEL = "cancel_attempt IS NOT NULL AND (state = 'CANCELLING' OR cancel_epoch IS NULL)"
"""The condition of the index `commands_cancel`: what a session that was not told yet is to be
told."""

_TOLD = "cancel_attempt IS NOT NULL"
"""The condition of the index `commands_told`: what some session was told, perhaps, and no neuron
has answered."""

_REASON = """
CASE WHEN attempt = cancel_attempt AND state_reason <> '' THEN state_reason
     ELSE 'nobody waits for it any more' END
"""
"""Why an attempt is to be given up. The command's reason may be a later attempt's."""

_AGAIN = states(CommandState.SENT, CommandState.ACCEPTED, CommandState.RUNNING)

# Three kinds are taken: what waits and has a place (control commands need none); what is in flight
# since an earlier session and was not named in this one's Hello, which is sent again with the same
# attempt, for the neuron's journal to answer; and attempts to be given up, once in each session. A
# command whose session is superseded meanwhile is found again by the next one. To a doubtful
# session goes also what was marked SENT for that very session, and every attempt that it was to
# give up and has not answered for: the answer to an earlier claim was lost. What somebody else is
# changing is left for the next scan, so that a claim waits for nobody, and nobody for it in a
# circle. What an earlier attempt has left behind goes when the next one is sent; its cancel stays.
_CLAIM = f"""
WITH place AS (
    SELECT s.neuron_id, s.session_epoch, w.doubtful,
        least($1::int8, n.max_concurrent_commands - (
            SELECT count(*) FROM commands c
            WHERE c.neuron_id = s.neuron_id AND NOT c.control AND c.state IN {IN_FLIGHT}
        )) AS free
    FROM unnest($2::text[], $3::int8[], $4::bool[])
         AS w (neuron_id, epoch, doubtful)
    JOIN neuron_states s ON s.neuron_id = w.neuron_id AND s.session_epoch = w.epoch
    JOIN neurons n ON n.neuron_id = s.neuron_id
    WHERE {CONNECTED}
), picked AS (
    SELECT p.neuron_id, p.session_epoch, c.command_id, c.state, c.lane
    FROM place p
    CROSS JOIN LATERAL (
        (SELECT command_id, state, 'control' AS lane FROM commands
         WHERE neuron_id = p.neuron_id AND control AND {_DUE}
         ORDER BY priority DESC, create_time LIMIT {_MOST_CONTROL})
        UNION ALL
        (SELECT command_id, state, 'normal' FROM commands
         WHERE neuron_id = p.neuron_id AND NOT control AND {_DUE}
         ORDER BY priority DESC, create_time LIMIT greatest(p.free, 0))
        UNION ALL
        (SELECT command_id, state, 'again' FROM commands
         WHERE neuron_id = p.neuron_id AND state IN {_AGAIN}
           AND (session_epoch < p.session_epoch AND execution = 'AT_LEAST_ONCE'
                OR p.doubtful AND state = 'SENT' AND session_epoch = p.session_epoch)
         ORDER BY priority DESC, create_time)
    ) c
), free AS MATERIALIZED (
    SELECT picked.* FROM picked JOIN commands c USING (command_id)
    WHERE c.state = picked.state AND NOT c.held
    ORDER BY command_id
    FOR NO KEY UPDATE OF c SKIP LOCKED
), to_cancel AS MATERIALIZED (
    SELECT c.command_id, p.session_epoch
    FROM place p JOIN commands c USING (neuron_id)
    WHERE {_TO_CANCEL} AND c.cancel_epoch IS DISTINCT FROM p.session_epoch
    ORDER BY c.command_id
    FOR NO KEY UPDATE OF c SKIP LOCKED
), claimed AS (
    UPDATE commands c SET
        state = CASE WHEN c.state = 'QUEUED' THEN 'SENT' ELSE c.state END,
        attempt = CASE WHEN c.state = 'QUEUED' THEN c.attempt + 1 ELSE c.attempt END,
        session_epoch = free.session_epoch,
        send_time = now(),
        state_reason = CASE WHEN c.state = 'QUEUED' THEN '' ELSE 'sent again to a new session' END,
        next_attempt_time = NULL,
        accept_time = CASE WHEN c.state <> 'QUEUED' THEN c.accept_time END,
        start_time = CASE WHEN c.state <> 'QUEUED' THEN c.start_time END,
        progress_fraction = CASE WHEN c.state <> 'QUEUED' THEN c.progress_fraction END,
        progress_message = CASE WHEN c.state <> 'QUEUED' THEN c.progress_message END,
        progress_time = CASE WHEN c.state <> 'QUEUED' THEN c.progress_time END,
        error_code = NULL,
        error_message = NULL,
        error_details = NULL,
        log_tail = '',
        run_duration = NULL,
        revision = c.revision + 1
    FROM free WHERE c.command_id = free.command_id
    RETURNING c.*, free.state <> 'QUEUED' AS again
), logged AS (
    INSERT INTO command_transitions
        (command_id, revision, state, transition_time, attempt, actor, reason)
    SELECT command_id, revision, state, now(), attempt, 'server:' || $5::text, ''
    FROM claimed WHERE NOT again
), given_up AS (
    UPDATE commands c SET cancel_epoch = to_cancel.session_epoch
    FROM to_cancel WHERE c.command_id = to_cancel.command_id
    RETURNING c.*
)
SELECT 'command', command_id::text, neuron_id, session_epoch, attempt, '', type, data, priority,
       run_timeout, CASE WHEN state <> 'RUNNING' THEN greatest(expire_time - now(), '0') END,
       checkpoint, max_attempts, execution::text, again, control, create_time
FROM claimed
UNION ALL
SELECT 'cancel', command_id::text, neuron_id, cancel_epoch, cancel_attempt, {_REASON}, '', NULL,
       0, NULL, NULL, NULL, 0, '', true, true, NULL
FROM given_up
UNION ALL
SELECT 'cancel', command_id::text, neuron_id, cancel_epoch, cancel_attempt, {_REASON}, '', NULL,
       0, NULL, NULL, NULL, 0, '', true, true, NULL
FROM place JOIN commands USING (neuron_id)
WHERE doubtful AND {_TOLD} AND cancel_epoch = place.session_epoch
UNION ALL
SELECT 'full', '', neuron_id, session_epoch, 0, '', '', NULL,
       0, NULL, NULL, NULL, 0, '', true, true, NULL
FROM place
WHERE free <= (SELECT count(*) FROM picked
               WHERE picked.neuron_id = place.neuron_id AND lane = 'normal')
   OR {_MOST_CONTROL} <= (SELECT count(*) FROM picked
                          WHERE picked.neuron_id = place.neuron_id AND lane = 'control')
ORDER BY 3, 15 DESC, 16 DESC, 9 DESC, 17
""".encode()


async def claim(
    connection: Connection,
    server_id: str,
    sessions: Sequence[tuple[str, int]],
    *,
    doubtful: Collection[tuple[str, int]] = (),
    most: int = 1_000_000,
) -> Claim:
    """Takes what those sessions (neuron_id, epoch) of this server are to be sent now, and marks
    it so; in autocommit mode what it returns is committed. `doubtful` are those of them for which
    the answer to an earlier claim was lost; `most` is how many commands a session gets that are no
    control commands and were not sent before.
    """
    async with pipeline(connection) as send:
        return await claim_later(send, server_id, sessions, doubtful=doubtful, most=most)()


def claim_later(
    send: Pipeline,
    server_id: str,
    sessions: Sequence[tuple[str, int]],
    *,
    doubtful: Collection[tuple[str, int]] = (),
    most: int = 1_000_000,
) -> Callable[[], Awaitable[Claim]]:
    """The same: asks now, and gives the claim when called."""
    answer = send(
        _CLAIM,
        most,
        [neuron_id for neuron_id, _ in sessions],
        [epoch for _, epoch in sessions],
        [session in doubtful for session in sessions],
        server_id,
    )

    async def claimed() -> Claim:
        claim = Claim()
        for kind, command_id, neuron_id, epoch, attempt, reason, *order in await answer:
            match kind:
                case "command":
                    order[7] = Execution(order[7])
                    command = ClaimedCommand(command_id, neuron_id, epoch, attempt, *order[:9])
                    claim.commands.append(command)
                case "cancel":
                    cancel = ClaimedCancel(command_id, neuron_id, epoch, attempt, reason)
                    claim.cancels.append(cancel)
                case _:
                    claim.full.add(neuron_id)
        return claim

    return claimed


_CANCELS = f"""
UPDATE commands c SET cancel_epoch = s.session_epoch
FROM neuron_states s
WHERE s.neuron_id = %(neuron_id)s AND s.session_epoch = %(epoch)s
  AND c.neuron_id = s.neuron_id AND {_TO_CANCEL}
  AND c.cancel_epoch IS DISTINCT FROM s.session_epoch
RETURNING c.command_id::text, c.neuron_id, c.cancel_epoch, c.cancel_attempt, {_REASON}
""".encode()


async def claim_cancels(connection: Connection, neuron_id: str, epoch: int) -> list[ClaimedCancel]:
    """Takes the attempts that one session is to give up and was not told of."""
    cursor = await connection.execute(_CANCELS, {"neuron_id": neuron_id, "epoch": epoch})
    return [ClaimedCancel(*row) for row in await cursor.fetchall()]


_WAITING = f"""
SELECT DISTINCT c.neuron_id
FROM commands c JOIN neuron_states s USING (neuron_id)
WHERE s.session_open AND s.server_id = %(server_id)s
  AND ({_DUE}
       OR ({_TO_CANCEL} AND c.cancel_epoch IS DISTINCT FROM s.session_epoch)
       OR (c.state IN {_AGAIN} AND c.execution = 'AT_LEAST_ONCE'
           AND c.session_epoch < s.session_epoch))
""".encode()


async def neurons_with_work(connection: Connection, server_id: str) -> list[str]:
    """The neurons with a stream on this server for which something waits: what hints missed, and
    what had to wait for its time.
    """
    cursor = await connection.execute(_WAITING, {"server_id": server_id})
    return [neuron_id for (neuron_id,) in await cursor.fetchall()]
