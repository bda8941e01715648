"""From the operators to the ledger: one transaction for all commands that wait to be issued.

    issue ─▶ who is it for, was it asked before ─▶ the caller's own judgement ─▶ insert ─▶ claim
        ─▶ commit ─▶ to the stream (live/dispatcher.py), and the answer to the caller

What is for a neuron of this server is claimed in the same transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeAlias

from federation_server.domain.audit import Entry
from federation_server.live.dispatcher import Dispatcher
from federation_server.live.group_commit import Asked, GroupCommit
from federation_server.live.metrics import Metrics
from federation_server.live.notifier import send_hints
from federation_server.store.database import Connection, Database, OwnConnection
from federation_server.store.ledger import issuing
from federation_server.store.ledger.commands import CommandRecord, NewCommand, preview
from federation_server.store.ledger.issuing import Known, Target
from federation_server.store.pipeline import Pipeline, pipeline

MOST_AT_ONCE = 200

Issued: TypeAlias = CommandRecord | Known


@dataclass(eq=False, slots=True)
class Request(Asked[Issued]):
    """A command that somebody asks for."""

    neuron_id: str
    type: str
    issuer: str
    request_id: str
    command: Callable[[Target | None], NewCommand]
    """Makes the command for that neuron; whatever it raises is the answer."""
    entry: Entry
    """For the audit log, if the command is issued."""
    dry_run: bool = False


_Answer: TypeAlias = tuple[Request, Issued]
_New: TypeAlias = tuple[Request, NewCommand, Target]


class Issuer:
    """Issues commands."""

    def __init__(
        self, database: Database, server_id: str, dispatcher: Dispatcher, metrics: Metrics
    ) -> None:
        """Issues nothing before `run`."""
        self._server_id = server_id
        self._dispatcher = dispatcher
        self._metrics = metrics
        connection = OwnConnection(database, "issuer", shared=True)
        self._group = GroupCommit(connection, self._issue, most=MOST_AT_ONCE)

    async def run(self) -> None:
        """Issues until it is cancelled."""
        await self._group.run()

    async def issue(self, request: Request) -> Issued:
        """Issues a command, unless its issuer has used the request_id before. A dry run's command
        has no id.

        Raises:
            psycopg.Error: PostgreSQL does not answer; the command may have been issued.
            Exception: whatever `request.command` raised.
        """
        self._group.add(request)
        return await request.answer

    async def _issue(self, connection: Connection, requests: Sequence[Request]) -> None:
        answers: list[_Answer] = []
        async with (
            AsyncExitStack() as sent,  # which ends after the commit
            pipeline(connection, transaction=True) as send,
        ):
            asked = [(each.issuer, each.request_id) for each in requests if each.request_id]
            known = issuing.known_later(send, asked)
            wanted = [(each.neuron_id, each.type) for each in requests]
            targets = issuing.targets_later(send, wanted)
            new = _judge(requests, await known(), await targets(), answers)
            if new:
                inserted = self._insert(send, new)
                neuron_ids = [request.neuron_id for request, _, _ in new]
                await sent.enter_async_context(self._dispatcher.claiming(send, neuron_ids))
                answers += await inserted()
        for request, answer in answers:
            request.give(answer)
            if isinstance(answer, CommandRecord) and not request.dry_run:
                self._metrics.commands_issued.inc()

    def _insert(
        self, send: Pipeline, new: Sequence[_New]
    ) -> Callable[[], Awaitable[list[_Answer]]]:
        inserted = issuing.insert_later(
            send, [(command, target.now, request.entry) for request, command, target in new]
        )
        elsewhere = [
            (request.neuron_id, target.server_id)
            for request, _, target in new
            if target.server_id not in {None, self._server_id}
        ]
        if elsewhere:
            send_hints(send, [(who, str(where)) for who, where in elsewhere])

        async def answers() -> list[_Answer]:
            records = await inserted()
            # The same request came at the same time, and was first: on another server, or here.
            twice = [
                (request.issuer, request.request_id)
                for (request, _, _), record in zip(new, records, strict=True)
                if record is None
            ]
            known = await issuing.known_later(send, twice)()
            return [
                (request, record or known[request.issuer, request.request_id])
                for (request, _, _), record in zip(new, records, strict=True)
            ]

        return answers


def _judge(
    requests: Sequence[Request],
    known: Mapping[tuple[str, str], Known],
    targets: Mapping[tuple[str, str], Target],
    answers: list[_Answer],
) -> list[_New]:
    """What is to be inserted. Those that need no inserting get their answers."""
    new: list[_New] = []
    for each in requests:
        before = known.get((each.issuer, each.request_id))
        if before is not None:
            answers.append((each, before))
            continue
        target = targets.get((each.neuron_id, each.type))
        try:
            command = each.command(target)
        except Exception as error:  # noqa: BLE001 - it is the caller's own
            each.fail(error)
            continue
        assert target is not None, "without a neuron there is no command"
        if each.dry_run:
            answers.append((each, preview(command, target.now)))
        else:
            new.append((each, command, target))
    return new
