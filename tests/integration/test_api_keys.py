"""API keys over gRPC: made, used, rotated, expired, revoked; and the last one, which stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import func, select, text, update

from federation.v1 import access_service_pb2 as pb
from federation.v1 import command_service_pb2, fleet_service_pb2
from federation_server.domain.access import Caller, secret_hash
from federation_server.rpc import auth
from federation_server.rpc.methods import METHODS
from federation_server.store import access
from federation_server.store import api_keys as store
from federation_server.store.access import AdminKeySeed, AdminKeyUnusable
from federation_server.store.schema import api_key_old_secrets, api_keys
from tests.support.federation import ADMIN_KEY, Federation, running
from tests.support.gate import RPCS, Metadata, info
from tests.support.waiting import eventually

ADMIN = pb.ROLE_ADMIN
ENV = "admin-env"
WITHIN_S = 20.0


@pytest_asyncio.fixture
async def federation(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Federation]:
    monkeypatch.setattr(auth, "API_KEY_CACHE_S", 0.0)
    async with running(database_url) as federation:
        yield federation


def key_of(secret: str) -> Metadata:
    return (("x-admin-key", secret),)


def span(**length: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(**length))
    return message


def moment(at: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(at)
    return message


async def make(
    federation: Federation, name: str, role: pb.Role.ValueType = pb.ROLE_VIEWER, **wanted: Any
) -> pb.CreateApiKeyResponse:
    request = pb.CreateApiKeyRequest(name=name, role=role, **wanted)
    return await federation.access.CreateApiKey(request, metadata=federation.admin)


async def revoke(federation: Federation, name: str, secret: str = ADMIN_KEY) -> pb.ApiKey:
    request = pb.RevokeApiKeyRequest(name=name)
    answer = await federation.access.RevokeApiKey(request, metadata=key_of(secret))
    return answer.api_key


async def rotate(
    federation: Federation, name: str, overlap: Duration | None = None
) -> pb.RotateApiKeyResponse:
    request = pb.RotateApiKeyRequest(name=name, overlap=overlap)
    return await federation.access.RotateApiKey(request, metadata=federation.admin)


async def expire(federation: Federation, name: str, at: datetime) -> pb.ApiKey:
    request = pb.ExpireApiKeyRequest(name=name, expire_time=moment(at))
    answer = await federation.access.ExpireApiKey(request, metadata=federation.admin)
    return answer.api_key


async def listed(federation: Federation) -> dict[str, pb.ApiKey]:
    answer = await federation.access.ListApiKeys(pb.ListApiKeysRequest(), metadata=federation.admin)
    return {key.name: key for key in answer.api_keys}


async def tried(federation: Federation, secret: str) -> str:
    """What a VIEWER's call gets with that secret."""
    try:
        await federation.fleet.GetFleetOverview(
            fleet_service_pb2.GetFleetOverviewRequest(), metadata=key_of(secret)
        )
    except grpc.aio.AioRpcError as error:
        return info(error).reason
    return "served"


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return f"{caught.value.code().name} {info(caught.value).reason}"


async def change(federation: Federation, key: str, **values: Any) -> None:
    async with federation.app.database.begin() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.name == key).values(**values))


# made and listed


async def test_a_key_is_made_with_its_role_and_shown_once(federation: Federation) -> None:
    made = await make(federation, "ci", description="the pipeline", ttl=span(days=90))
    assert made.secret.startswith("fak_")
    key = made.api_key
    assert (key.name, key.role, key.creator) == ("ci", pb.ROLE_VIEWER, ENV)
    assert key.description == "the pipeline"
    assert key.expire_time.seconds - key.create_time.seconds == 90 * 24 * 3600
    assert not key.HasField("last_use_time")
    assert await tried(federation, made.secret) == "served"
    create = pb.CreateApiKeyRequest(name="x", role=ADMIN)
    call = federation.access.CreateApiKey(create, metadata=key_of(made.secret))
    assert await refused(call) == "PERMISSION_DENIED ROLE_TOO_LOW"


async def test_keys_are_listed_in_pages_newest_first_without_a_secret(
    federation: Federation,
) -> None:
    made = [await make(federation, f"k{number}") for number in range(3)]
    rotated = await rotate(federation, "k1")
    request = pb.ListApiKeysRequest(page_size=3)
    first = await federation.access.ListApiKeys(request, metadata=federation.admin)
    request.page_token = first.next_page_token
    second = await federation.access.ListApiKeys(request, metadata=federation.admin)
    assert second.next_page_token == ""
    keys = [*first.api_keys, *second.api_keys]
    assert [key.name for key in keys] == ["k2", "k1", "k0", ENV]
    assert keys[3].creator == ""
    assert not keys[3].HasField("expire_time")
    for secret in (rotated.secret, *(answer.secret for answer in made)):
        assert secret not in str(keys)


async def test_a_repeated_create_shows_the_same_key_and_no_secret(federation: Federation) -> None:
    first = await make(federation, "ci", request_id="r")
    second = await make(federation, "ci", request_id="r")
    assert (second.api_key, second.secret) == (first.api_key, "")
    other = make(federation, "ci", ADMIN, request_id="r")
    assert await refused(other) == "ALREADY_EXISTS REQUEST_ID_REUSED"
    other = make(federation, "other", request_id="r")
    assert await refused(other) == "ALREADY_EXISTS REQUEST_ID_REUSED"


async def test_a_name_is_given_once(federation: Federation) -> None:
    taken = "ALREADY_EXISTS API_KEY_NAME_TAKEN"
    await make(federation, "ci", request_id="r")
    assert await refused(make(federation, "ci")) == taken
    assert await refused(make(federation, "ci", request_id="s")) == taken
    for other in ("one", "two"):  # no request_id tells them apart
        await make(federation, other)
    assert await refused(make(federation, "one")) == taken
    await revoke(federation, "ci")
    assert await refused(make(federation, "ci")) == taken


async def test_the_name_of_admin_api_keys_key_is_always_taken(federation: Federation) -> None:
    await change(federation, ENV, name="generated")  # ADMIN_API_KEY was never set
    assert await refused(make(federation, ENV)) == "ALREADY_EXISTS API_KEY_NAME_TAKEN"


@pytest.mark.parametrize("name", ["", "Ci", "-ci", "ci\x1b[2J", "c" * 65, "a b"])
async def test_a_name_that_would_not_do_in_a_history_is_refused(
    federation: Federation, name: str
) -> None:
    assert await refused(make(federation, name)) == "INVALID_ARGUMENT INVALID_FIELD"


async def test_a_key_without_a_role_is_refused(federation: Federation) -> None:
    nobody = make(federation, "ci", pb.ROLE_UNSPECIFIED)
    assert await refused(nobody) == "INVALID_ARGUMENT INVALID_FIELD"


# last use


async def test_the_last_use_of_a_key_shows_soon(federation: Federation) -> None:
    made = await make(federation, "ci")
    assert await tried(federation, made.secret) == "served"

    async def used() -> bool:
        return (await listed(federation))["ci"].HasField("last_use_time")

    await eventually(used)


async def test_the_use_of_a_key_is_written_once_a_minute_at_most(federation: Federation) -> None:
    await make(federation, "ci")
    written = []
    for age_s in (None, 50, 70):
        if age_s is not None:
            await change(federation, "ci", last_use_time=func.now() - timedelta(seconds=age_s))
        before = (await listed(federation))["ci"].last_use_time
        async with federation.app.database.begin() as connection:
            await store.note_use(connection, ["ci", "nobody"])
        written.append((await listed(federation))["ci"].last_use_time != before)
    assert written == [True, False, True]


# rotated


async def test_both_secrets_work_until_the_overlap_is_over(federation: Federation) -> None:
    old = (await make(federation, "ci")).secret
    before = datetime.now(UTC)
    rotated = await rotate(federation, "ci")
    new = rotated.secret
    assert new.startswith("fak_")
    end = rotated.api_key.old_secret_expire_time.ToDatetime(tzinfo=UTC)
    assert timedelta(hours=23) < end - before < timedelta(hours=25)
    assert [await tried(federation, secret) for secret in (old, new)] == ["served", "served"]
    async with federation.app.database.begin() as connection:
        await connection.execute(update(api_key_old_secrets).values(expire_time=func.now()))
    assert await tried(federation, old) == "CREDENTIAL_EXPIRED"
    assert await tried(federation, new) == "served"
    assert not (await listed(federation))["ci"].HasField("old_secret_expire_time")


async def test_without_an_overlap_every_secret_before_ends_at_once(federation: Federation) -> None:
    secrets = [(await make(federation, "ci")).secret]
    secrets.append((await rotate(federation, "ci", span(days=30))).secret)
    secrets.append((await rotate(federation, "ci", span())).secret)
    answers = [await tried(federation, secret) for secret in secrets]
    assert answers == ["CREDENTIAL_EXPIRED", "CREDENTIAL_EXPIRED", "served"]


async def test_a_rotation_does_not_lengthen_the_overlap_of_the_one_before(
    federation: Federation,
) -> None:
    await make(federation, "ci")
    first = (await rotate(federation, "ci", span(hours=1))).api_key.old_secret_expire_time
    second = (await rotate(federation, "ci", span(hours=48))).api_key.old_secret_expire_time
    assert second.seconds - first.seconds > 46 * 3600
    async with federation.app.database.begin() as connection:
        ends = await connection.execute(
            select(api_key_old_secrets.c.expire_time).order_by("expire_time")
        )
        soonest = ends.scalars().first()
    assert soonest == first.ToDatetime(tzinfo=UTC)


async def test_an_old_secret_is_shown_to_end_no_later_than_its_key(federation: Federation) -> None:
    made = await make(federation, "ci", ttl=span(hours=1))
    rotated = await rotate(federation, "ci", span(hours=24))
    assert rotated.api_key.old_secret_expire_time == made.api_key.expire_time
    await change(federation, "ci", expire_time=func.now())
    assert not (await listed(federation))["ci"].HasField("old_secret_expire_time")


async def test_an_old_secret_ends_with_its_key(federation: Federation) -> None:
    old = (await make(federation, "ci", ttl=span(hours=1))).secret
    await rotate(federation, "ci")
    await change(federation, "ci", expire_time=func.now())
    assert await tried(federation, old) == "CREDENTIAL_EXPIRED"
    await change(federation, "ci", expire_time=None)
    assert await tried(federation, old) == "served"
    await revoke(federation, "ci")
    assert await tried(federation, old) == "CREDENTIAL_INVALID"


async def test_a_restart_does_not_bring_back_an_admin_api_key_that_was_rotated(
    federation: Federation,
) -> None:
    async def seed(secret: str) -> AdminKeySeed:
        async with federation.app.database.begin() as connection:
            return (await access.seed_admin_key(connection, secret)).seed

    new = (await rotate(federation, ENV)).secret
    assert await seed(ADMIN_KEY) is AdminKeySeed.KEPT, "it works on, beside the new one"
    assert await tried(federation, new) == "served"
    request = pb.RotateApiKeyRequest(name=ENV, overlap=span())
    rotated = await federation.access.RotateApiKey(request, metadata=key_of(new))
    for gone in (ADMIN_KEY, new):
        with pytest.raises(AdminKeyUnusable, match="rotated"):
            await seed(gone)
    assert await seed(rotated.secret) is AdminKeySeed.KEPT


async def test_an_old_secret_of_any_key_cannot_become_admin_api_key(
    federation: Federation,
) -> None:
    old = (await make(federation, "ci")).secret
    await rotate(federation, "ci")
    with pytest.raises(AdminKeyUnusable, match="'ci'"):
        async with federation.app.database.begin() as connection:
            await access.seed_admin_key(connection, old)


async def test_another_admin_api_key_ends_every_secret_of_the_one_before(
    federation: Federation,
) -> None:
    new = (await rotate(federation, ENV)).secret
    async with federation.app.database.begin() as connection:
        seeded = await access.seed_admin_key(connection, "another-admin-key-for-tests")
    assert seeded.seed is AdminKeySeed.REPLACED
    answers = [await tried(federation, secret) for secret in (ADMIN_KEY, new)]
    assert answers == ["CREDENTIAL_EXPIRED", "CREDENTIAL_INVALID"]
    assert await tried(federation, "another-admin-key-for-tests") == "served"


# expired and revoked


async def test_a_key_stops_when_it_is_told_to_and_works_again_when_that_is_put_off(
    federation: Federation,
) -> None:
    secret = (await make(federation, "ci")).secret
    key = await expire(federation, "ci", datetime.now(UTC) - timedelta(seconds=1))
    assert key.HasField("expire_time")
    assert await tried(federation, secret) == "CREDENTIAL_EXPIRED"
    await expire(federation, "ci", datetime.now(UTC) + timedelta(hours=1))
    assert await tried(federation, secret) == "served"


async def test_a_revoked_key_is_over_for_good(federation: Federation) -> None:
    secret = (await make(federation, "ci")).secret
    first = await revoke(federation, "ci")
    assert first.HasField("revoke_time")
    assert await revoke(federation, "ci") == first
    assert await tried(federation, secret) == "CREDENTIAL_INVALID"
    gone = "NOT_FOUND API_KEY_NOT_FOUND"
    assert await refused(rotate(federation, "ci")) == gone
    assert await refused(expire(federation, "ci", datetime.now(UTC))) == gone


@pytest.mark.parametrize("name", ["nobody", "Ünknown \x1b[2J"])
async def test_what_is_no_key_is_not_found(federation: Federation, name: str) -> None:
    gone = "NOT_FOUND API_KEY_NOT_FOUND"
    assert await refused(revoke(federation, name)) == gone
    assert await refused(rotate(federation, name)) == gone
    assert await refused(expire(federation, name, datetime.now(UTC))) == gone


# the last one


async def test_the_last_admin_key_can_neither_be_revoked_nor_expire(
    federation: Federation,
) -> None:
    await make(federation, "operator", pb.ROLE_OPERATOR)
    await make(federation, "for-a-day", ADMIN, ttl=span(days=1))
    stays = "FAILED_PRECONDITION LAST_ADMIN_KEY"
    assert await refused(revoke(federation, ENV)) == stays
    in_a_year = datetime.now(UTC) + timedelta(days=365)
    assert await refused(expire(federation, ENV, in_a_year)) == stays
    other = await make(federation, "boss", ADMIN)
    await revoke(federation, ENV)
    assert await refused(revoke(federation, "boss", other.secret)) == stays
    assert await tried(federation, other.secret) == "served"


async def test_the_last_of_keys_that_expire_can_be_put_off_and_not_cut_short(
    federation: Federation,
) -> None:
    now = datetime.now(UTC)
    await change(federation, ENV, expire_time=now + timedelta(days=1))
    stays = "FAILED_PRECONDITION LAST_ADMIN_KEY"
    assert await refused(expire(federation, ENV, now + timedelta(hours=1))) == stays
    await expire(federation, ENV, now + timedelta(days=2))
    assert await refused(revoke(federation, ENV)) == stays


async def test_two_admins_who_revoke_each_other_at_once_leave_one(federation: Federation) -> None:
    one = (await make(federation, "one", ADMIN)).secret
    two = (await make(federation, "two", ADMIN)).secret
    await revoke(federation, ENV, one)
    async with federation.app.database.begin() as connection:
        await access.lock_api_keys(connection)
        calls = [
            asyncio.create_task(revoke(federation, "two", one)),
            asyncio.create_task(revoke(federation, "one", two)),
        ]

        async def both_wait() -> bool:
            waiting = await connection.execute(
                text(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted"
                    " AND mode = 'ShareRowExclusiveLock' AND relation = 'api_keys'::regclass"
                )
            )
            return bool(waiting.scalar_one() == 2)

        await eventually(both_wait)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    faults = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert [info(fault).reason for fault in faults] == ["LAST_ADMIN_KEY"]
    assert sorted([await tried(federation, one), await tried(federation, two)]) == [
        "CREDENTIAL_INVALID",
        "served",
    ]


# streams


STREAMS = {
    rpc
    for rpc, method in RPCS.items()
    if method.server_streaming and METHODS[rpc] not in {Caller.ANYONE, Caller.NEURON}
}


async def opened(federation: Federation, rpc: str, secret: str) -> Any:
    """A stream of that RPC that waits for a command whose neuron is away."""
    name = rpc.rpartition("/")[2]
    spec = command_service_pb2.CommandSpec(neuron_id="n1", type="run")
    request: Any
    if name == "ExecuteCommand":
        request = command_service_pb2.ExecuteCommandRequest(command=spec)
    elif name == "WatchCommand":
        issued = await federation.command.IssueCommand(
            command_service_pb2.IssueCommandRequest(command=spec), metadata=federation.admin
        )
        request = command_service_pb2.WatchCommandRequest(command_id=issued.command.command_id)
    else:
        assert name == "WatchCommandBatch", f"{rpc} is new: say here how it is opened"
        batch = await federation.command.IssueCommandBatch(
            command_service_pb2.IssueCommandBatchRequest(
                filter='type = "worker"', command=command_service_pb2.CommandSpec(type="run")
            ),
            metadata=federation.admin,
        )
        request = command_service_pb2.WatchCommandBatchRequest(batch_id=batch.batch.batch_id)
    call = getattr(federation.command, name)(request, metadata=key_of(secret))
    async with asyncio.timeout(WITHIN_S):
        await call.read()
    return call


@pytest.mark.parametrize("rpc", sorted(STREAMS))
async def test_an_open_stream_ends_when_its_key_is_revoked(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    monkeypatch.setattr(auth, "API_KEY_CACHE_S", 0.2)
    await federation.register("n1")
    secret = (await make(federation, "ci", pb.ROLE_OPERATOR)).secret
    call = await opened(federation, rpc, secret)
    await revoke(federation, "ci")

    async def end() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WITHIN_S):
            await end()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert info(caught.value).reason == "CREDENTIAL_INVALID"


async def test_an_open_stream_ends_with_the_secret_that_opened_it_and_no_other(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "API_KEY_CACHE_S", 0.2)
    await federation.register("n1")
    old = (await make(federation, "ci", pb.ROLE_OPERATOR)).secret
    new = (await rotate(federation, "ci")).secret
    streams = [
        await opened(federation, "/federation.v1.CommandService/ExecuteCommand", secret)
        for secret in (old, new)
    ]
    await rotate(federation, "ci", span(seconds=30))
    async with federation.app.database.begin() as connection:
        await connection.execute(
            update(api_key_old_secrets)
            .where(api_key_old_secrets.c.secret_hash == secret_hash(old))
            .values(expire_time=func.now())
        )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WITHIN_S):
            await streams[0].read()
    assert info(caught.value).reason == "CREDENTIAL_EXPIRED"
    assert not streams[1].done()
    streams[1].cancel()
