"""CommandService: what operators order; its batches are in `command_batch.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import command_pb2
from federation.v1 import command_service_pb2 as pb
from federation.v1 import command_service_pb2_grpc as pb_grpc
from federation_server.domain.audit import fit
from federation_server.domain.command import CommandState
from federation_server.domain.explain import explain
from federation_server.domain.neuron import Json, Lifecycle
from federation_server.live.issuer import Issued, Request
from federation_server.live.notifier import hint_dispatch
from federation_server.live.watchers import WatchersClosed
from federation_server.rpc import audit, auth, errors, limits
from federation_server.rpc.command_batch import CommandBatches
from federation_server.rpc.convert_command import command as to_command
from federation_server.rpc.convert_command import fact as to_fact
from federation_server.rpc.order import Order
from federation_server.store.database import driver
from federation_server.store.ledger import changes, following
from federation_server.store.ledger import commands as store
from federation_server.store.ledger.changes import is_command_id
from federation_server.store.ledger.following import News
from federation_server.store.ledger.issuing import Known, Target
from federation_server.store.ledger.listing import ORDERS, list_commands
from federation_server.store.ledger.situation import situation

log = structlog.get_logger(__name__)

_BEING_CANCELLED = frozenset({CommandState.CANCELLING, CommandState.CANCELLED})


class CommandServicer(CommandBatches, pb_grpc.CommandServiceServicer):
    """Issues commands, and shows and follows them."""

    async def IssueCommand(
        self,
        request: pb.IssueCommandRequest,
        context: grpc.aio.ServicerContext[pb.IssueCommandRequest, pb.IssueCommandResponse],
    ) -> pb.IssueCommandResponse:
        """See the contract."""
        limits.check(request)
        issued = await self._issue(
            request.command.neuron_id,
            Order.of_spec(request.command),
            request.request_id,
            dry_run=request.dry_run,
        )
        return pb.IssueCommandResponse(command=to_command(_record(issued)))

    async def GetCommand(
        self,
        request: pb.GetCommandRequest,
        context: grpc.aio.ServicerContext[pb.GetCommandRequest, pb.GetCommandResponse],
    ) -> pb.GetCommandResponse:
        """See the contract."""
        limits.check(request)
        async with self._parts.database.begin() as connection:
            record = await _get(connection, request.command_id)
            transitions = await store.transitions(connection, record)
        return pb.GetCommandResponse(command=to_command(record, transitions))

    async def ListCommands(
        self,
        request: pb.ListCommandsRequest,
        context: grpc.aio.ServicerContext[pb.ListCommandsRequest, pb.ListCommandsResponse],
    ) -> pb.ListCommandsResponse:
        """See the contract."""
        limits.check(request)
        order_by = limits.order(request.order_by, ORDERS)
        async with self._parts.database.begin() as connection:
            records, next_page_token = await list_commands(
                connection,
                filter_text=request.filter,
                order_by=order_by,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        return pb.ListCommandsResponse(
            commands=[to_command(record) for record in records], next_page_token=next_page_token
        )

    async def ExecuteCommand(
        self,
        request: pb.ExecuteCommandRequest,
        context: grpc.aio.ServicerContext[pb.ExecuteCommandRequest, pb.ExecuteCommandResponse],
    ) -> AsyncIterator[pb.ExecuteCommandResponse]:
        """See the contract."""
        limits.check(request)
        order = Order.of_spec(request.command)
        issued = await self._issue(request.command.neuron_id, order, request.request_id)
        seen = None if isinstance(issued, Known) else following.first(issued)
        async for command in self._follow(_record(issued).command_id, seen=seen):
            yield pb.ExecuteCommandResponse(command=command)

    async def WatchCommand(
        self,
        request: pb.WatchCommandRequest,
        context: grpc.aio.ServicerContext[pb.WatchCommandRequest, pb.WatchCommandResponse],
    ) -> AsyncIterator[pb.WatchCommandResponse]:
        """See the contract."""
        limits.check(request)
        async for command in self._follow(request.command_id, after=request.after_revision):
            yield pb.WatchCommandResponse(command=command)

    async def CancelCommand(
        self,
        request: pb.CancelCommandRequest,
        context: grpc.aio.ServicerContext[pb.CancelCommandRequest, pb.CancelCommandResponse],
    ) -> pb.CancelCommandResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        async with self._parts.database.begin() as connection:
            await _get(connection, request.command_id)
            own = await driver(connection)
            locked = await changes.lock(own, [request.command_id])
            changed = await changes.cancel_commands(
                own,
                [request.command_id],
                actor=f"admin:{admin.name}",
                reason=request.reason,
            )
            record = await _get(connection, request.command_id)
            if not changed and record.state not in _BEING_CANCELLED:
                raise errors.command_ended(record.command_id, record.state)
            if changed:
                before = {"state": locked[record.command_id].entry.state}
                after = {"state": record.state, "reason": request.reason}
                await audit.record(
                    connection,
                    "command",
                    record.command_id,
                    before,
                    after,
                    neuron_id=record.neuron_id,
                )
            home = await store.home(connection, record.neuron_id)
            if home not in {None, self._parts.server_id}:
                await hint_dispatch(connection, str(home), record.neuron_id)
        self._parts.changed(changed)
        log.info(
            "command cancelled",
            action="command_cancelled",
            command_id=record.command_id,
            neuron_id=record.neuron_id,
            state=record.state,
            admin=admin.name,
        )
        return pb.CancelCommandResponse(command=to_command(record))

    async def RetryCommand(
        self,
        request: pb.RetryCommandRequest,
        context: grpc.aio.ServicerContext[pb.RetryCommandRequest, pb.RetryCommandResponse],
    ) -> pb.RetryCommandResponse:
        """See the contract."""
        limits.check(request)
        async with self._parts.database.begin() as connection:
            old = await _get(connection, request.command_id)
        if not old.final:
            raise errors.command_not_ended(old.command_id, old.state)
        issued = await self._issue(old.neuron_id, Order.again(old), request.request_id)
        return pb.RetryCommandResponse(command=to_command(_record(issued)))

    async def ExplainCommand(
        self,
        request: pb.ExplainCommandRequest,
        context: grpc.aio.ServicerContext[pb.ExplainCommandRequest, pb.ExplainCommandResponse],
    ) -> pb.ExplainCommandResponse:
        """See the contract."""
        limits.check(request)
        async with self._parts.database.begin() as connection:
            record = await _get(connection, request.command_id)
            transitions = await store.transitions(connection, record)
            facts = explain(await situation(connection, record, transitions))
        return pb.ExplainCommandResponse(
            command=to_command(record, transitions), facts=[to_fact(fact) for fact in facts]
        )

    async def _follow(
        self, command_id: str, *, after: int = 0, seen: News | None = None
    ) -> AsyncIterator[command_pb2.Command]:
        """The command now, and after each change, until its end."""
        if not is_command_id(command_id):
            raise errors.command_not_found(command_id)
        with self._parts.watchers.watching(command_id, after, seen=seen) as watch:
            while True:
                try:
                    news = await watch.next()
                except WatchersClosed:
                    raise errors.server_draining() from None
                if news is None:
                    raise errors.command_not_found(command_id)
                yield to_command(news.record, news.transitions)
                if news.record.final:
                    return

    async def _issue(
        self, neuron_id: str, order: Order, request_id: str, *, dry_run: bool = False
    ) -> Issued:
        admin = auth.current_admin()

        def command(target: Target | None) -> store.NewCommand:
            if target is None:
                raise errors.neuron_not_found(neuron_id)
            if target.lifecycle is Lifecycle.DEACTIVATED:
                raise errors.neuron_deactivated(neuron_id)
            if target.lifecycle is Lifecycle.PENDING:
                raise errors.neuron_pending(neuron_id)
            order.check_data(neuron_id, target.advertised)
            order.check_times(target.now)
            return order.command(
                neuron_id,
                target.advertised,
                issuer=admin.name,
                request_id=request_id,
                now=target.now,
            )

        ordered: dict[str, Json] = {"type": order.type, "data": order.data}
        if order.retry_of_command_id is not None:
            ordered["retry_of_command_id"] = order.retry_of_command_id
        entry = audit.entry(
            "command", "", None, fit(ordered), neuron_id=neuron_id, request_id=request_id
        )
        issued = await self._parts.issuer.issue(
            Request(neuron_id, order.type, admin.name, request_id, command, entry, dry_run=dry_run)
        )
        if isinstance(issued, Known):
            if issued.request_hash != order.content:
                raise errors.request_id_reused(request_id)
        elif not dry_run:
            log.info(
                "command issued",
                action="command_issued",
                command_id=issued.command_id,
                neuron_id=issued.neuron_id,
                type=issued.type,
                issuer=issued.issuer,
            )
        return issued


def _record(issued: Issued) -> store.CommandRecord:
    return issued.record if isinstance(issued, Known) else issued


async def _get(connection: AsyncConnection, command_id: str) -> store.CommandRecord:
    record = await store.get(connection, command_id) if is_command_id(command_id) else None
    if record is None:
        raise errors.command_not_found(command_id)
    return record
