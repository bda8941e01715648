"""A federation for tests: a real gRPC server that speaks the contract and keeps nothing.

It runs on a thread and loop of its own, so that synchronous and asynchronous tests can use it. It
takes every neuron, acknowledges what it gets, and does wrong what a test asks it to. Commands can
be cancelled and have several attempts, each with the newest checkpoint; they follow at once.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc.aio

from federation.v1 import errors_pb2, heartbeat_pb2, neuron_pb2, report_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from neuron_sdk.convert import to_duration, to_struct, to_timestamp
from neuron_sdk.fake_ledger import FakeCommand, FakeLedger
from neuron_sdk.fake_server import Refused, Servicer, Stream
from neuron_sdk.outcome import CommandOutcome

T = TypeVar("T")


@dataclass(slots=True)
class FakeNeuron:
    """What the federation has seen of one neuron; the newest last."""

    description: neuron_pb2.NeuronDescription
    registrations: list[pb.RegisterRequest] = field(default_factory=list)
    hellos: list[pb.Hello] = field(default_factory=list)
    heartbeats: list[heartbeat_pb2.Heartbeat] = field(default_factory=list)
    reports: list[report_pb2.AnalyticsReport] = field(default_factory=list)
    updates: list[pb.CommandUpdate] = field(default_factory=list)
    """Each durable message once, by its sequence, as the contract demands."""
    received: list[tuple[int, str]] = field(default_factory=list)
    """Every durable message that came, replays too: its sequence and its kind."""
    goodbyes: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    last_sequence: dict[str, int] = field(default_factory=dict)
    """By spool_id."""


class FakeFederation:
    """`with FakeFederation() as federation:`, or `async with`."""

    def __init__(
        self,
        *,
        heartbeat_interval: float | None = None,
        analytics_interval: float | None = None,
        enrollment_tokens: tuple[str, ...] | None = None,
        token_life: float = 86_400.0,
        port: int = 0,
    ) -> None:
        """Nothing is opened before it is entered.

        Args:
            heartbeat_interval: seconds that Welcome asks for; None leaves it to the neuron.
            analytics_interval: as above.
            enrollment_tokens: those that are taken; None takes anyone.
            token_life: seconds that a neuron's token lives.
            port: its TCP port; 0 takes a free one.
        """
        self.neurons: dict[str, FakeNeuron] = {}
        self.acknowledge = True
        """False: durable messages are taken and never acknowledged, as with a database away."""
        self.refuse_register: tuple[str, float] | None = None
        """An ErrorReason's name and the seconds of RetryInfo, for every Register."""
        self.refuse_connect: tuple[str, float] | None = None
        """As above, for every Connect."""
        self.lose = False
        """True: durable messages are read and forgotten, as by a server that dies with them."""
        self.refused: list[str] = []
        """The reason of every call that was refused so far."""
        self.refuse_message: Callable[[pb.NeuronMessage], str] = lambda _: ""
        """Answers why a message is refused; "" takes it."""
        self._settings = pb.SessionSettings()
        self._set_intervals(heartbeat_interval, analytics_interval)
        self._enrollment_tokens = enrollment_tokens
        self._token_life = token_life
        self._port = port
        self._streams: dict[str, Stream] = {}
        self._tokens: dict[str, str] = {}
        self._ledger = FakeLedger()
        self._epochs: defaultdict[str, itertools.count[int]] = defaultdict(
            lambda: itertools.count(1)
        )
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None

    # ---- its life

    @property
    def url(self) -> str:
        """For FEDERATION_URL."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Begin to serve."""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="fake-federation", daemon=True
        )
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """End every stream and close the port. It can be started again, on the same port."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    # ---- what a test does

    def issue(
        self,
        neuron_id: str,
        type: str,  # noqa: A002 - the contract's word
        data: Mapping[str, Any] | None = None,
        *,
        priority: int = 5,
        run_timeout: float | None = None,
        expire_after: float | None = None,
        command_id: str = "",
        attempt: int = 1,
        max_attempts: int = 1,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> str:
        """Order a command, and return its id. It is sent now, or when the neuron connects; another
        attempt follows one that FAILED or TIMED_OUT, up to `max_attempts`.
        """
        delivery = pb.CommandDelivery(
            command_id=command_id or uuid.uuid4().hex,
            attempt=attempt,
            type=type,
            data=to_struct(data or {}),
            priority=priority,
            run_timeout=None if run_timeout is None else to_duration(run_timeout),
            expire_after=None if expire_after is None else to_duration(expire_after),
            max_attempts=max_attempts,
            checkpoint=None if checkpoint is None else to_struct(checkpoint),
        )

        async def order() -> None:
            self._ledger.commands[delivery.command_id] = FakeCommand(neuron_id, delivery)
            self._put(neuron_id, pb.FederationMessage(command=delivery))

        self._on_loop(order())
        return delivery.command_id

    def cancel(self, command_id: str, reason: str = "") -> None:
        """Tell its neuron to give a command up, now and in each session until it has ended."""
        command = self._ledger.commands[command_id]
        given_up = pb.CancelCommand(
            command_id=command_id, attempt=command.delivery.attempt, reason=reason
        )

        async def tell() -> None:
            command.given_up = given_up
            self._put(command.neuron_id, pb.FederationMessage(cancel_command=given_up))

        self._on_loop(tell())

    def deliver_again(self, command_id: str, *, expire_after: float | None = None) -> None:
        """Send a command's newest attempt once more, with the time that it has left."""
        command = self._ledger.commands[command_id]

        async def send() -> None:
            if expire_after is not None:
                command.delivery.expire_after.CopyFrom(to_duration(expire_after))
            self._put(command.neuron_id, pb.FederationMessage(command=command.delivery))

        self._on_loop(send())

    def outcome(self, command_id: str, *, within: float = 10.0) -> CommandOutcome:
        """Wait for a command's end: that of its last attempt. Raises AssertionError if it does not
        come in time.
        """
        return self.wait_for(
            lambda: self._outcome(command_id), within=within, describe=f"end of {command_id}"
        )

    async def outcome_async(self, command_id: str, *, within: float = 10.0) -> CommandOutcome:
        """As `outcome`, for coroutines."""
        return await asyncio.to_thread(self.outcome, command_id, within=within)

    def updates_of(self, command_id: str) -> list[pb.CommandUpdate]:
        """What a neuron has said of a command, in order."""
        with self._changed:
            return [
                update
                for neuron in self.neurons.values()
                for update in neuron.updates
                if update.command_id == command_id
            ]

    def wait_for(
        self, check: Callable[[], T | None], *, within: float = 10.0, describe: str = "it"
    ) -> T:
        """Wait until `check` answers something true, and return it.

        Raises:
            AssertionError: the time is over.
        """
        deadline = time.monotonic() + within
        with self._changed:
            while not (answer := check()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{describe}: not within {within:g} s")
                self._changed.wait(min(left, 0.1))
            return answer

    def wait_connected(self, neuron_id: str, *, sessions: int = 1, within: float = 10.0) -> None:
        """Wait until a neuron has opened that many sessions, and has one now."""
        self.wait_for(
            lambda: neuron_id in self._streams and len(self.neurons[neuron_id].hellos) >= sessions,
            within=within,
            describe=f"session {sessions} of {neuron_id}",
        )

    def connected(self, neuron_id: str) -> bool:
        """Whether a neuron has a stream now."""
        return neuron_id in self._streams

    def set_intervals(
        self, *, heartbeat: float | None = None, analytics: float | None = None
    ) -> None:
        """Send SessionSettings to every neuron, and to those that come."""
        self._set_intervals(heartbeat, analytics)
        self.send(pb.FederationMessage(settings=self._settings))

    def reconnect(self, after: float = 0.0, reason: str = "drain") -> None:
        """Ask every neuron to come back."""
        message = pb.Reconnect(after=to_duration(after), reason=reason)
        self.send(pb.FederationMessage(reconnect=message))

    def acknowledge_all(self) -> None:
        """Acknowledge again, and make up for what was left."""
        self.acknowledge = True

        async def make_up() -> None:
            for neuron_id, stream in self._streams.items():
                neuron = self.neurons[neuron_id]
                last = neuron.last_sequence.get(neuron.hellos[-1].spool_id, 0)
                stream.down.put_nowait(pb.FederationMessage(ack_sequence=last))

        self._on_loop(make_up())

    def drop_streams(self) -> None:
        """Cut every stream without a word of why."""
        self.end_streams("SERVER_DRAINING")

    def end_streams(self, reason: str) -> None:
        """End every stream with the status of an ErrorReason."""

        async def end() -> None:
            for stream in self._streams.values():
                stream.down.put_nowait(Refused(reason))

        self._on_loop(end())

    def send(self, message: pb.FederationMessage) -> None:
        """Send a message of the test's own to every neuron."""

        async def put() -> None:
            for stream in self._streams.values():
                stream.down.put_nowait(message)

        self._on_loop(put())

    # ---- the server

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._end = asyncio.Event()
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        # It answers UNIMPLEMENTED to what the SDK does not call.
        servicer = Servicer(self)  # type: ignore[abstract]
        add_SessionServiceServicer_to_server(servicer, server)
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        await server.start()
        ready.set()
        await self._end.wait()
        await server.stop(None)
        self._streams.clear()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _put(self, neuron_id: str, message: pb.FederationMessage) -> None:
        if neuron_id in self._streams:
            self._streams[neuron_id].down.put_nowait(message)

    def _outcome(self, command_id: str) -> CommandOutcome | None:
        return self._ledger.commands[command_id].outcome

    def _set_intervals(self, heartbeat: float | None, analytics: float | None) -> None:
        if heartbeat is not None:
            self._settings.heartbeat_interval.CopyFrom(to_duration(heartbeat))
        if analytics is not None:
            self._settings.analytics_interval.CopyFrom(to_duration(analytics))

    def _refuse_if_wanted(self, wanted: tuple[str, float] | None) -> None:
        if wanted is not None:
            with self._changed:
                self.refused.append(wanted[0])
                self._changed.notify_all()
            raise Refused(wanted[0], "as the test wants", wanted[1])

    def register(self, request: pb.RegisterRequest, bearer: str) -> pb.RegisterResponse:
        """Register, on the server's loop."""
        self._refuse_if_wanted(self.refuse_register)
        neuron_id = request.description.neuron_id
        if bearer:
            if self._tokens.get(bearer) != neuron_id:
                raise Refused("CREDENTIAL_INVALID", "unknown token")
        elif self._enrollment_tokens is not None:
            if not request.enrollment_token:
                raise Refused("CREDENTIAL_MISSING", "neither token")
            if request.enrollment_token not in self._enrollment_tokens:
                raise Refused("ENROLLMENT_REFUSED", "unknown enrollment token")
            if neuron_id in self.neurons:
                raise Refused("NEURON_EXISTS", f"{neuron_id} is taken")
        with self._changed:
            created = neuron_id not in self.neurons
            neuron = self.neurons.setdefault(neuron_id, FakeNeuron(request.description))
            neuron.description = request.description
            neuron.registrations.append(request)
            self._changed.notify_all()
        stored = neuron_pb2.Neuron(neuron_id=neuron_id, description=request.description)
        return pb.RegisterResponse(neuron=stored, token=self.make_token(neuron_id), created=created)

    def make_token(self, neuron_id: str) -> pb.NeuronToken:
        """A new token."""
        token, now = uuid.uuid4().hex, time.time()
        self._tokens[token] = neuron_id
        self.neurons[neuron_id].tokens.append(token)
        return pb.NeuronToken(
            token=token,
            expire_time=to_timestamp(now + self._token_life),
            refresh_time=to_timestamp(now + self._token_life / 2),
        )

    def revoke_tokens(self, neuron_id: str) -> None:
        """Let a neuron's tokens be refused from now on."""
        self._tokens = {key: value for key, value in self._tokens.items() if value != neuron_id}

    def owner(self, bearer: str) -> str:
        """Whose token it is."""
        if bearer not in self._tokens:
            raise Refused("CREDENTIAL_INVALID", "unknown token")
        return self._tokens[bearer]

    def open_stream(self, neuron_id: str, hello: pb.Hello) -> tuple[Stream, pb.Welcome]:
        """Begin a session."""
        self._refuse_if_wanted(self.refuse_connect)
        neuron = self.neurons[neuron_id]
        older = self._streams.get(neuron_id)
        if older is not None:
            older.down.put_nowait(Refused("SESSION_SUPERSEDED"))
        stream = Stream(neuron_id)
        for message in self._ledger.waiting_for(neuron_id, hello):
            stream.down.put_nowait(message)
        with self._changed:
            self._streams[neuron_id] = stream
            neuron.hellos.append(hello)
            self._changed.notify_all()
        return stream, pb.Welcome(
            session_id=uuid.uuid4().hex,
            epoch=next(self._epochs[neuron_id]),
            server_time=to_timestamp(time.time()),
            settings=self._settings,
            last_sequence=neuron.last_sequence.get(hello.spool_id, 0),
            server_version="fake",
        )

    def close_stream(self, stream: Stream) -> None:
        """A session has ended."""
        with self._changed:
            if self._streams.get(stream.neuron_id) is stream:
                del self._streams[stream.neuron_id]
            self._changed.notify_all()

    def take(self, stream: Stream, message: pb.NeuronMessage, spool_id: str) -> None:
        """Take one message of a session."""
        neuron = self.neurons[stream.neuron_id]
        kind = message.WhichOneof("message") or ""
        why = self.refuse_message(message)
        with self._changed:
            if message.sequence:
                neuron.received.append((message.sequence, kind))
                if self.lose:
                    return
                replayed = message.sequence <= neuron.last_sequence.get(spool_id, 0)
                neuron.last_sequence[spool_id] = max(
                    message.sequence, neuron.last_sequence.get(spool_id, 0)
                )
                if not replayed and not why:
                    self._keep(neuron, message)
            elif not why:
                self._keep(neuron, message)
            self._changed.notify_all()
        if why:
            refusal = pb.Refusal(
                sequence=message.sequence,
                message=kind,
                reason=errors_pb2.ERROR_REASON_INVALID_FIELD,
                detail=why,
            )
            stream.down.put_nowait(pb.FederationMessage(refusal=refusal))
        if message.sequence and self.acknowledge:
            stream.down.put_nowait(pb.FederationMessage(ack_sequence=message.sequence))

    def _keep(self, neuron: FakeNeuron, message: pb.NeuronMessage) -> None:
        match message.WhichOneof("message"):
            case "heartbeat":
                neuron.heartbeats.append(message.heartbeat)
            case "analytics_report":
                neuron.reports.append(message.analytics_report)
            case "command_update":
                neuron.updates.append(message.command_update)
                following = self._ledger.take(message.command_update)
                if following is not None:
                    self._put(neuron.description.neuron_id, following)
            case "goodbye":
                neuron.goodbyes.append(message.goodbye.reason)
