"""The part of CommandService that orders the same of many neurons."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import grpc.aio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import command_pb2, errors_pb2
from federation.v1 import command_service_pb2 as pb
from federation_server.domain.command import FINAL_STATES
from federation_server.domain.neuron import Lifecycle
from federation_server.domain.violation import Violation
from federation_server.live.dispatcher import Dispatcher
from federation_server.live.issuer import Issuer
from federation_server.live.metrics import Metrics
from federation_server.live.watchers import CommandWatchers
from federation_server.rpc import auth, errors, limits
from federation_server.rpc.convert_command import batch as to_batch
from federation_server.rpc.errors import Refused
from federation_server.rpc.order import Order
from federation_server.store.database import Database, current_time
from federation_server.store.ledger import batches as store
from federation_server.store.ledger.batches import BatchRecord, Candidate
from federation_server.store.ledger.changes import ChangedCommand, is_command_id

log = structlog.get_logger(__name__)

SHOWN_NEURONS = 100

_FINAL = frozenset(
    command_pb2.CommandState.Value(f"COMMAND_STATE_{state.value}") for state in FINAL_STATES
)


@dataclass(frozen=True, slots=True)
class CommandParts:
    """What CommandService works with."""

    database: Database
    dispatcher: Dispatcher
    issuer: Issuer
    watchers: CommandWatchers
    metrics: Metrics
    server_id: str
    changed: Callable[[Sequence[ChangedCommand]], None]
    """To be called with the commands that a call has changed."""


class CommandBatches:
    """Issues batches, and shows, follows and cancels them."""

    def __init__(self, parts: CommandParts) -> None:
        """Serves with what the composition root has built."""
        self._parts = parts

    async def IssueCommandBatch(
        self,
        request: pb.IssueCommandBatchRequest,
        context: grpc.aio.ServicerContext[
            pb.IssueCommandBatchRequest, pb.IssueCommandBatchResponse
        ],
    ) -> pb.IssueCommandBatchResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        order = _order(request)
        async with self._parts.database.begin() as connection:
            known = await store.find_request(connection, admin.name, request.request_id)
            if known is not None:
                return await _known(connection, known, order, request.request_id)
            now = await current_time(connection)
            order.check_times(now)
            judged = await _judge(connection, request, order)
            if request.dry_run:
                record = _preview(request, order, judged, issuer=admin.name, now=now)
                return _answer(await _shown(connection, record), judged)
            issued = await _insert(connection, request, order, judged, issuer=admin.name, now=now)
            if issued is None:  # the same request came at the same time, and was first
                known = await store.find_request(connection, admin.name, request.request_id)
                return await _known(connection, known, order, request.request_id)
            shown = await _shown(connection, issued)
        self._issued(issued, judged.chosen)
        return _answer(shown, judged)

    async def GetCommandBatch(
        self,
        request: pb.GetCommandBatchRequest,
        context: grpc.aio.ServicerContext[pb.GetCommandBatchRequest, pb.GetCommandBatchResponse],
    ) -> pb.GetCommandBatchResponse:
        """See the contract."""
        limits.check(request)
        async with self._parts.database.begin() as connection:
            return pb.GetCommandBatchResponse(batch=await _get(connection, request.batch_id))

    async def ListCommandBatches(
        self,
        request: pb.ListCommandBatchesRequest,
        context: grpc.aio.ServicerContext[
            pb.ListCommandBatchesRequest, pb.ListCommandBatchesResponse
        ],
    ) -> pb.ListCommandBatchesResponse:
        """See the contract."""
        limits.check(request)
        async with self._parts.database.begin() as connection:
            records, next_page_token = await store.list_batches(
                connection, page_size=request.page_size, page_token=request.page_token
            )
            progress = await store.progress(connection, [record.batch_id for record in records])
        return pb.ListCommandBatchesResponse(
            batches=[
                to_batch(replace(record, data={}), progress[record.batch_id]) for record in records
            ],
            next_page_token=next_page_token,
        )

    async def WatchCommandBatch(
        self,
        request: pb.WatchCommandBatchRequest,
        context: grpc.aio.ServicerContext[
            pb.WatchCommandBatchRequest, pb.WatchCommandBatchResponse
        ],
    ) -> AsyncIterator[pb.WatchCommandBatchResponse]:
        """See the contract."""
        limits.check(request)
        shown: command_pb2.CommandBatch | None = None
        with self._parts.watchers.watching_batch(request.batch_id) as watch:
            while True:
                watch.look()
                async with self._parts.database.begin() as connection:
                    batch = await _get(connection, request.batch_id)
                if batch != shown:
                    shown = batch
                    yield pb.WatchCommandBatchResponse(batch=batch)
                if batch.HasField("end_time"):
                    return
                if self._parts.watchers.closed:
                    raise errors.server_draining()
                await watch.over(_still_open(batch))

    async def CancelCommandBatch(
        self,
        request: pb.CancelCommandBatchRequest,
        context: grpc.aio.ServicerContext[
            pb.CancelCommandBatchRequest, pb.CancelCommandBatchResponse
        ],
    ) -> pb.CancelCommandBatchResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        async with self._parts.database.begin() as connection:
            await _get(connection, request.batch_id)
            changed = await store.cancel(
                connection,
                request.batch_id,
                actor=f"admin:{admin.name}",
                reason=request.reason,
            )
            batch = await _get(connection, request.batch_id)
        self._parts.changed(changed)
        log.info(
            "batch cancelled",
            action="command_batch_cancelled",
            batch_id=request.batch_id,
            commands=len(changed),
            admin=admin.name,
        )
        return pb.CancelCommandBatchResponse(batch=batch)

    def _issued(self, record: BatchRecord, chosen: Sequence[Candidate]) -> None:
        self._parts.metrics.commands_issued.inc(len(chosen))
        if record.max_in_flight:
            self._parts.dispatcher.wake_batch(record.batch_id)
        else:
            for neuron in chosen:
                self._parts.dispatcher.wake(neuron.neuron_id)
        log.info(
            "batch issued",
            action="command_batch_issued",
            batch_id=record.batch_id,
            type=record.type,
            commands=len(chosen),
            issuer=record.issuer,
        )


def _order(request: pb.IssueCommandBatchRequest) -> Order:
    """The order, with the batch's own fields in what a repeated request has to repeat."""
    asked = pb.IssueCommandBatchRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.ClearField("dry_run")
    return Order.of_spec(request.command, within=asked)


@dataclass(frozen=True, slots=True)
class _Judged:
    """Of the neurons that match: who gets the command, and who does not."""

    chosen: Sequence[Candidate]
    skipped: Sequence[pb.SkippedNeuron]


async def _judge(
    connection: AsyncConnection, request: pb.IssueCommandBatchRequest, order: Order
) -> _Judged:
    """Who gets the command.

    Raises:
        errors.Refused: too many neurons match, or none of them can get it.
    """
    found = await store.candidates(connection, request.filter, order.type)
    if len(found) > store.MOST_NEURONS:
        words = f"matches more than {store.MOST_NEURONS} neurons: narrow it"
        raise errors.invalid_fields([Violation("filter", words)])
    chosen: list[Candidate] = []
    skipped: list[pb.SkippedNeuron] = []
    verdicts: dict[str, Refused | None] = {}
    for neuron in found:
        refused = _verdict(order, neuron, verdicts)
        if refused is None:
            chosen.append(neuron)
        else:
            skipped.append(_skipped(neuron, refused))
    if not chosen:
        example = f"{skipped[0].neuron_id}: {skipped[0].detail}" if skipped else ""
        raise errors.no_neuron_matches(len(skipped), example)
    return _Judged(chosen, skipped)


def _skipped(neuron: Candidate, refused: Refused) -> pb.SkippedNeuron:
    return pb.SkippedNeuron(
        neuron_id=neuron.neuron_id,
        reason=errors_pb2.ErrorReason.Value(f"ERROR_REASON_{refused.reason_name}"),
        detail=refused.message,
    )


def _verdict(
    order: Order, neuron: Candidate, verdicts: dict[str, Refused | None]
) -> Refused | None:
    """Why a neuron gets no command. Neurons that advertise the type alike are judged once."""
    if neuron.lifecycle is Lifecycle.DEACTIVATED:
        return errors.neuron_deactivated(neuron.neuron_id)
    if neuron.lifecycle is Lifecycle.PENDING:
        return errors.neuron_pending(neuron.neuron_id)
    if neuron.advertised is None and not order.allow_unadvertised:
        return errors.command_type_not_advertised(neuron.neuron_id, order.type)
    key = repr(neuron.advertised)
    if key not in verdicts:
        try:
            order.check_data(neuron.neuron_id, neuron.advertised)
        except Refused as refused:
            verdicts[key] = refused
        else:
            verdicts[key] = None
    return verdicts[key]


def _preview(
    request: pb.IssueCommandBatchRequest,
    order: Order,
    judged: _Judged,
    *,
    issuer: str,
    now: datetime,
) -> BatchRecord:
    """The batch that a dry run shows."""
    return BatchRecord(
        batch_id="",
        issuer=issuer,
        filter=request.filter,
        type=order.type,
        data=order.data,
        max_in_flight=request.max_in_flight,
        matched_count=len(judged.chosen) + len(judged.skipped),
        skipped_count=len(judged.skipped),
        create_time=now,
        cancel_time=None,
        cancel_reason="",
    )


async def _insert(
    connection: AsyncConnection,
    request: pb.IssueCommandBatchRequest,
    order: Order,
    judged: _Judged,
    *,
    issuer: str,
    now: datetime,
) -> BatchRecord | None:
    """Puts the batch into the ledger; None if its issuer has used the request_id before."""
    return await store.insert_batch(
        connection,
        order.command("", None, issuer=issuer, request_id=request.request_id, now=now),
        judged.chosen,
        filter_text=request.filter,
        max_in_flight=request.max_in_flight,
        skipped_count=len(judged.skipped),
    )


def _answer(batch: command_pb2.CommandBatch, judged: _Judged) -> pb.IssueCommandBatchResponse:
    return pb.IssueCommandBatchResponse(
        batch=batch,
        neuron_ids=[neuron.neuron_id for neuron in judged.chosen[:SHOWN_NEURONS]],
        skipped_neurons=judged.skipped[:SHOWN_NEURONS],
    )


async def _get(connection: AsyncConnection, batch_id: str) -> command_pb2.CommandBatch:
    record = await store.get(connection, batch_id) if is_command_id(batch_id) else None
    if record is None:
        raise errors.command_batch_not_found(batch_id)
    return await _shown(connection, record)


async def _shown(connection: AsyncConnection, record: BatchRecord) -> command_pb2.CommandBatch:
    if not record.batch_id:  # a dry run's
        return to_batch(record)
    progress = await store.progress(connection, [record.batch_id])
    return to_batch(record, progress[record.batch_id])


def _still_open(batch: command_pb2.CommandBatch) -> int:
    """How many of its commands have not ended."""
    return sum(each.count for each in batch.counts if each.state not in _FINAL)


async def _known(
    connection: AsyncConnection,
    known: tuple[BatchRecord, bytes] | None,
    order: Order,
    request_id: str,
) -> pb.IssueCommandBatchResponse:
    """The batch that a repeated request has made before."""
    if known is None or known[1] != order.content:
        raise errors.request_id_reused(request_id)
    return pb.IssueCommandBatchResponse(batch=await _shown(connection, known[0]))
