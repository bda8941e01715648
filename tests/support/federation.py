"""A whole federation in the test's own process, and a neuron that speaks the bare protocol."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from federation.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    analytics_service_pb2_grpc,
    command_pb2,
    command_service_pb2_grpc,
    fleet_service_pb2_grpc,
    neuron_pb2,
    session_service_pb2_grpc,
)
from federation.v1 import session_service_pb2 as pb
from federation_server.app import App
from federation_server.settings import Settings
from federation_server.store import access
from federation_server.store.database import Database

ADMIN_KEY = "an-admin-key-for-tests-only"
WITHIN_S = 20.0


@dataclass(frozen=True)
class Served:
    """A federation that runs somewhere, whose admin key is ADMIN_KEY, and ways to call it."""

    address: str
    channel: grpc.aio.Channel

    @property
    def admin(self) -> tuple[tuple[str, str], ...]:
        """The metadata of an ADMIN."""
        return (("x-admin-key", ADMIN_KEY),)

    @property
    def session(self) -> session_service_pb2_grpc.SessionServiceAsyncStub:
        return session_service_pb2_grpc.SessionServiceStub(self.channel)

    @property
    def fleet(self) -> fleet_service_pb2_grpc.FleetServiceAsyncStub:
        return fleet_service_pb2_grpc.FleetServiceStub(self.channel)

    @property
    def command(self) -> command_service_pb2_grpc.CommandServiceAsyncStub:
        return command_service_pb2_grpc.CommandServiceStub(self.channel)

    @property
    def analytics(self) -> analytics_service_pb2_grpc.AnalyticsServiceAsyncStub:
        return analytics_service_pb2_grpc.AnalyticsServiceStub(self.channel)

    @property
    def access(self) -> access_service_pb2_grpc.AccessServiceAsyncStub:
        return access_service_pb2_grpc.AccessServiceStub(self.channel)

    async def enrollment_token(self, **wanted: Any) -> str:
        """The secret of a new enrollment token."""
        made = await self.access.CreateEnrollmentToken(
            access_service_pb2.CreateEnrollmentTokenRequest(**wanted), metadata=self.admin
        )
        return made.secret

    async def register(self, neuron_id: str, **description: Any) -> str:
        """Registers a neuron; gives its token."""
        description.setdefault("type", "worker")
        description.setdefault("command_types", [neuron_pb2.CommandType(type="run")])
        answer = await self.session.Register(
            pb.RegisterRequest(
                description=neuron_pb2.NeuronDescription(neuron_id=neuron_id, **description),
                enrollment_token=await self.enrollment_token(),
            )
        )
        return answer.token.token


@dataclass(frozen=True)
class Federation(Served):
    """A federation that runs in this process."""

    app: App


@asynccontextmanager
async def running(
    database_url: str, *, tls: Any = None, **settings: Any
) -> AsyncIterator[Federation]:
    """A federation on that database, at free ports, with ADMIN_KEY as its key.

    tls: the grpc.ChannelCredentials of its channel; None for plaintext.
    """
    database = Database(database_url)
    options = {"port": 0, "metrics_port": 0, "drain_timeout": "PT5S", **settings}
    app = App(Settings(**options), database)
    async with database.begin() as connection:
        await access.seed_admin_key(connection, ADMIN_KEY)
    async with app.running() as port:
        address = f"127.0.0.1:{port}"
        async with (
            grpc.aio.secure_channel(address, tls) if tls else grpc.aio.insecure_channel(address)
        ) as channel:
            yield Federation(address, channel, app)


class BareNeuron:
    """A neuron's stream, message by message."""

    def __init__(self, federation: Served, token: str) -> None:
        """Opens the call and sends nothing."""
        self.sequence = 0
        self.call = federation.session.Connect(metadata=(("authorization", f"Bearer {token}"),))

    async def send(self, **message: Any) -> None:
        """Sends a message."""
        await self.call.write(pb.NeuronMessage(**message))

    async def receive(self) -> pb.FederationMessage:
        """The next message; fails if the stream ends."""
        async with asyncio.timeout(WITHIN_S):
            message = await self.call.read()
        assert isinstance(message, pb.FederationMessage), f"the stream ended: {await self.end()}"
        return message

    async def hello(self, **said: Any) -> pb.Welcome:
        """Says Hello, as `greet` does; gives the Welcome."""
        await self.greet(**said)
        message = await self.receive()
        assert message.HasField("welcome")
        return message.welcome

    async def greet(
        self,
        *,
        spool_id: str = "spool-1",
        running: list[pb.RunningCommand] | None = None,
        next_sequence: int = 1,
    ) -> None:
        """Says Hello."""
        await self.send(
            hello=pb.Hello(
                instance_id=str(uuid.uuid4()),
                sdk=neuron_pb2.Sdk(name="bare", version="1"),
                spool_id=spool_id,
                first_sequence=1,
                next_sequence=next_sequence,
                running_commands=running or [],
            )
        )

    async def command(self) -> pb.CommandDelivery:
        """The next command; what comes before it is dropped."""
        while not (message := await self.receive()).HasField("command"):
            pass
        return message.command

    async def cancelled(self) -> pb.CancelCommand:
        """The next command to give up; what comes before it is dropped."""
        while not (message := await self.receive()).HasField("cancel_command"):
            pass
        return message.cancel_command

    async def update(self, of: pb.CommandDelivery | pb.CancelCommand, **update: Any) -> int:
        """Says what became of an attempt; gives the message's sequence."""
        self.sequence += 1
        await self.send(
            sequence=self.sequence,
            command_update=pb.CommandUpdate(command_id=of.command_id, attempt=of.attempt, **update),
        )
        return self.sequence

    async def finish(
        self, of: pb.CommandDelivery | pb.CancelCommand, state: str, code: str = ""
    ) -> int:
        """Says how an attempt ended; gives the message's sequence."""
        error = command_pb2.CommandError(code=code, message="so it is") if code else None
        ended = command_pb2.CommandState.Value(f"COMMAND_STATE_{state}")
        return await self.update(of, finished=pb.CommandFinished(state=ended, error=error))

    async def acked(self, sequence: int) -> None:
        """Waits until everything up to that sequence is acknowledged."""
        while (await self.receive()).ack_sequence < sequence:
            pass

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ended: its code and details. Messages that still come are dropped."""
        async with asyncio.timeout(WITHIN_S):
            try:
                while isinstance(await self.call.read(), pb.FederationMessage):
                    pass
            except grpc.aio.AioRpcError:
                pass
            return await self.call.code(), await self.call.details() or ""


@asynccontextmanager
async def connected(
    federation: Served, neuron_id: str, **description: Any
) -> AsyncIterator[BareNeuron]:
    """A neuron that has registered, said Hello and been welcomed."""
    neuron = BareNeuron(federation, await federation.register(neuron_id, **description))
    await neuron.hello()
    try:
        yield neuron
    finally:
        neuron.call.cancel()
