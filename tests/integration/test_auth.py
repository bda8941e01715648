"""The gate before every RPC: what each credential gets at each of them."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import psycopg
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from psycopg import sql
from sqlalchemy import Insert, func

from federation_server.domain.access import Caller, Role, secret_hash
from federation_server.domain.neuron import Lifecycle
from federation_server.rpc import auth
from federation_server.rpc.methods import CONNECT, METHODS
from federation_server.store.database import Database
from federation_server.store.schema import api_keys
from tests.support.gate import RPCS, UNLISTED, Gate, Metadata, bearer, details, gate_of, info
from tests.support.neurons import GENERATION
from tests.support.postgres import Server, libpq
from tests.unit.test_methods import caller_said, comments

SECRETS = {role: f"fak_{role.name}" for role in Role}


@pytest_asyncio.fixture
async def gate(database_url: str) -> AsyncIterator[Gate]:
    database = Database(database_url)
    async with database.begin() as connection:
        for role, secret in SECRETS.items():
            await connection.execute(_key(role.name.lower(), role, secret))
    async with gate_of(database) as gate:
        yield gate


def _key(name: str, role: Role, secret: str, **values: Any) -> Insert:
    return api_keys.insert().values(
        api_key_id=str(uuid.uuid4()),
        name=name,
        role=role,
        secret_hash=secret_hash(secret),
        create_time=func.now(),
        **values,
    )


# every RPC, every credential


async def test_every_rpc_answers_each_credential_as_the_contract_says(gate: Gate) -> None:
    for neuron_id in ("n1", "n2"):
        await gate.neuron(neuron_id)
    async with gate.database.begin() as connection:
        for name, ended in (("expired", "expire_time"), ("revoked", "revoke_time")):
            await connection.execute(_key(name, Role.ADMIN, f"fak_{name}", **{ended: func.now()}))
    credentials: dict[str, Metadata] = {
        "none": (),
        "garbage": bearer("garbage"),
        "garbage that looks like a token": bearer("eyJhbGciOiJIUzI1NiJ9.e30.c2ln"),
        "neuron:n1": gate.token("n1"),
        "neuron:n2": gate.token("n2"),
        "expired token": gate.token(age=timedelta(hours=25)),
        "revoked token": gate.token(generation=GENERATION - 1),
        "expired key": bearer("fak_expired"),
        "revoked key": bearer("fak_revoked"),
        **{role.name: bearer(secret) for role, secret in SECRETS.items()},
    }
    said = {rpc: caller_said(comment) for rpc, comment in comments().items()}
    got, wanted = {}, {}
    for rpc in [*RPCS, UNLISTED]:
        # Of grpc's own services the contract does not speak.
        caller = Caller(said[rpc][0]) if rpc in said else METHODS.get(rpc)
        for name, metadata in credentials.items():
            got[rpc, name] = await gate.knock(rpc, metadata)
            wanted[rpc, name] = expected(rpc, caller, name)
    assert got == wanted


def expected(rpc: str, caller: Caller | None, credential: str) -> str:
    """The rules in other words than the code's."""
    too_low = "PERMISSION_DENIED ROLE_TOO_LOW"
    if caller is None:
        return too_low
    if caller is Caller.ANYONE:
        return "anyone"
    if credential == "none":
        return "UNAUTHENTICATED CREDENTIAL_MISSING"
    if credential.startswith("expired"):
        return "UNAUTHENTICATED CREDENTIAL_EXPIRED"
    if credential.startswith("neuron"):
        return credential if caller is Caller.NEURON else too_low
    if credential == "revoked token" and caller is not Caller.NEURON:
        return too_low  # nobody need look whether it was
    if credential == "revoked token" and rpc == CONNECT:
        return "neuron:n1"  # until its Hello has come: test_revoked_tokens_end_the_stream…
    if credential.startswith(("garbage", "revoked")):
        return "UNAUTHENTICATED CREDENTIAL_INVALID"
    allowed = {
        Caller.NEURON: set(),
        Caller.VIEWER: {"VIEWER", "OPERATOR", "ADMIN"},
        Caller.OPERATOR: {"OPERATOR", "ADMIN"},
        Caller.ADMIN: {"ADMIN"},
    }[caller]
    return f"admin:{credential.lower()}" if credential in allowed else too_low


async def test_an_rpc_that_does_not_exist_is_unimplemented(gate: Gate) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gate.call("/federation.v1.FleetService/Nothing")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# credentials in the metadata

GET, REFRESH, DEREGISTER = (
    "/federation.v1.FleetService/GetNeuron",
    "/federation.v1.SessionService/RefreshToken",
    "/federation.v1.SessionService/Deregister",
)
INVALID = "UNAUTHENTICATED CREDENTIAL_INVALID"


@pytest.mark.parametrize(
    ("metadata", "answer"),
    [
        ((("x-admin-key", "fak_VIEWER"),), "admin:viewer"),
        ((("authorization", "bearer  fak_VIEWER "),), "admin:viewer"),
        ((("authorization", "Basic Zm9v"), ("x-admin-key", "fak_VIEWER")), "admin:viewer"),
        ((("authorization", "Bearer fak_VIEWER"), ("x-admin-key", "other")), "admin:viewer"),
        ((("authorization", "fak_VIEWER"),), INVALID),
        ((("authorization", "Basic Zm9v"),), INVALID),
        ((("authorization", "Bearer"),), INVALID),
        ((("authorization", ""),), INVALID),
        ((("x-admin-key", ""),), INVALID),
        ((("x-admin-key", "fak_viewer"),), INVALID),
        ((("authorization", "Bearer other"), ("authorization", "Bearer fak_VIEWER")), INVALID),
        ((("x-other", "fak_VIEWER"),), "UNAUTHENTICATED CREDENTIAL_MISSING"),
    ],
)
async def test_a_key_is_taken_from_the_metadata(
    gate: Gate, metadata: Metadata, answer: str
) -> None:
    assert await gate.knock(GET, metadata) == answer


# API keys


async def test_a_good_key_is_asked_for_once_in_five_seconds(gate: Gate) -> None:
    assert await gate.knock(GET, bearer("fak_VIEWER")) == "admin:viewer"
    await gate.change_key(Role.VIEWER, revoke_time=func.now())
    gate.clock.now += 4.9
    assert await gate.knock(GET, bearer("fak_VIEWER")) == "admin:viewer"
    gate.clock.now += 0.2
    assert await gate.knock(GET, bearer("fak_VIEWER")) == INVALID


async def test_a_bad_key_is_not_remembered(gate: Gate) -> None:
    assert await gate.knock(GET, bearer("fak_new")) == INVALID
    await gate.change_key(Role.VIEWER, secret_hash=secret_hash("fak_new"))
    assert await gate.knock(GET, bearer("fak_new")) == "admin:viewer"


async def test_an_expired_key_is_told_so(gate: Gate) -> None:
    await gate.change_key(Role.VIEWER, expire_time=func.now())
    assert await gate.knock(GET, bearer("fak_VIEWER")) == "UNAUTHENTICATED CREDENTIAL_EXPIRED"


async def test_the_memory_of_keys_is_bounded_and_forgets_the_oldest(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "API_KEY_CACHE_SIZE", 2)
    for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN):
        await gate.knock(GET, bearer(SECRETS[role]))
        await gate.change_key(role, revoke_time=func.now())
    assert await gate.knock(GET, bearer(SECRETS[Role.OPERATOR])) == "admin:operator"
    assert await gate.knock(GET, bearer(SECRETS[Role.ADMIN])) == "admin:admin"
    assert await gate.knock(GET, bearer(SECRETS[Role.VIEWER])) == INVALID


# neuron tokens


async def test_an_expired_token_is_told_so(gate: Gate) -> None:
    await gate.neuron()
    answer = await gate.knock(REFRESH, gate.token(age=timedelta(hours=25)))
    assert answer == "UNAUTHENTICATED CREDENTIAL_EXPIRED"


async def test_a_token_of_a_deleted_neuron_is_invalid(gate: Gate) -> None:
    assert await gate.knock(REFRESH, gate.token()) == INVALID


async def test_a_token_of_an_older_generation_is_invalid_at_once(gate: Gate) -> None:
    await gate.neuron()
    assert await gate.knock(REFRESH, gate.token()) == "neuron:n1"
    await gate.change_neuron(token_generation=GENERATION + 1)
    assert await gate.knock(REFRESH, gate.token()) == INVALID
    assert await gate.knock(DEREGISTER, gate.token()) == INVALID


async def test_a_token_that_is_used_ends_the_older_ones(gate: Gate) -> None:
    await gate.neuron()
    old, new = gate.token(), gate.token(generation=GENERATION + 5)
    assert await gate.knock(REFRESH, old) == "neuron:n1"
    assert await gate.knock(REFRESH, new) == "neuron:n1"
    assert await gate.knock(REFRESH, old) == INVALID
    assert await gate.knock(REFRESH, new) == "neuron:n1"


async def test_a_deactivated_neuron_is_told_so_by_every_call_but_deregister(gate: Gate) -> None:
    await gate.neuron(lifecycle=Lifecycle.DEACTIVATED)
    answers = {
        rpc: await gate.knock(rpc, gate.token())
        for rpc, caller in METHODS.items()
        if caller is Caller.NEURON
    }
    assert answers.pop(DEREGISTER) == "neuron:n1"
    assert answers.pop(CONNECT) == "neuron:n1", "it is told so when it opens its session"
    assert set(answers.values()) == {"FAILED_PRECONDITION NEURON_DEACTIVATED"}


async def test_a_deregistered_neurons_token_serves_only_to_deregister_again(gate: Gate) -> None:
    await gate.neuron(lifecycle=Lifecycle.DEACTIVATED, token_generation=GENERATION + 1)
    assert await gate.knock(DEREGISTER, gate.token()) == "neuron:n1"
    assert await gate.knock(REFRESH, gate.token()) == INVALID


async def test_calls_at_once_do_not_see_each_others_principals(gate: Gate) -> None:
    await gate.neuron("n1")
    await gate.neuron("n2")
    knocks = [
        (REFRESH, gate.token("n1"), "neuron:n1"),
        (REFRESH, gate.token("n2"), "neuron:n2"),
        ("/federation.v1.SessionService/Connect", gate.token("n2"), "neuron:n2"),
        ("/federation.v1.SessionService/Register", gate.token("n1"), "anyone"),
        (GET, bearer("fak_VIEWER"), "admin:viewer"),
        ("/federation.v1.CommandService/ExecuteCommand", bearer("fak_ADMIN"), "admin:admin"),
    ] * 10
    answers = await asyncio.gather(*(gate.knock(rpc, metadata) for rpc, metadata, _ in knocks))
    assert answers == [wanted for _, _, wanted in knocks]


# PostgreSQL away


async def unavailable(gate: Gate, rpc: str, metadata: Metadata) -> float:
    """Asserts that the call is UNAVAILABLE; gives the seconds to wait."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gate.call(rpc, metadata, timeout=3.0)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert info(caught.value).reason == "DATABASE_UNAVAILABLE"
    retry = error_details_pb2.RetryInfo()
    assert details(caught.value).details[1].Unpack(retry)
    return retry.retry_delay.ToTimedelta().total_seconds()


async def test_without_postgresql_callers_are_told_when_to_come_again() -> None:
    async with gate_of(Database("postgresql://nobody@127.0.0.1:1/none")) as gate:
        assert await unavailable(gate, REFRESH, gate.token()) > 0
        assert await unavailable(gate, GET, bearer("fak_VIEWER")) > 0
        assert await gate.knock("/grpc.health.v1.Health/Check") == "anyone"
        assert await gate.knock(GET) == "UNAUTHENTICATED CREDENTIAL_MISSING"


async def test_with_a_postgresql_that_hangs_callers_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "LOOKUP_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and says nothing
        port = mute.getsockname()[1]
        async with gate_of(Database(f"postgresql://nobody@127.0.0.1:{port}/none")) as gate:
            assert await unavailable(gate, GET, bearer("fak_VIEWER")) > 0


async def test_when_postgresql_returns_callers_are_served_again(
    gate: Gate, postgres: Server
) -> None:
    await gate.neuron()
    assert await gate.knock(REFRESH, gate.token()) == "neuron:n1"
    name = gate.database.url.database
    assert name is not None
    with psycopg.connect(libpq(postgres.admin), autocommit=True) as admin:
        database = sql.Identifier(name)
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(database))
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )
        assert await unavailable(gate, REFRESH, gate.token()) > 0
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(database))
    assert await gate.knock(REFRESH, gate.token()) == "neuron:n1"
