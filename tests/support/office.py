"""Registration as it is, on a database of the test's own, and ways to look behind it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from sqlalchemy import delete, func, select, update

from federation.v1 import neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.domain.access import NeuronIdentity, TokenLifetime
from federation_server.live.notifier import channel
from federation_server.rpc import errors
from federation_server.rpc.registration import Registration
from federation_server.rpc.tokens import Tokens
from federation_server.store import enrollment
from federation_server.store.access import SigningKey
from federation_server.store.database import Database
from federation_server.store.enrollment import NewEnrollmentToken
from federation_server.store.schema import (
    enrollment_tokens,
    neuron_states,
    neurons,
)
from federation_server.store.sessions import OpenedSession
from tests.support.neurons import new_session, open_or_not

SERVER_ID = "server-1"


class Office:
    """Registration and what stands around it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.tokens = Tokens([SigningKey("k", b"k" * 32)], TokenLifetime())
        self.registration = Registration(database, self.tokens)

    async def enrollment_token(self, **wanted: Any) -> str:
        async with self.database.begin() as connection:
            new = NewEnrollmentToken(**{"creator": "admin", **wanted})
            return (await enrollment.create(connection, new)).secret

    async def register(
        self,
        neuron_id: str = "n1",
        *,
        enrollment_token: str = "",
        request_id: str = "",
        own: str | None = None,
        **description: Any,
    ) -> pb.RegisterResponse:
        request = pb.RegisterRequest(
            description=neuron_pb2.NeuronDescription(
                neuron_id=neuron_id, **{"type": "worker", **description}
            ),
            enrollment_token=enrollment_token,
            request_id=request_id,
        )
        metadata = [] if own is None else [("authorization", f"Bearer {own}")]
        return await self.registration.register(request, metadata)

    async def refused(self, *args: Any, **kwargs: Any) -> str:
        """The reason of a Register that must be refused."""
        with pytest.raises(errors.Refused) as caught:
            await self.register(*args, **kwargs)
        return caught.value.reason_name

    async def identity(self, token: str) -> NeuronIdentity | None:
        """Whom the token names, if it is still good."""
        identity = self.tokens.verify(token)
        row = await self.row(identity.neuron_id)
        return identity if row and row["token_generation"] <= identity.generation else None

    async def row(self, neuron_id: str = "n1") -> dict[str, Any] | None:
        """The neuron's two rows as one."""
        joined = neurons.join(neuron_states, neuron_states.c.neuron_id == neurons.c.neuron_id)
        query = select(*neurons.c, *(c for c in neuron_states.c if c.name != "neuron_id"))
        async with self.database.begin() as connection:
            rows = await connection.execute(
                query.select_from(joined).where(neurons.c.neuron_id == neuron_id)
            )
        row = rows.mappings().one_or_none()
        return None if row is None else dict(row)

    async def state(self, neuron_id: str = "n1") -> dict[str, Any]:
        row = await self.row(neuron_id)
        assert row is not None
        return row

    async def change(self, neuron_id: str = "n1", **values: Any) -> None:
        async with self.database.begin() as connection:
            await connection.execute(
                update(neurons).where(neurons.c.neuron_id == neuron_id).values(**values)
            )

    async def delete(self, neuron_id: str = "n1") -> None:
        async with self.database.begin() as connection:
            await connection.execute(delete(neurons).where(neurons.c.neuron_id == neuron_id))

    async def uses(self) -> int:
        async with self.database.begin() as connection:
            found = await connection.execute(select(func.sum(enrollment_tokens.c.uses)))
            return int(found.scalar_one())

    async def open_session(self, token: str) -> OpenedSession | None:
        identity = self.tokens.verify(token)
        new = new_session(identity.neuron_id, generation=identity.generation)
        return await open_or_not(self.database, new, server_id=SERVER_ID)

    async def hints(self, listener: psycopg.AsyncConnection[Any]) -> list[str]:
        """What was said to SERVER_ID since the listener listens."""
        return [notify.payload async for notify in listener.notifies(timeout=0)]

    async def listener(self) -> psycopg.AsyncConnection[Any]:
        connection = await self.database.connect("test")
        await connection.execute(f'LISTEN "{channel(SERVER_ID)}"'.encode())
        return connection
