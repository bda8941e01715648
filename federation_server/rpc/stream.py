"""One Connect call: a neuron's stream, from Hello to its end.

    context.read ─▶ limits ─▶ live/writer.py          (the reader, a task of its own)
    live/session.py's outbox ─▶ context.write         (the call's own coroutine)

Whether the neuron may hold a session is asked of the store once, when its Hello has come.
The reader never waits for the database; it only stops reading while the writer is full or the
neuron does not read what it is sent. The outcome of what it hands to the writer comes back
through the session: as an acknowledgement, a refusal, or the session's end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc.aio
import structlog

from federation.v1 import session_service_pb2 as pb
from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.access import NeuronIdentity
from federation_server.domain.neuron import Presence
from federation_server.domain.violation import Violation
from federation_server.live.admission import Admission, Entry
from federation_server.live.approvals import Approvals, Waited
from federation_server.live.dispatcher import Dispatcher
from federation_server.live.metrics import Metrics
from federation_server.live.opener import Opener
from federation_server.live.pacing import Pacing
from federation_server.live.rates import Rates
from federation_server.live.session import Cancel, Refusal, Session, SessionEnd, Sessions, Settings
from federation_server.live.writer import Writer
from federation_server.rpc import convert_stream, errors, limits
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.rpc.limit_values import MAX_INTEGER
from federation_server.rpc.standing import turned_away
from federation_server.store import sessions as store
from federation_server.store.database import Database
from federation_server.store.ingest import ClosedItem, DurableItem, DurablePayload, HeartbeatItem
from federation_server.store.ledger.changes import ChangedCommand, is_command_id

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 10.0
FINAL_ACK_TIMEOUT_S = 10.0
"""How long the end of a stream waits for its last messages to be stored."""

FAST_HEARTBEAT_PAUSE_S = 0.005
"""How long a neuron is not read that sends heartbeats faster than they are written, so that it does
not take the others' time."""

MESSAGES_BETWEEN_LOOKS = 100
"""So many messages are read before the clock is looked at, which is too dear for each of them."""

LAST_WORDS_TIMEOUT_S = 3.0
"""How long a session that is over waits for its neuron to read what is written to it."""

HOME_TIMEOUT_S = 3.0
"""How long a neuron has to end its stream itself that has been sent home. A stream that ends with
an error takes along what its client has not read yet; and it would not read the Reconnect."""

Context: TypeAlias = "grpc.aio.ServicerContext[pb.NeuronMessage, pb.FederationMessage]"


@dataclass(frozen=True, slots=True)
class StreamParts:
    """What every stream of a server works with."""

    database: Database
    writer: Writer
    sessions: Sessions
    opener: Opener
    approvals: Approvals
    dispatcher: Dispatcher
    metrics: Metrics
    admission: Admission
    rates: Rates
    message_rate: float
    """How many messages a second are read of a stream."""
    pacing: Pacing
    settings: Settings
    """What neurons without a stream are told; with one it is `pacing`'s."""
    server_id: str
    server_version: str
    changed: Callable[[Sequence[ChangedCommand]], None]
    """To be called with the commands that a call has changed."""


class NeuronStream:
    """One neuron's stream on this server."""

    def __init__(self, parts: StreamParts, identity: NeuronIdentity, context: Context) -> None:
        """A call that has shown a good token and sent nothing yet."""
        self._parts = parts
        self._identity = identity
        self._context = context
        self._last_sequence = 0
        self._goodbye: str | None = None

    async def run(self) -> None:
        """Serves the stream until it ends.

        Raises:
            errors.Refused: the stream ends with that error.
        """
        parts = self._parts
        hello = await self._hello()
        session, opened = await self._open(hello)
        parts.sessions.add(session)
        parts.metrics.streams.inc()
        reader: asyncio.Task[None] | None = None
        try:
            # By itself, because the first write would send it along: if that is cut short, grpc
            # sends it again with the status, which fails, and the neuron waits for ever.
            await self._context.send_initial_metadata(())
            async with _while_it_reads(session):
                await self._write_one(session, self._welcome(session, opened))
                for command_id, attempt in opened.astray:
                    session.send(Cancel(command_id, attempt, "nobody waits for it any more"))
                parts.dispatcher.opened(session.neuron_id)
                reader = asyncio.create_task(self._read(session), name=f"read {session.neuron_id}")
                reader.add_done_callback(lambda _: session.wake())
                await self._write(session, reader)
        finally:
            if reader is not None and not reader.cancel() and not reader.cancelled():
                reader.exception()  # it has been raised, or the session had another end
            parts.metrics.streams.dec()
            parts.sessions.remove(session)
            parts.writer.close(self._closed(session))
        if session.end is not None:
            raise errors.session_ended(
                session.end, session.end_detail, session.neuron_id, session.reconnect_after
            )

    async def _hello(self) -> pb.Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message: object = await self._context.read()
        except TimeoutError:
            raise errors.protocol_violation("no Hello came within 10 s") from None
        if not isinstance(message, pb.NeuronMessage) or message.WhichOneof("message") != "hello":
            raise errors.protocol_violation("the first message must be a Hello")
        limits.check(message.hello, "hello")
        return message.hello

    async def _open(self, hello: pb.Hello) -> tuple[Session, store.OpenedSession]:
        parts, identity = self._parts, self._identity
        new = store.NewSession(
            neuron_id=identity.neuron_id,
            generation=identity.generation,
            session_id=str(uuid.uuid4()),
            instance_id=hello.instance_id,
            sdk_name=hello.sdk.name,
            sdk_version=hello.sdk.version,
            spool_id=hello.spool_id,
            backlog_sequence=max(0, hello.next_sequence - 1),
            peer=self._context.peer(),
            running=[
                (command.command_id, command.attempt)
                for command in hello.running_commands
                if is_command_id(command.command_id)
            ],
        )
        while (opened := await self._opened(new)) is None:
            async with parts.database.begin() as connection:
                refused = await turned_away(connection, identity)
            if refused is None:
                continue
            if refused.reason is not ErrorReason.ERROR_REASON_NEURON_PENDING:
                raise refused
            parts.rates.count_neuron(identity)
            log.info("waits for approval", action="session_pending", neuron_id=new.neuron_id)
            waited = await parts.approvals.wait(new.neuron_id, new.generation)
            if waited is Waited.SUPERSEDED:
                raise errors.session_superseded(new.neuron_id)
            if waited is Waited.TURNED_AWAY:
                raise refused
        parts.rates.count_neuron(identity)
        session = Session(
            neuron_id=identity.neuron_id,
            epoch=opened.epoch,
            session_id=new.session_id,
            instance_id=new.instance_id,
            spool_id=new.spool_id,
        )
        session.credential = identity
        session.heartbeat_timeout = opened.heartbeat_timeout
        for command_id, _ in new.running:  # it has them: no claim is their first
            session.first(command_id)
        parts.metrics.sessions_opened.inc()
        log.info(
            "session opened",
            action="session_opened",
            neuron_id=session.neuron_id,
            epoch=session.epoch,
            session_id=session.session_id,
            peer=new.peer,
        )
        return session, opened

    async def _opened(self, new: store.NewSession) -> store.OpenedSession | None:
        with self._parts.admission.under_way(Entry.CONNECT):
            return await self._parts.opener.open(new)

    def _welcome(self, session: Session, opened: store.OpenedSession) -> pb.FederationMessage:
        return pb.FederationMessage(
            welcome=pb.Welcome(
                session_id=session.session_id,
                epoch=session.epoch,
                server_time=to_timestamp(opened.server_time),
                settings=convert_stream.settings(self._parts.pacing.settings),
                last_sequence=opened.last_sequence,
                server_version=self._parts.server_version,
            )
        )

    async def _read(self, session: Session) -> None:
        """Reads until the neuron closes its side, or the session ends; not faster than a neuron may
        send. What is not read waits at the neuron, so that nothing of it is lost.
        """
        read, take, room = self._context.read, self._take, self._parts.writer.room
        rest_s = self._parts.rates.resting(self._parts.message_rate)
        while True:
            message: object = await read()
            if not isinstance(message, pb.NeuronMessage):  # EOF
                return
            session.heard += 1
            if not session.heard % MESSAGES_BETWEEN_LOOKS:
                await asyncio.sleep(rest_s(MESSAGES_BETWEEN_LOOKS))
            if take(session, message):
                await asyncio.sleep(FAST_HEARTBEAT_PAUSE_S)
            if message.sequence:
                await room()
            while session.crowded:
                await session.drained()

    def _take(self, session: Session, message: pb.NeuronMessage) -> bool:
        """Hands one message to the writer, or refuses it. True for a heartbeat that came before the
        last one was written.
        """
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            beat = message.heartbeat
            if faults := limits.violations(beat, "heartbeat"):
                self._refuse(session, 0, kind, faults)
                return False
            item = HeartbeatItem(
                session.neuron_id,
                session.epoch,
                session.instance_id,
                convert_stream.heartbeat(beat),
            )
            return self._parts.writer.heartbeat(session, item)
        if kind == "goodbye":
            self._goodbye = message.goodbye.reason[:1024].replace("\0", "") or "goodbye"
        elif kind == "hello":
            session.finish(SessionEnd.PROTOCOL_VIOLATION, "a second Hello")
        else:
            self._take_durable(session, message, kind)
        return False

    def _take_durable(self, session: Session, message: pb.NeuronMessage, kind: str | None) -> None:
        faults = limits.violations(message)
        payload: DurablePayload = None
        if faults:
            self._refuse(session, message.sequence, str(kind or ""), faults)
            if message.sequence > MAX_INTEGER:  # nor can it be acknowledged
                return
        elif kind == "analytics_report":
            send_time = from_timestamp(message.send_time)
            payload = convert_stream.report(message.analytics_report, send_time)
            self._parts.metrics.reports.inc()
        elif kind == "command_update":
            payload = convert_stream.command_update(message.command_update)
        if message.sequence:
            self._last_sequence = max(self._last_sequence, message.sequence)
            item = DurableItem(
                session.neuron_id,
                session.epoch,
                session.spool_id,
                message.sequence,
                payload,
                time.monotonic(),
            )
            self._parts.writer.durable(session, item, message.ByteSize())

    def _refuse(
        self, session: Session, sequence: int, kind: str, faults: Sequence[Violation]
    ) -> None:
        self._parts.metrics.refused.inc()
        reason = "TOO_LARGE" if all(fault.too_large for fault in faults) else "INVALID_FIELD"
        violations = {fault.field: fault.description for fault in faults}
        detail = f"{len(faults)} bad field(s): see field_violations"
        session.send(Refusal(sequence, kind, reason, detail, violations))

    async def _write(self, session: Session, reader: asyncio.Task[None]) -> None:
        """Writes what the session has to say until it ends or the neuron has closed its side."""
        acked = 0
        while True:
            for message in await session.outgoing():
                await self._write_one(session, convert_stream.outgoing(message))
            if session.ack_sequence > acked:
                acked = session.ack_sequence
                await self._write_one(session, pb.FederationMessage(ack_sequence=acked))
            if session.end is SessionEnd.DRAINING:
                await asyncio.wait({reader}, timeout=HOME_TIMEOUT_S)
            if session.end is not None:
                return
            if reader.done():
                await self._finish(session, reader, acked)
                return

    async def _write_one(self, session: Session, message: pb.FederationMessage) -> None:
        """Writes a message, and notes that for `live/silence.py`: it waits while nobody reads."""
        session.writing = True
        await self._context.write(message)
        session.writing = False
        session.written += 1

    async def _finish(self, session: Session, reader: asyncio.Task[None], acked: int) -> None:
        """Waits for the last acknowledgement, so that the neuron need not send again."""
        reader.result()
        try:
            async with asyncio.timeout(FINAL_ACK_TIMEOUT_S):
                while session.ack_sequence < self._last_sequence and session.end is None:
                    await session.outgoing()
        except TimeoutError:
            return
        if session.ack_sequence > acked:
            await self._write_one(session, pb.FederationMessage(ack_sequence=session.ack_sequence))

    def _closed(self, session: Session) -> ClosedItem:
        if self._goodbye is not None:
            presence, reason = Presence.OFFLINE, self._goodbye
        elif session.end is SessionEnd.DRAINING:
            presence, reason = Presence.SUSPECT, "server stopped"
        else:
            presence, reason = Presence.SUSPECT, "stream lost"
        log.info(
            "session closed",
            action="session_closed",
            neuron_id=session.neuron_id,
            epoch=session.epoch,
            reason=session.end or reason,
        )
        return ClosedItem(session.neuron_id, session.epoch, presence, reason)


@asynccontextmanager
async def _while_it_reads(session: Session) -> AsyncIterator[None]:
    """Lets the block go on when the session is over only for as long as a neuron that reads needs:
    one that does not would keep its stream for ever, since a write waits for it.
    """
    loop = asyncio.get_running_loop()
    patience = asyncio.timeout(None)
    try:
        async with patience:
            session.on_end = lambda: patience.reschedule(loop.time() + LAST_WORDS_TIMEOUT_S)
            if session.end is not None:
                session.on_end()
            yield
    except TimeoutError:
        if not patience.expired():
            raise
    finally:
        session.on_end = None
