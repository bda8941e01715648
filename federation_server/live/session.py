"""One neuron's live session on this server, and the register of all of them.

A `Session` is what the other parts of `live` know of a stream: they put messages into its outbox,
say what has been stored and end it; `rpc/stream.py` reads the outbox and speaks gRPC. All of this
happens on the server's one event loop, so nothing here awaits or locks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from random import uniform
from typing import TypeAlias

from federation_server.domain.access import IssuedToken, NeuronIdentity
from federation_server.domain.command import Execution
from federation_server.domain.neuron import JsonObject


class SessionEnd(StrEnum):
    """Why the server ends a stream."""

    SUPERSEDED = "SUPERSEDED"
    """A newer session of the neuron took over."""
    DEACTIVATED = "DEACTIVATED"
    """The neuron was deactivated."""
    REVOKED = "REVOKED"
    """The neuron's token is no longer good, or the neuron was deleted."""
    DRAINING = "DRAINING"
    """The server is shutting down."""
    PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
    """The neuron broke the protocol."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A command on its way to the neuron; fields as in the contract's CommandDelivery."""

    command_id: str
    attempt: int
    type: str
    data: JsonObject
    priority: int
    run_timeout: timedelta | None
    expire_after: timedelta | None
    checkpoint: JsonObject | None
    max_attempts: int
    execution: Execution


@dataclass(frozen=True, slots=True)
class Cancel:
    """The neuron is to give up an attempt of a command."""

    command_id: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The intervals that the neuron is to keep."""

    heartbeat_interval: timedelta | None
    analytics_interval: timedelta | None
    min_heartbeat_interval: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Reconnect:
    """The neuron is to come back after that long."""

    after: timedelta
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message of the neuron's was not taken; `violations` maps field paths to what is wrong."""

    sequence: int
    message: str
    reason: str
    detail: str
    violations: Mapping[str, str] = field(default_factory=dict)


Outgoing: TypeAlias = Delivery | Cancel | Settings | Reconnect | Refusal | IssuedToken


class Session:
    """A neuron's stream, seen from the server's side.

    The outbox is bounded by what feeds it: at most `max_concurrent_commands` deliveries, one
    acknowledgement (the newest), and refusals, each of which answers a message that was read
    (the reader waits while `crowded`).
    """

    __slots__ = (
        "__weakref__",
        "_drained",
        "_given",
        "_outbox",
        "_wake",
        "ack_sequence",
        "credential",
        "end",
        "end_detail",
        "epoch",
        "heard",
        "heartbeat_timeout",
        "instance_id",
        "neuron_id",
        "on_end",
        "reconnect_after",
        "session_id",
        "spool_id",
        "writing",
        "written",
    )

    CROWDED = 256

    def __init__(
        self, *, neuron_id: str, epoch: int, session_id: str, instance_id: str, spool_id: str
    ) -> None:
        """A session that the store has opened."""
        self.neuron_id = neuron_id
        self.epoch = epoch
        self.session_id = session_id
        self.instance_id = instance_id
        self.spool_id = spool_id
        self.ack_sequence = 0
        self.heartbeat_timeout = timedelta()
        """How long its neuron may be silent until it is SUSPECT, as it was when it came."""
        self.heard = 0
        """How many messages have been read."""
        self.written = 0
        """How many messages have been written."""
        self.writing = False
        """Whether the next one is being written."""
        self.credential: NeuronIdentity | None = None
        """What the newest token that its neuron was given says; None: it gets no other."""
        self.end: SessionEnd | None = None
        self.end_detail = ""
        self.on_end: Callable[[], None] | None = None
        self.reconnect_after: timedelta | None = None
        self._given: set[str] = set()
        self._outbox: deque[Outgoing] = deque()
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()

    def send(self, message: Outgoing) -> None:
        """Puts a message into the outbox."""
        self._outbox.append(message)
        self._wake.set()

    def first(self, command_id: str) -> bool:
        """True for a command that this session is given for the first time; for those that must
        not be sent twice.
        """
        new = command_id not in self._given
        self._given.add(command_id)
        return new

    def stored(self, mark: int, time: datetime) -> None:
        """Everything up to sequence `mark` is committed, at that time."""
        if mark > self.ack_sequence:
            self.ack_sequence = mark
            self._wake.set()

    def fenced(self) -> None:
        """A newer session has taken over: nothing of this one's was written."""
        self.finish(SessionEnd.SUPERSEDED)

    def refused(self, sequence: int, message: str) -> None:
        """The database would not take that message."""
        detail = "a value in it cannot be stored"
        self.send(Refusal(sequence, message, "INVALID_FIELD", detail))

    def finish(self, end: SessionEnd, detail: str = "") -> None:
        """Ends the stream; the first reason stays."""
        if self.end is None:
            self.end = end
            self.end_detail = detail
            if self.on_end is not None:
                self.on_end()
        self._wake.set()

    def send_home(self, after: timedelta) -> None:
        """Ends the stream because the server shuts down; the neuron is to come back after that
        long.
        """
        self.reconnect_after = after
        self.send(Reconnect(after, "server draining"))
        self.finish(SessionEnd.DRAINING)

    def wake(self) -> None:
        """Lets `outgoing` return, for example because the reader is done."""
        self._wake.set()

    @property
    def crowded(self) -> bool:
        """True while the neuron reads more slowly than it makes the server answer."""
        return len(self._outbox) > self.CROWDED

    async def outgoing(self) -> list[Outgoing]:
        """Waits until there is something to do, and takes what the outbox holds."""
        await self._wake.wait()
        self._wake.clear()
        taken = list(self._outbox)
        self._outbox.clear()
        self._drained.set()
        return taken

    async def drained(self) -> None:
        """Waits until the outbox has been taken; for the reader while `crowded`."""
        self._drained.clear()
        await self._drained.wait()


class Sessions:
    """The sessions whose streams this server holds: at most one for each neuron."""

    def __init__(self) -> None:
        """An empty register."""
        self._by_neuron: dict[str, Session] = {}
        self._home_over: timedelta | None = None

    def add(self, session: Session) -> None:
        """Takes a session in; one of the same neuron with a lower epoch is superseded. Once the
        neurons are being sent home, it is sent home as well.
        """
        current = self._by_neuron.get(session.neuron_id)
        if current is not None and current.epoch > session.epoch:
            session.finish(SessionEnd.SUPERSEDED)
            return
        if current is not None:
            current.finish(SessionEnd.SUPERSEDED)
        self._by_neuron[session.neuron_id] = session
        if self._home_over is not None:
            _send_home(session, self._home_over)

    def remove(self, session: Session) -> None:
        """Forgets a session, unless a newer one has its place."""
        if self._by_neuron.get(session.neuron_id) is session:
            del self._by_neuron[session.neuron_id]

    def get(self, neuron_id: str) -> Session | None:
        """The neuron's session on this server."""
        return self._by_neuron.get(neuron_id)

    def end(self, neuron_id: str, end: SessionEnd) -> None:
        """Ends the neuron's session, if it is on this server."""
        session = self._by_neuron.get(neuron_id)
        if session is not None:
            session.finish(end)

    def send_home(self, over: timedelta) -> None:
        """Ends every session, now and from now on, because the server shuts down: the neurons are
        to come back one by one, spread over that time.
        """
        self._home_over = over
        for session in self:
            _send_home(session, over)

    def __iter__(self) -> Iterator[Session]:
        """All sessions, as they are now."""
        return iter(list(self._by_neuron.values()))

    def __len__(self) -> int:
        """How many sessions there are."""
        return len(self._by_neuron)


def _send_home(session: Session, over: timedelta) -> None:
    session.send_home(uniform(0.0, 1.0) * over)  # noqa: S311 - jitter
