"""Reading what is new of many commands at once, for those who follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from federation_server.domain.command import CommandState
from federation_server.store.commands import (
    CommandRecord,
    CommandTransition,
    record_of,
    select_list,
)
from federation_server.store.database import Connection, statement


@dataclass(frozen=True, slots=True)
class News:
    """A command as it is now, and the transitions that are new."""

    record: CommandRecord
    transitions: Sequence[CommandTransition]

    def since(self, revision: int) -> News:
        """The same, without transitions up to that revision."""
        return News(self.record, [each for each in self.transitions if each.revision > revision])


_READ = statement(f"""
SELECT w.command_id::text, (
        SELECT jsonb_agg(jsonb_build_array(t.revision, t.state, t.transition_time, t.attempt,
                                           t.actor, t.reason) ORDER BY t.revision)
        FROM command_transitions t
        WHERE t.command_id = c.command_id AND t.revision > w.after
    ), {select_list("c")}
FROM unnest(%s::uuid[], %s::int8[], %s::bool[]) AS w (command_id, after, always)
LEFT JOIN commands c ON c.command_id = w.command_id
WHERE c.command_id IS NULL OR c.revision > w.after OR w.always
""")


async def read(
    connection: Connection, wanted: Sequence[tuple[str, int, bool]]
) -> Mapping[str, News | None]:
    """What is new of those commands (command_id, revision, always) since their revisions. A
    command that is not there is None; one that has not changed is left out, unless `always`.
    """
    columns = [list(column) for column in zip(*wanted, strict=True)]
    cursor = await connection.execute(_READ, columns)
    return {
        command_id: None if row[0] is None else News(record_of(row), _transitions(found))
        for command_id, found, *row in await cursor.fetchall()
    }


def _transitions(found: list[list[Any]] | None) -> list[CommandTransition]:
    return [
        CommandTransition(
            revision, CommandState(state), datetime.fromisoformat(time), attempt, actor, reason
        )
        for revision, state, time, attempt, actor, reason in found or ()
    ]
