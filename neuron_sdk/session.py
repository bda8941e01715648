"""The neuron's way to the federation: registers, holds one stream, and comes back when it ends.

`Session.run` never returns and never raises because the federation is away. In one session four
tasks share the stream: the reader, the sender of durable messages (a bounded window of what the
spool holds), the heartbeats, and the one that renews the token. When one ends they all end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import SessionServiceStub
from neuron_sdk.backoff import Backoff
from neuron_sdk.channel import (
    RpcFailure,
    in_words,
    open_channel,
    read_credentials,
    read_failure,
    wait_connected,
    why_unconnected,
)
from neuron_sdk.convert import durable_message, from_duration, heartbeat_message, to_timestamp
from neuron_sdk.inbox import Inbox, own_sequence, reason_name
from neuron_sdk.link import Link, LinkParts
from neuron_sdk.logs import get_logger
from neuron_sdk.payload import clean_text
from neuron_sdk.recovery import gives_turn, recover
from neuron_sdk.version import __version__

if TYPE_CHECKING:  # a name of the stubs' types only
    from federation.v1.session_service_pb2_grpc import SessionServiceAsyncStub

WINDOW_MESSAGES = 256
WINDOW_BYTES = 4 * 2**20
_WELCOME_TIMEOUT_S = 20.0
_GOODBYE_TIMEOUT_S = 2.0
_HEARTBEAT_JITTER = 0.1

Stream = Any  # grpc.aio.StreamStreamCall[pb.NeuronMessage, pb.FederationMessage]
_log = get_logger(__name__)


class _Over(Exception):
    """The session is to end, for a reason of ours."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Session:
    """One neuron's sessions, one after the other. Belongs to the control loop."""

    def __init__(self, parts: LinkParts, *, refusal_retry: float) -> None:
        """`refusal_retry` is Settings'."""
        self._target = parts.target
        self._tls = parts.tls
        self._instance_id = parts.instance_id
        self._registration = parts.registration
        self._enrollable = parts.enrollable
        self._refusal_retry = refusal_retry
        self._spool = parts.spool
        self._executor = parts.executor
        self._intervals = parts.intervals
        self._vitals = parts.vitals
        self._inbox = Inbox(parts.executor, parts.spool, parts.intervals)
        self._backoff = Backoff()
        self._loop = asyncio.get_running_loop()
        self._acked = asyncio.Event()
        self._renewed = asyncio.Event()
        self._waiting: grpc.aio.Channel | None = None
        """The channel on which the federation has given this neuron a turn."""
        self._stream: Stream | None = None
        self._write_lock = asyncio.Lock()
        self._in_flight: deque[tuple[int, int]] = deque()
        self._reader: asyncio.Task[None] | None = None
        self._calling = False
        """Whether a call of Connect is open, welcomed or not."""
        self._closing = False
        self.link = Link()
        self.opened = asyncio.Event()
        """Set once the first session is open."""
        self.failure = ""
        """Always "": it never gives up."""
        self._spool.listen(lambda: None, lambda: self._call_soon(self._renewed.set))

    async def run(self) -> None:
        """Hold a session, until `say_goodbye`. To be cancelled."""
        try:
            await self._hold()
        finally:
            if self._waiting is not None:
                await self._waiting.close()

    async def _hold(self) -> None:
        while True:
            registering = not self._registration.has_token
            try:
                await self._hold_one()
                wait = self._backoff.next_s(self._loop.time())
                problem = "the federation closed the stream"
            except _Over as over:
                wait = self._backoff.next_s(self._loop.time(), at_least=over.after_s)
                problem = str(over)
            except RpcFailure as failure:
                registering = registering and not self._registration.has_token
                wait, problem = self._plan(failure, registering=registering)
            except Exception as error:  # noqa: BLE001 - logged; it must come back
                _log.exception("the session broke", action="session.broken")
                wait = self._backoff.next_s(self._loop.time(), at_least=5.0)
                problem = repr(error)
            self.link = Link(problem=problem)
            if self._closing:
                return
            _log.warning(
                "not connected to the federation; the service goes on",
                action="session.ended",
                target=self._target,
                problem=problem,
                retry_s=round(wait, 1),
            )
            await asyncio.sleep(wait)

    async def flush(self, timeout_s: float) -> None:
        """Wait until the federation has all that the spool holds, or cannot get it now."""
        deadline = self._loop.time() + timeout_s
        # Asked again and again, because the spool commits on a thread of its own.
        while self._loop.time() < deadline and (  # noqa: ASYNC110
            self._being_let_in or (self._spool.state.pending and self.link.connected)
        ):
            await asyncio.sleep(0.02)

    async def say_goodbye(self, reason: str) -> None:
        """End the session on purpose; waits a moment for the federation to take note."""
        self._closing = True
        stream, reader = self._stream, self._reader
        if stream is None or reader is None:
            return
        with contextlib.suppress(_Broken, TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(_GOODBYE_TIMEOUT_S):
                goodbye = pb.Goodbye(reason=clean_text(reason, 1024))
                await self._write(stream, pb.NeuronMessage(goodbye=goodbye))
                await stream.done_writing()
                await asyncio.wait({reader})

    def _plan(self, failure: RpcFailure, *, registering: bool) -> tuple[float, str]:
        failure = in_words(failure, tls=self._tls is not None)
        plan = recover(
            failure.reason, failure.code, enrollable=self._enrollable, registering=registering
        )
        if plan.register_again:
            self._registration.forget()
        if plan.turn:
            return self._backoff.turn_s(failure.retry_after), plan.tell(failure)
        at_least = max(self._refusal_retry if plan.slow else 0.0, failure.retry_after)
        return self._backoff.next_s(self._loop.time(), at_least=at_least), plan.tell(failure)

    @property
    def _being_let_in(self) -> bool:
        """Whether Welcome is under way: a moment, unless an admin has to approve the neuron."""
        return self._calling and not self.link.connected and not self._registration.pending

    # ---- one session

    async def _hold_one(self) -> None:
        """One session from its Register or Connect to its end.

        Raises:
            RpcFailure: the federation refused, ended the stream with a status, or is away.
            _Over: it is to be held anew.
        """
        channel, self._waiting = self._waiting, None
        if channel is None:  # each with the files as they are then
            channel = open_channel(self._target, await read_credentials(self._tls))
        try:
            # grpc.aio's generated stub is one class for both worlds; its types are not.
            stub: SessionServiceAsyncStub = SessionServiceStub(channel)
            await self._registration.ensure(stub)
            await self._connect(channel, stub)
        except RpcFailure as failure:
            if gives_turn(failure.reason):
                self._waiting = channel
            raise
        finally:
            self._stream = self._reader = None
            self.link = Link()
            if self._waiting is None:
                await channel.close()

    async def _connect(self, channel: grpc.aio.Channel, stub: SessionServiceAsyncStub) -> None:
        # Writing to a call on a channel that never connected is an internal error of gRPC.
        tls = self._tls is not None
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await wait_connected(channel, self._target, tls=tls)
        except TimeoutError:
            raise await why_unconnected(channel, self._target, tls=tls) from None
        stream: Stream = stub.Connect(metadata=self._registration.metadata)
        self._calling = True
        try:
            welcome = await self._greet(stream)
            await self._begin(welcome)
            await self._live(stream, stub, welcome)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, _Broken):
            raise await _status(stream) from None
        finally:
            self._calling = False
            stream.cancel()

    async def _greet(self, stream: Stream) -> pb.Welcome:
        state = self._spool.state
        self._renewed.clear()
        hello = pb.Hello(
            instance_id=self._instance_id,
            sdk={"name": "neuron-sdk-python", "version": __version__},  # type: ignore[arg-type]
            spool_id=state.spool_id,
            first_sequence=state.first_sequence,
            next_sequence=state.next_sequence,
            running_commands=[
                pb.RunningCommand(command_id=of.command_id, attempt=of.attempt)
                for of in self._executor.unfinished()
            ],
        )
        pending = self._registration.pending
        if pending:
            self.link = Link(problem=pending)
        try:
            async with asyncio.timeout(None if pending else _WELCOME_TIMEOUT_S):
                await self._write(stream, pb.NeuronMessage(hello=hello))
                message = await stream.read()
        except TimeoutError:
            raise RpcFailure("UNAVAILABLE", "", "no Welcome from the federation") from None
        if message is grpc.aio.EOF or message.WhichOneof("message") != "welcome":
            raise _Broken
        self._registration.pending = ""
        return message.welcome  # type: ignore[no-any-return]

    async def _begin(self, welcome: pb.Welcome) -> None:
        state = self._spool.state
        mark = own_sequence(welcome.last_sequence)
        if mark > max(state.known_sequence, state.handed_out):
            # An old copy of STATE_DIR: the federation would take new messages for replays.
            await asyncio.wrap_future(self._spool.renew_identity(mark))
            raise _Over("the spool was older than what the federation has seen; it is renewed")
        if mark:
            self._spool.ack(mark)
        self._in_flight.clear()
        self._inbox.obey(welcome.settings)
        self._backoff.opened(self._loop.time())
        self.link = Link(True, welcome.session_id, welcome.epoch, welcome.server_version)
        self.opened.set()
        _log.info(
            "connected to the federation",
            action="session.opened",
            target=self._target,
            session_id=welcome.session_id,
            epoch=welcome.epoch,
            pending=state.pending,
        )

    async def _live(
        self, stream: Stream, stub: SessionServiceAsyncStub, welcome: pb.Welcome
    ) -> None:
        self._stream = stream
        reader = asyncio.create_task(self._read(stream), name="session:read")
        self._reader = reader
        tasks = [
            reader,
            asyncio.create_task(self._send(stream, welcome.last_sequence), name="session:send"),
            asyncio.create_task(self._beat(stream), name="session:heartbeats"),
            asyncio.create_task(self._registration.keep_fresh(stub), name="session:token"),
            asyncio.create_task(self._watch_identity(), name="session:identity"),
        ]
        try:
            ended, _ = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # What the reader has seen is the cause; the others only stumbled over it.
        first = reader if reader in ended else ended.pop()
        first.result()

    # ---- down

    async def _read(self, stream: Stream) -> None:
        while True:
            message = await stream.read()
            if message is grpc.aio.EOF:
                failure = await _status(stream)
                if failure.code != "OK":
                    raise failure
                return
            if message.WhichOneof("message") == "token_rotation":
                await self._registration.renewed(message.token_rotation.token)
            self._obey_message(message)

    def _obey_message(self, message: pb.FederationMessage) -> None:
        match message.WhichOneof("message"):
            case "command":
                self._inbox.take(message.command)
            case "cancel_command":
                self._inbox.cancel(message.cancel_command)
            case "settings":
                self._inbox.obey(message.settings)
            case "refusal":
                self._note_refusal(message.refusal)
        # After a refusal, which speaks of a message that the acknowledgement covers.
        if message.ack_sequence:
            self._acknowledge(own_sequence(message.ack_sequence))
        if message.WhichOneof("message") == "reconnect":
            after = from_duration(message.reconnect.after)
            raise _Over(f"asked to come back: {message.reconnect.reason}", after)

    def _acknowledge(self, sequence: int) -> None:
        self._spool.ack(sequence)
        while self._in_flight and self._in_flight[0][0] <= sequence:
            self._in_flight.popleft()
        self._acked.set()

    def _note_refusal(self, refusal: pb.Refusal) -> None:
        violations = "; ".join(f"{v.field}: {v.description}" for v in refusal.field_violations)
        reason, detail = reason_name(refusal.reason), violations or refusal.detail
        self._inbox.note_refusal(own_sequence(refusal.sequence), refusal.message, reason, detail)

    # ---- up

    async def _send(self, stream: Stream, last_sequence: int) -> None:
        sent = last_sequence
        while True:
            self._acked.clear()
            room = WINDOW_MESSAGES - len(self._in_flight)
            size = WINDOW_BYTES - sum(size for _, size in self._in_flight)
            if room <= 0 or (size <= 0 and self._in_flight):
                await self._acked.wait()
                continue
            batch = await asyncio.wrap_future(
                self._spool.next_after(sent, max_count=room, max_bytes=size)
            )
            for message in batch:
                self._in_flight.append((message.sequence, len(message.payload)))
                sent = message.sequence
                await self._write(
                    stream,
                    durable_message(
                        sent, is_report=message.kind.is_report, payload=message.payload
                    ),
                )

    async def _beat(self, stream: Stream) -> None:
        with_host = True
        while True:
            # Made when the stream is free, so that what is sent is the newest.
            async with self._write_lock:
                vitals = await self._vitals()
                beat = heartbeat_message(vitals, with_host=with_host)
                now = to_timestamp(time.time())
                await _write(stream, pb.NeuronMessage(send_time=now, heartbeat=beat))
            with_host = with_host and vitals.host is None
            sent_at = self._loop.time()
            # Only ever later, because more often than the interval is forbidden.
            stretch = 1.0 + random.uniform(0.0, _HEARTBEAT_JITTER)  # noqa: S311 - not a secret
            while not await self._intervals.wait(sent_at + self._intervals.heartbeat * stretch):
                pass

    async def _watch_identity(self) -> None:
        await self._renewed.wait()
        raise _Over("the spool was made anew")

    async def _write(self, stream: Stream, message: pb.NeuronMessage) -> None:
        async with self._write_lock:
            await _write(stream, message)

    def _call_soon(self, call: Callable[[], object]) -> None:
        # The spool's thread may outlive the loop by a moment.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)


class _Broken(Exception):
    """The stream has ended; its status says why."""


async def _write(stream: Stream, message: pb.NeuronMessage) -> None:
    try:
        await stream.write(message)
    except asyncio.InvalidStateError:
        raise _Broken from None


async def _status(stream: Stream) -> RpcFailure:
    """What the federation said at the end of a stream; cuts one that it does not end."""
    try:
        async with asyncio.timeout(_GOODBYE_TIMEOUT_S):
            code = await stream.code()
    except TimeoutError:
        return RpcFailure("UNKNOWN", "", "the stream broke")
    error = grpc.aio.AioRpcError(
        code,
        await stream.initial_metadata(),
        await stream.trailing_metadata(),
        details=await stream.details(),
    )
    return read_failure(error)
