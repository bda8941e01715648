"""Signing keys that rotate under two servers on one database."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from itertools import cycle

import grpc
import grpc.aio
import jwt
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import text, update

from federation.v1 import access_service_pb2 as pb
from federation.v1 import neuron_pb2, session_service_pb2
from federation_server.rpc import tokens
from federation_server.store import signing_keys as store
from federation_server.store.access import current_signing_keys, load_signing_keys
from federation_server.store.database import Database
from federation_server.store.schema import signing_keys
from tests.support.federation import Federation, running
from tests.support.gate import bearer, info
from tests.support.waiting import eventually

AT_ONCE = Duration()


@pytest_asyncio.fixture
async def servers(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Federation, Federation]]:
    """Two servers that read the keys only when a token makes them."""
    monkeypatch.setattr(tokens, "RELOAD_INTERVAL_S", 3600.0)
    monkeypatch.setattr(tokens, "RELOAD_PAUSE_S", 0.05)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(database_url))
        two = await stack.enter_async_context(running(database_url))
        yield one, two


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


async def rotate(federation: Federation, overlap: Duration | None = None) -> pb.SigningKey:
    request = pb.RotateSigningKeyRequest(overlap=overlap)
    answer = await federation.access.RotateSigningKey(request, metadata=federation.admin)
    return answer.signing_key


async def listed(federation: Federation, page_size: int = 0) -> list[pb.SigningKey]:
    request = pb.ListSigningKeysRequest(page_size=page_size)
    keys: list[pb.SigningKey] = []
    while True:
        answer = await federation.access.ListSigningKeys(request, metadata=federation.admin)
        keys += answer.signing_keys
        if not answer.next_page_token:
            return keys
        request.page_token = answer.next_page_token


async def refresh(federation: Federation, token: str) -> str:
    answer = await federation.session.RefreshToken(
        session_service_pb2.RefreshTokenRequest(), metadata=bearer(token)
    )
    return answer.token.token


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


async def test_what_one_server_signs_with_a_new_key_the_other_takes_at_once(
    servers: tuple[Federation, Federation],
) -> None:
    one, two = servers
    before = await one.register("n1")
    key = await rotate(one)
    after = await refresh(one, before)
    assert kid_of(after) == key.kid
    assert kid_of(before) != key.kid
    await refresh(two, before)
    again = await refresh(two, after)
    assert kid_of(again) == key.kid, "it has learned of the key, and signs with it"


async def test_a_neuron_that_registers_again_shows_a_new_key_to_a_server_that_does_not_know_it(
    servers: tuple[Federation, Federation],
) -> None:
    one, two = servers
    token = await one.register("n1")
    await rotate(one)
    token = await refresh(one, token)
    answer = await two.session.Register(
        session_service_pb2.RegisterRequest(
            description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker")
        ),
        metadata=bearer(token),
    )
    assert not answer.created


async def test_a_token_that_cannot_be_looked_at_now_is_not_replaced_by_enrolling_anew(
    servers: tuple[Federation, Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers
    token = await one.register("n1")
    secret = await one.enrollment_token(allow_reenrollment=True, max_uses=1)
    await rotate(one)
    token = await refresh(one, token)
    monkeypatch.setattr(tokens, "LOOK_TIMEOUT_S", 0.1)
    async with one.app.database.begin() as connection:  # the other one cannot read the keys
        await connection.execute(text("LOCK TABLE signing_keys IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await two.session.Register(
                session_service_pb2.RegisterRequest(
                    description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker"),
                    enrollment_token=secret,
                ),
                metadata=bearer(token),
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await refresh(one, token)


async def test_no_neuron_is_refused_while_keys_rotate_with_overlap(
    servers: tuple[Federation, Federation],
) -> None:
    calls: Counter[str] = Counter()
    over = asyncio.Event()

    async def neuron(neuron_id: str) -> None:
        token = await servers[0].register(neuron_id)
        for server in cycle(servers):
            token = await refresh(server, token)
            calls[neuron_id] += 1
            if over.is_set():
                return

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(neuron(f"n{number}"))
        for number in range(6):
            await rotate(servers[number % 2])
            wanted = 2 * number + 2  # two calls: one to each server
            await eventually(lambda: len(calls) == 4 and min(calls.values()) >= wanted)  # noqa: B023
        over.set()
    assert len(await listed(servers[0])) == 7


async def test_without_an_overlap_no_server_takes_what_was_signed_before(
    servers: tuple[Federation, Federation],
) -> None:
    one, two = servers
    token = await one.register("n1")
    await refresh(two, token)
    await rotate(one, AT_ONCE)
    # The other one reads the keys because of a token with one that it does not know.
    await refresh(two, await one.register("n2"))
    for server in servers:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refresh(server, token)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert info(caught.value).reason == "CREDENTIAL_INVALID"


async def test_a_server_that_meets_no_new_token_learns_of_a_retirement_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "RELOAD_INTERVAL_S", 0.05)
    monkeypatch.setattr(tokens, "RELOAD_PAUSE_S", 0.05)
    async with running(database_url) as federation:
        token = await federation.register("n1")
        async with federation.app.database.begin() as connection:
            await store.rotate(connection, timedelta())  # as another server would

        async def refused() -> str | None:
            try:
                await refresh(federation, token)
            except grpc.aio.AioRpcError as error:
                return info(error).reason
            return None

        assert await eventually(refused) == "CREDENTIAL_INVALID"


async def test_keys_are_listed_newest_first_and_stay_while_a_token_is_of_use(
    servers: tuple[Federation, Federation],
) -> None:
    one, two = servers
    made = [(await rotate(each)).kid for each in (one, two)]
    keys = await listed(two, page_size=2)
    assert [key.kid for key in keys[:2]] == made[::-1]
    assert len(keys) == 3
    assert [key.HasField("retire_time") for key in keys] == [False, True, True]
    overlap = keys[1].retire_time.ToDatetime() - keys[0].create_time.ToDatetime()
    assert overlap == timedelta(days=30, hours=24, minutes=5)
    assert await listed(one) == keys


async def test_keys_that_are_made_at_once_leave_one_that_signs(database: Database) -> None:
    async def make() -> None:
        async with database.begin() as connection:
            await store.rotate(connection, timedelta(hours=1))

    async with database.begin() as connection:
        await load_signing_keys(connection)
    await asyncio.gather(*(make() for _ in range(5)))
    async with database.begin() as connection:
        keys, _ = await store.list_keys(connection, page_size=0, page_token="")
        current = await current_signing_keys(connection)
    assert len(current) == len(keys) == 6
    assert [key.kid for key in keys if key.retire_time is None] == [keys[0].kid]
    assert current[0].kid == keys[0].kid


async def test_a_key_that_retires_does_not_sign_even_if_it_looks_newer(database: Database) -> None:
    async with database.begin() as connection:
        await load_signing_keys(connection)
        made = await store.rotate(connection, timedelta(hours=1))
        await connection.execute(  # as if PostgreSQL's clock had been set back before it was made
            update(signing_keys)
            .where(signing_keys.c.kid == made.kid)
            .values(create_time=signing_keys.c.create_time - timedelta(hours=1))
        )
        assert (await current_signing_keys(connection))[0].kid == made.kid


async def test_a_short_overlap_is_not_lengthened_by_the_next_rotation(database: Database) -> None:
    async with database.begin() as connection:
        first = (await load_signing_keys(connection))[0].kid
        await store.rotate(connection, timedelta(minutes=1))
    async with database.begin() as connection:
        second = await store.rotate(connection, timedelta(hours=1))
        keys, _ = await store.list_keys(connection, page_size=0, page_token="")
    retire = {key.kid: key.retire_time for key in keys}[first]
    assert retire is not None
    assert retire - second.create_time <= timedelta(minutes=1)
