"""Reading what is new of many commands at once, for those who follow them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from federation_server.domain.command import CommandState
from federation_server.store.database import Connection
from federation_server.store.ledger.commands import (
    CommandRecord,
    CommandTransition,
    record_of,
    select_list,
)
from federation_server.store.pipeline import Pipeline, pipeline


class Asked(NamedTuple):
    """Of which command, and since which revision."""

    command_id: str
    after: int
    always: bool
    """Also if it has not changed since."""


Followed: TypeAlias = Callable[[Sequence[str]], Sequence[Asked]]
"""Says which of those commands are followed."""


@dataclass(frozen=True, slots=True)
class News:
    """A command as it is now, and its transitions since a revision."""

    record: CommandRecord
    transitions: Sequence[CommandTransition]
    after: int

    def since(self, revision: int) -> News:
        """The same, without transitions up to that revision."""
        newer = [each for each in self.transitions if each.revision > revision]
        return News(self.record, newer, revision)


def first(record: CommandRecord) -> News:
    """What is to be seen of a command that has just been issued."""
    actor = f"admin:{record.issuer}"
    queued = CommandTransition(1, record.state, record.create_time, record.attempt, actor, "")
    return News(record, [queued], 0)


_READ = f"""
SELECT w.command_id::text, w.after, (
        SELECT jsonb_agg(jsonb_build_array(t.revision, t.state, t.transition_time, t.attempt,
                                           t.actor, t.reason) ORDER BY t.revision)
        FROM command_transitions t
        WHERE t.command_id = c.command_id AND t.revision > w.after
    ), {select_list("c")}
FROM unnest($1::uuid[], $2::int8[], $3::bool[]) AS w (command_id, after, always)
LEFT JOIN commands c ON c.command_id = w.command_id
WHERE c.command_id IS NULL OR c.revision > w.after OR w.always
""".encode()


async def read(connection: Connection, asked: Sequence[Asked]) -> Mapping[str, News | None]:
    """What is new of those commands. One that is not there is None; one that has not changed is
    left out, unless `always`.
    """
    async with pipeline(connection) as send:
        return await read_later(send, asked)()


def read_later(
    send: Pipeline, asked: Sequence[Asked]
) -> Callable[[], Awaitable[Mapping[str, News | None]]]:
    """The same: asks now, and gives the news when called."""
    columns = [list(column) for column in zip(*asked, strict=True)]
    answer = send(_READ, *columns) if asked else None

    async def news() -> Mapping[str, News | None]:
        return {
            command_id: None
            if row[0] is None
            else News(record_of(row), _transitions(transitions), after)
            for command_id, after, transitions, *row in (await answer if answer is not None else ())
        }

    return news


def _transitions(found: list[list[Any]] | None) -> list[CommandTransition]:
    return [
        CommandTransition(
            revision, CommandState(state), datetime.fromisoformat(time), attempt, actor, reason
        )
        for revision, state, time, attempt, actor, reason in found or ()
    ]
