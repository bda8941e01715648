"""CommandService: what operators order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import grpc.aio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import command_service_pb2 as pb
from federation.v1 import command_service_pb2_grpc as pb_grpc
from federation_server.domain import json_schema
from federation_server.domain.command import DEFAULT_EXPIRY, DEFAULT_PRIORITY
from federation_server.domain.neuron import JsonObject, Lifecycle
from federation_server.domain.violation import Violation
from federation_server.live.dispatcher import Dispatcher
from federation_server.live.metrics import Metrics
from federation_server.live.notifier import hint_dispatch
from federation_server.live.watchers import CommandWatchers
from federation_server.rpc import auth, errors, limits
from federation_server.rpc.convert import from_struct, optional_span, optional_time
from federation_server.rpc.convert_command import command as to_command
from federation_server.store import commands as store
from federation_server.store.command_list import ORDERS, list_commands
from federation_server.store.database import Database, current_time
from federation_server.store.ingest_commands import is_command_id

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 1.0
"""How often a watcher looks at the ledger without being woken: another server may have written."""

MOST_AHEAD = timedelta(days=366)
"""How far ahead a not_before_time may lie; an expire_time twice as far, less a day."""


class CommandServicer(pb_grpc.CommandServiceServicer):
    """Issues commands, and shows and follows them."""

    def __init__(
        self,
        database: Database,
        dispatcher: Dispatcher,
        watchers: CommandWatchers,
        metrics: Metrics,
        server_id: str,
    ) -> None:
        """Serves with what the composition root has built."""
        self._database = database
        self._dispatcher = dispatcher
        self._watchers = watchers
        self._metrics = metrics
        self._server_id = server_id

    async def IssueCommand(
        self,
        request: pb.IssueCommandRequest,
        context: grpc.aio.ServicerContext[pb.IssueCommandRequest, pb.IssueCommandResponse],
    ) -> pb.IssueCommandResponse:
        """See the contract."""
        limits.check(request)
        record = await self._issue(request.command, request.request_id, dry_run=request.dry_run)
        return pb.IssueCommandResponse(command=to_command(record))

    async def GetCommand(
        self,
        request: pb.GetCommandRequest,
        context: grpc.aio.ServicerContext[pb.GetCommandRequest, pb.GetCommandResponse],
    ) -> pb.GetCommandResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
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
        order_by = " ".join(request.order_by.split())
        if order_by and order_by not in ORDERS:
            words = f"must be one of {', '.join(ORDERS)}"
            raise errors.invalid_fields([Violation("order_by", words)])
        async with self._database.begin() as connection:
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
        issued = await self._issue(request.command, request.request_id, dry_run=False)
        shown = 0
        with self._watchers.watching(issued.command_id) as changed:
            while True:
                changed.clear()
                async with self._database.begin() as connection:
                    record = await _get(connection, issued.command_id)
                    transitions = await store.transitions(connection, record, after=shown)
                if record.revision > shown:
                    shown = record.revision
                    yield pb.ExecuteCommandResponse(command=to_command(record, transitions))
                if record.final:
                    return
                if self._watchers.closed:
                    raise errors.server_draining()
                try:
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await changed.wait()
                except TimeoutError:
                    pass

    async def _issue(
        self, spec: pb.CommandSpec, request_id: str, *, dry_run: bool
    ) -> store.CommandRecord:
        admin = auth.current_admin()
        data = from_struct(spec.data)
        request_hash = hashlib.sha256(spec.SerializeToString(deterministic=True)).digest()
        async with self._database.begin() as connection:
            known = await store.find_request(connection, admin.name, request_id)
            if known is not None:
                return _same(known, request_hash, request_id)
            target = await store.target(connection, spec.neuron_id)
            if target is None:
                raise errors.neuron_not_found(spec.neuron_id)
            if target.lifecycle is Lifecycle.DEACTIVATED:
                raise errors.neuron_deactivated(spec.neuron_id)
            advertised = _advertised(target, spec.type)
            if not spec.allow_unadvertised:
                _check_data(advertised, spec, data)
            now = await current_time(connection)
            new = _new_command(
                spec,
                data,
                advertised,
                issuer=admin.name,
                request_id=request_id,
                request_hash=request_hash,
                now=now,
            )
            if dry_run:
                return store.preview(new, now)
            record = await store.insert_command(connection, new)
            if record is None:  # the same request came at the same time, and was first
                known = await store.find_request(connection, admin.name, request_id)
                return _same(known, request_hash, request_id)
            if target.server_id not in {None, self._server_id}:
                await hint_dispatch(connection, str(target.server_id), spec.neuron_id)
        self._metrics.commands_issued.inc()
        self._dispatcher.wake(spec.neuron_id)
        log.info(
            "command issued",
            action="command_issued",
            command_id=record.command_id,
            neuron_id=record.neuron_id,
            type=record.type,
            issuer=record.issuer,
        )
        return record


async def _get(connection: AsyncConnection, command_id: str) -> store.CommandRecord:
    record = await store.get(connection, command_id) if is_command_id(command_id) else None
    if record is None:
        raise errors.command_not_found(command_id)
    return record


def _same(
    known: tuple[store.CommandRecord, bytes] | None, request_hash: bytes, request_id: str
) -> store.CommandRecord:
    """The command that a repeated request has made before."""
    if known is None or known[1] != request_hash:
        raise errors.request_id_reused(request_id)
    return known[0]


def _advertised(target: store.Target, command_type: str) -> JsonObject | None:
    for advertised in target.command_types:
        if advertised.get("type") == command_type:
            return advertised
    return None


def _check_data(advertised: JsonObject | None, spec: pb.CommandSpec, data: JsonObject) -> None:
    if advertised is None:
        raise errors.command_type_not_advertised(spec.neuron_id, spec.type)
    schema = advertised.get("data_schema")
    if isinstance(schema, dict):
        faults = json_schema.violations(schema, data, "command.data")
        if faults:
            raise errors.invalid_fields(faults)


def _new_command(
    spec: pb.CommandSpec,
    data: JsonObject,
    advertised: JsonObject | None,
    *,
    issuer: str,
    request_id: str,
    request_hash: bytes,
    now: datetime,
) -> store.NewCommand:
    not_before = optional_time(spec, "not_before_time")
    expire = optional_time(spec, "expire_time")
    first = max(now, not_before) if not_before else now
    faults = []
    if not_before and not_before > now + MOST_AHEAD:
        faults.append(("command.not_before_time", "must be at most 366 days ahead"))
    if expire and expire <= first:
        faults.append(("command.expire_time", "must be later than now and not_before_time"))
    if expire and expire > now + 2 * MOST_AHEAD - timedelta(days=1):
        faults.append(("command.expire_time", "must be at most 731 days ahead"))
    if faults:
        raise errors.invalid_fields([Violation(*fault) for fault in faults])
    return store.NewCommand(
        neuron_id=spec.neuron_id,
        issuer=issuer,
        request_id=request_id or None,
        request_hash=request_hash,
        type=spec.type,
        data=data,
        control=bool(advertised and advertised.get("control")),
        priority=spec.priority if spec.HasField("priority") else DEFAULT_PRIORITY,
        not_before_time=not_before,
        expire_time=expire or first + DEFAULT_EXPIRY,
        run_timeout=optional_span(spec, "run_timeout"),
    )
