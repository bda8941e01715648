"""The audit log over gRPC: what was done, what was refused, and that it stays."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

import grpc
import grpc.aio
import orjson
import psycopg
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from psycopg import sql
from sqlalchemy import func

from federation.v1 import access_service_pb2 as pb
from federation.v1 import (
    command_service_pb2,
    fleet_service_pb2,
    neuron_pb2,
    session_service_pb2,
)
from federation_server.domain.access import Role, secret_hash
from federation_server.rpc import access, audit
from federation_server.rpc.audit import MUTATIONS
from federation_server.rpc.methods import DEREGISTER, REGISTER
from federation_server.store import partitions
from federation_server.store.audit import StoredEntry
from federation_server.store.schema import api_keys
from tests.support.federation import Federation, running
from tests.support.gate import bearer, info
from tests.support.postgres import Server, libpq
from tests.support.waiting import eventually

VIEWER = "fak_the-viewers-key"
GONE = "fak_the-key-that-has-expired"


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url, enrollment="approve") as federation:
        async with federation.app.database.begin() as connection:
            for name, secret, expires in (("viewer", VIEWER, None), ("gone", GONE, func.now())):
                await connection.execute(
                    api_keys.insert().values(
                        api_key_id=str(uuid.uuid4()),
                        name=name,
                        role=Role.VIEWER,
                        secret_hash=secret_hash(secret),
                        create_time=func.now(),
                        expire_time=expires,
                    )
                )
        yield federation


async def entries(federation: Federation, filter_text: str = "", **asked: Any) -> list[Any]:
    """The entries that match, oldest first."""
    request = pb.ListAuditEntriesRequest(filter=filter_text, order_by="entry_time", **asked)
    answer = await federation.access.ListAuditEntries(request, metadata=federation.admin)
    return list(answer.entries)


async def one(federation: Federation, filter_text: str) -> Any:
    """The only entry that matches, once it is there."""

    async def look() -> list[Any]:
        return await entries(federation, filter_text)

    (found,) = await eventually(look, describe=f"an entry with {filter_text}")
    return found


async def refused(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return info(caught.value).reason


def spec(**fields: Any) -> command_service_pb2.CommandSpec:
    return command_service_pb2.CommandSpec(**{"neuron_id": "n1", "type": "run", **fields})


async def issue(federation: Federation, **fields: Any) -> str:
    request = command_service_pb2.IssueCommandRequest(command=spec(**fields))
    answer = await federation.command.IssueCommand(request, metadata=federation.admin)
    return answer.command.command_id


async def issue_batch(federation: Federation) -> Any:
    request = command_service_pb2.IssueCommandBatchRequest(
        filter="type = worker", command=spec(neuron_id="")
    )
    return await federation.command.IssueCommandBatch(request, metadata=federation.admin)


# One way to succeed at each mutation, with a neuron "n1" that has registered with `token`.

Success: TypeAlias = Callable[[Federation, str], Awaitable[Any]]


async def register(federation: Federation, token: str) -> None:
    await federation.register("n2")


async def deregister(federation: Federation, token: str) -> None:
    request = session_service_pb2.DeregisterRequest()
    await federation.session.Deregister(request, metadata=bearer(token))


async def update(federation: Federation, token: str) -> None:
    request = fleet_service_pb2.UpdateNeuronRequest(
        neuron_id="n1",
        description=neuron_pb2.NeuronDescription(name="Ours"),
        update_mask=FieldMask(paths=["name"]),
    )
    await federation.fleet.UpdateNeuron(request, metadata=federation.admin)


async def deactivate(federation: Federation, token: str) -> None:
    request = fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n1", reason="it leaks")
    await federation.fleet.DeactivateNeuron(request, metadata=federation.admin)


async def activate(federation: Federation, token: str) -> None:
    await deactivate(federation, token)
    request = fleet_service_pb2.ActivateNeuronRequest(neuron_id="n1")
    await federation.fleet.ActivateNeuron(request, metadata=federation.admin)


async def delete(federation: Federation, token: str) -> None:
    request = fleet_service_pb2.DeleteNeuronRequest(neuron_id="n1")
    await federation.fleet.DeleteNeuron(request, metadata=federation.admin)


async def execute(federation: Federation, token: str) -> None:
    request = command_service_pb2.ExecuteCommandRequest(command=spec())
    call = federation.command.ExecuteCommand(request, metadata=federation.admin)
    await anext(aiter(call))
    call.cancel()


async def cancel(federation: Federation, token: str) -> str:
    command_id = await issue(federation)
    request = command_service_pb2.CancelCommandRequest(command_id=command_id, reason="enough")
    await federation.command.CancelCommand(request, metadata=federation.admin)
    return command_id


async def retry(federation: Federation, token: str) -> None:
    request = command_service_pb2.RetryCommandRequest(command_id=await cancel(federation, token))
    await federation.command.RetryCommand(request, metadata=federation.admin)


async def cancel_batch(federation: Federation, token: str) -> None:
    issued = await issue_batch(federation)
    request = command_service_pb2.CancelCommandBatchRequest(batch_id=issued.batch.batch_id)
    await federation.command.CancelCommandBatch(request, metadata=federation.admin)


async def create_token(federation: Federation, token: str) -> None:
    await federation.enrollment_token(description="the second")


async def revoke_token(federation: Federation, token: str) -> None:
    listed = await federation.access.ListEnrollmentTokens(
        pb.ListEnrollmentTokensRequest(), metadata=federation.admin
    )
    request = pb.RevokeEnrollmentTokenRequest(
        enrollment_token_id=listed.enrollment_tokens[0].enrollment_token_id
    )
    await federation.access.RevokeEnrollmentToken(request, metadata=federation.admin)


def joined(call: str, **fields: Any) -> Success:
    """A change of "n9", which waits for its approval."""

    async def change(federation: Federation, _: str) -> None:
        description = neuron_pb2.NeuronDescription(neuron_id="n9", type="worker")
        await federation.session.Register(
            session_service_pb2.RegisterRequest(description=description)
        )
        request = getattr(pb, f"{call}Request")(neuron_id="n9", **fields)
        await getattr(federation.access, call)(request, metadata=federation.admin)

    return change


async def revoke_tokens(federation: Federation, token: str) -> None:
    request = pb.RevokeNeuronTokensRequest(neuron_id="n1", reason="stolen")
    await federation.access.RevokeNeuronTokens(request, metadata=federation.admin)


async def create_key(federation: Federation, token: str) -> None:
    request = pb.CreateApiKeyRequest(name="ci", role=pb.ROLE_OPERATOR)
    await federation.access.CreateApiKey(request, metadata=federation.admin)


def key_changed(call: str, **fields: Any) -> Success:
    async def change(federation: Federation, token: str) -> None:
        await create_key(federation, token)
        request = getattr(pb, f"{call}Request")(name="ci", **fields)
        await getattr(federation.access, call)(request, metadata=federation.admin)

    return change


async def rotate_signing_key(federation: Federation, token: str) -> None:
    request = pb.RotateSigningKeyRequest()
    await federation.access.RotateSigningKey(request, metadata=federation.admin)


SUCCESSES: Mapping[str, Success] = {
    REGISTER: register,
    DEREGISTER: deregister,
    "/federation.v1.FleetService/UpdateNeuron": update,
    "/federation.v1.FleetService/DeactivateNeuron": deactivate,
    "/federation.v1.FleetService/ActivateNeuron": activate,
    "/federation.v1.FleetService/DeleteNeuron": delete,
    "/federation.v1.CommandService/IssueCommand": lambda federation, _: issue(federation),
    "/federation.v1.CommandService/ExecuteCommand": execute,
    "/federation.v1.CommandService/CancelCommand": cancel,
    "/federation.v1.CommandService/RetryCommand": retry,
    "/federation.v1.CommandService/IssueCommandBatch": lambda federation, _: issue_batch(
        federation
    ),
    "/federation.v1.CommandService/CancelCommandBatch": cancel_batch,
    "/federation.v1.AccessService/CreateEnrollmentToken": create_token,
    "/federation.v1.AccessService/RevokeEnrollmentToken": revoke_token,
    "/federation.v1.AccessService/ApproveNeuron": joined("ApproveNeuron"),
    "/federation.v1.AccessService/RejectNeuron": joined("RejectNeuron", reason="not ours"),
    "/federation.v1.AccessService/RevokeNeuronTokens": revoke_tokens,
    "/federation.v1.AccessService/CreateApiKey": create_key,
    "/federation.v1.AccessService/RotateApiKey": key_changed(
        "RotateApiKey", overlap=Duration(seconds=0)
    ),
    "/federation.v1.AccessService/ExpireApiKey": key_changed(
        "ExpireApiKey", expire_time=Timestamp(seconds=4_000_000_000)
    ),
    "/federation.v1.AccessService/RevokeApiKey": key_changed("RevokeApiKey"),
    "/federation.v1.AccessService/RotateSigningKey": rotate_signing_key,
}


@pytest.mark.parametrize("method", MUTATIONS)
async def test_each_mutation_has_an_entry_when_it_succeeds_and_when_it_is_refused(
    federation: Federation, method: str
) -> None:
    token = await federation.register("n1")
    seen = len(await entries(federation, f'method = "{method}"'))
    await SUCCESSES[method](federation, token)
    done = (await entries(federation, f'method = "{method}"'))[seen:]
    assert [each.outcome for each in done] == ["OK"]
    (entry,) = done
    assert entry.object_type == MUTATIONS[method].object_type
    assert entry.object_id
    assert entry.HasField("before") or entry.HasField("after")
    assert (entry.peer, entry.server_id) == ("127.0.0.1", federation.app.server_id)
    assert str(uuid.UUID(entry.call_id)) == entry.call_id
    if method in {REGISTER, DEREGISTER}:
        assert entry.actor in {"neuron:n1", "neuron:n2"}
    else:
        assert (entry.actor, entry.role) == ("admin:admin-env", "ADMIN")
        assert entry.api_key_id

    streams = method.endswith("/ExecuteCommand")
    kind: Any = federation.channel.unary_stream if streams else federation.channel.unary_unary
    call = kind(method)(b"", metadata=() if method == REGISTER else bearer(VIEWER))
    await refused(anext(aiter(call)) if streams else call)
    for name in (method, method.rpartition("/")[2], f"*{method[-9:]}"):
        entry = await one(federation, f'method = "{name}" AND outcome != OK')
        assert entry.method == method
    assert entry.actor == ("stranger" if method == REGISTER else "admin:viewer")
    wanted = "INVALID_FIELD" if method == REGISTER else "ROLE_TOO_LOW"
    assert entry.reason == wanted


async def test_what_cannot_be_entered_is_not_done(federation: Federation) -> None:
    token = await federation.register("n1")
    secret = await federation.enrollment_token()
    newcomer = session_service_pb2.RegisterRequest(
        description=neuron_pb2.NeuronDescription(neuron_id="n2", type="worker"),
        enrollment_token=secret,
    )
    async with await federation.app.database.connect("test") as connection:
        await connection.execute(
            b"ALTER TABLE audit_entries ADD CONSTRAINT full_disk CHECK (false) NOT VALID"
        )
        calls = (
            deactivate(federation, token),
            issue(federation),
            issue_batch(federation),
            federation.session.Register(newcomer),
        )
        assert [await refused(call) for call in calls] == ["INTERNAL"] * len(calls)
        counts = []
        for table in (b"commands", b"command_batches", b"neurons"):
            cursor = await connection.execute(b"SELECT count(*) FROM " + table)
            counts += await cursor.fetchall()
        assert counts == [(0,), (0,), (1,)]
        cursor = await connection.execute(b"SELECT lifecycle::text FROM neurons")
        assert await cursor.fetchall() == [("ACTIVE",)]
        await connection.execute(b"ALTER TABLE audit_entries DROP CONSTRAINT full_disk")
    await issue(federation)


# What an entry says


async def test_an_update_is_told_by_the_fields_that_differ(federation: Federation) -> None:
    token = await federation.register("n1", labels={"zone": "eu"})
    await update(federation, token)
    entry = await one(federation, 'method = "*/UpdateNeuron"')
    assert MessageToDict(entry.before) == {"name": "n1", "overridden_fields": []}
    assert MessageToDict(entry.after) == {"name": "Ours", "overridden_fields": ["name"]}
    assert (entry.object_type, entry.object_id, entry.neuron_id) == ("neuron", "n1", "n1")


@pytest.mark.parametrize("shown", ["db_password", "notes"])
async def test_a_change_of_what_the_log_does_not_show_has_an_entry(
    federation: Federation, shown: str
) -> None:
    """A secret, and a value too large: they look the same before and after."""
    await federation.register("n1")
    for letter in "abb":
        request = fleet_service_pb2.UpdateNeuronRequest(
            neuron_id="n1", update_mask=FieldMask(paths=["metadata"])
        )
        request.description.metadata.update({shown: letter * 3000})
        await federation.fleet.UpdateNeuron(request, metadata=federation.admin)
    _, second = await entries(federation, 'method = "*/UpdateNeuron"')
    assert second.before == second.after
    assert "metadata" in second.after


async def test_what_changes_nothing_has_no_entry(federation: Federation) -> None:
    token = await federation.register("n1")
    for _ in range(2):
        await update(federation, token)
        await deactivate(federation, token)
        await revoke_token(federation, token)
        await federation.enrollment_token(request_id="r")
    repeated = command_service_pb2.IssueCommandRequest(command=spec(), request_id="once")
    request = fleet_service_pb2.ActivateNeuronRequest(neuron_id="n1")
    await federation.fleet.ActivateNeuron(request, metadata=federation.admin)
    await federation.command.IssueCommand(repeated, metadata=federation.admin)
    await federation.command.IssueCommand(repeated, metadata=federation.admin)
    repeated.dry_run = True
    repeated.request_id = ""
    await federation.command.IssueCommand(repeated, metadata=federation.admin)
    found = [
        (entry.method.rpartition("/")[2], entry.request_id) for entry in await entries(federation)
    ]
    assert found == [
        ("CreateEnrollmentToken", ""),
        ("Register", ""),
        ("UpdateNeuron", ""),
        ("DeactivateNeuron", ""),
        ("RevokeEnrollmentToken", ""),
        ("CreateEnrollmentToken", "r"),
        ("RevokeEnrollmentToken", ""),
        ("ActivateNeuron", ""),
        ("IssueCommand", "once"),
    ]


async def test_of_commands_with_one_request_id_at_once_one_has_an_entry(
    federation: Federation,
) -> None:
    await federation.register("n1")
    request = command_service_pb2.IssueCommandRequest(command=spec(), request_id="once")
    answers = await asyncio.gather(
        *(federation.command.IssueCommand(request, metadata=federation.admin) for _ in range(20))
    )
    (command_id,) = {answer.command.command_id for answer in answers}
    entry = await one(federation, 'method = "*/IssueCommand"')
    assert (entry.object_id, entry.neuron_id) == (command_id, "n1")
    assert MessageToDict(entry.after) == {"type": "run", "data": {}}


async def test_a_batch_is_one_entry_with_its_counts(federation: Federation) -> None:
    for name in ("n1", "n2", "n3"):
        await federation.register(name)
    await federation.register("n4", command_types=[])
    issued = await issue_batch(federation)
    entry = await one(federation, "object_type = command_batch")
    assert entry.object_id == issued.batch.batch_id
    after = MessageToDict(entry.after)
    assert (after["commands"], after["skipped"], after["filter"]) == (3, 1, "type = worker")
    assert not await entries(federation, "object_type = command")


async def test_a_cancel_tells_the_state_before_and_after(federation: Federation) -> None:
    await federation.register("n1")
    command_id = await cancel(federation, "")
    entry = await one(federation, 'method = "*/CancelCommand"')
    assert (entry.object_id, entry.neuron_id) == (command_id, "n1")
    assert MessageToDict(entry.before)["state"] == "QUEUED"
    assert MessageToDict(entry.after) == {"state": "CANCELLED", "reason": "enough"}


async def test_a_registration_says_how(federation: Federation) -> None:
    secret = await federation.enrollment_token(allow_reenrollment=True)
    request = session_service_pb2.RegisterRequest(
        description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker"),
        enrollment_token=secret,
    )
    made = await federation.session.Register(request)
    request.description.version = "2"
    await federation.session.Register(request, metadata=bearer(made.token.token))
    request.request_id = "again"
    await federation.session.Register(request)
    await federation.session.Register(request)
    found = await entries(federation, 'neuron_id = "n1"')
    assert [MessageToDict(entry.after)["how"] for entry in found] == [
        "created",
        "renewed",
        "re-enrolled",
        "repeated",
    ]
    assert MessageToDict(found[1].after) == {"version": "2", "how": "renewed"}
    assert {entry.actor for entry in found} == {"neuron:n1"}
    assert found[3].request_id == "again"


async def test_no_secret_gets_into_the_log_and_nothing_large(federation: Federation) -> None:
    token = await federation.register("n1", metadata={"db_password": "hunter2", "dsn": "x"})
    data = Struct()
    data.update({"api_key": "hunter2", "note": f"use {VIEWER} there", "rows": ["r" * 9] * 400})
    await issue(federation, data=data)
    await refused(
        federation.fleet.GetNeuron(
            fleet_service_pb2.GetNeuronRequest(), metadata=bearer("fak_hunter2-hunter2")
        )
    )
    await refused(federation.fleet.GetNeuron(fleet_service_pb2.GetNeuronRequest(), metadata=()))
    await one(federation, "reason = CREDENTIAL_INVALID")
    async with federation.app.database.begin() as connection:
        rows = await connection.exec_driver_sql("SELECT to_jsonb(e)::text FROM audit_entries e")
        text = "".join(rows.scalars())
    for secret in ("hunter2", token, VIEWER, "fet_", "rrrrrrrrr"):
        assert secret not in text
    entry = await one(federation, "object_type = command")
    after = MessageToDict(entry.after)
    assert after["data"]["omitted_bytes"] > 4000


# Refusals


async def test_a_flood_of_failed_authentications_is_one_entry_and_a_number(
    federation: Federation,
) -> None:
    request = fleet_service_pb2.GetNeuronRequest()
    for number in range(50):
        await refused(federation.fleet.GetNeuron(request, metadata=bearer(f"fak_{number}")))
        await refused(federation.command.GetCommand(request, metadata=bearer("fak_x")))  # type: ignore[arg-type]
    first = await one(federation, "reason = CREDENTIAL_INVALID")
    await federation.app.refusals.finish()
    found = await entries(federation, "reason = CREDENTIAL_INVALID")
    assert len(found) <= 2
    assert sum(entry.count for entry in found) == 100
    assert found[0] == first
    assert {(entry.outcome, entry.actor, entry.peer) for entry in found} == {
        ("UNAUTHENTICATED", "stranger", "127.0.0.1")
    }
    assert found[-1].method == ""


async def test_an_expired_key_is_named(federation: Federation) -> None:
    request = fleet_service_pb2.GetNeuronRequest()
    await refused(federation.fleet.GetNeuron(request, metadata=bearer(GONE)))
    entry = await one(federation, "reason = CREDENTIAL_EXPIRED")
    assert (entry.actor, entry.method) == ("admin:gone", "/federation.v1.FleetService/GetNeuron")


async def test_a_reason_that_is_asked_for_as_an_outcome_is_refused_and_not_found_never(
    federation: Federation,
) -> None:
    asked = pb.ListAuditEntriesRequest(filter="outcome = CREDENTIAL_INVALID")
    call = federation.access.ListAuditEntries(asked, metadata=federation.admin)
    with pytest.raises(grpc.aio.AioRpcError, match=r"one of OK, .* UNAUTHENTICATED, not"):
        await call


async def test_a_refused_mutation_says_of_which_object(federation: Federation) -> None:
    request = fleet_service_pb2.DeleteNeuronRequest(neuron_id="no\0body")
    await refused(federation.fleet.DeleteNeuron(request, metadata=federation.admin))
    order = command_service_pb2.IssueCommandRequest(command=spec(type="?"), request_id="r7")
    await refused(federation.command.IssueCommand(order, metadata=federation.admin))
    entry = await one(federation, 'method = "*/DeleteNeuron"')
    assert (entry.outcome, entry.object_id) == ("INVALID_ARGUMENT", "nobody")
    entry = await one(federation, 'method = "*/IssueCommand"')
    assert (entry.outcome, entry.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert (entry.object_type, entry.neuron_id, entry.request_id) == ("command", "n1", "r7")


async def test_a_secret_in_the_place_of_a_name_is_not_in_the_log(federation: Federation) -> None:
    request = pb.RevokeApiKeyRequest(name=VIEWER)
    call = federation.access.RevokeApiKey(request, metadata=federation.admin)
    assert await refused(call) == "API_KEY_NOT_FOUND"
    entry = await one(federation, 'method = "*/RevokeApiKey"')
    assert entry.object_id == "[redacted]"


async def test_reading_that_is_refused_for_its_form_has_no_entry(federation: Federation) -> None:
    request = fleet_service_pb2.GetNeuronRequest(neuron_id="nobody")
    await refused(federation.fleet.GetNeuron(request, metadata=federation.admin))
    await federation.app.refusals.finish()
    assert await entries(federation) == []


async def test_what_was_refused_while_postgresql_was_away_is_written_later(
    federation: Federation, postgres: Server
) -> None:
    name = str(federation.app.database.url.database)
    database = sql.Identifier(name)
    with psycopg.connect(libpq(postgres.admin), autocommit=True) as admin:
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(database))
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )
        request = fleet_service_pb2.GetNeuronRequest()
        for _ in range(3):
            await refused(federation.fleet.GetNeuron(request, metadata=()))
        await federation.app.refusals.finish()  # which cannot
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(database))

    async def counted() -> bool:
        try:
            found = await entries(federation, "reason = CREDENTIAL_MISSING")
        except grpc.aio.AioRpcError:
            return False
        return bool(sum(entry.count for entry in found) == 3)

    await eventually(counted, within=20, describe="all three in the log")


# It stays


@pytest.mark.parametrize(
    "statement", ["UPDATE {} SET actor = 'x'", "DELETE FROM {}", "TRUNCATE {}"]
)
@pytest.mark.parametrize("of_a_partition", [False, True])
async def test_no_entry_can_be_changed_or_removed(
    federation: Federation, statement: str, of_a_partition: bool
) -> None:
    await federation.enrollment_token()
    async with await federation.app.database.connect("test") as connection:
        day = partitions.first_day("audit_entries", await partitions.today(connection))
        table = f"audit_entries_{day:%Y%m%d}" if of_a_partition else "audit_entries"
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            await connection.execute(statement.format(table).encode())
    assert len(await entries(federation)) == 1


async def test_pages_hold_each_entry_once_in_both_orders(federation: Federation) -> None:
    for number in range(7):
        await federation.enrollment_token(description=str(number))
    for order_by, wanted in (("", [6, 5, 4, 3, 2, 1, 0]), ("entry_time", list(range(7)))):
        request = pb.ListAuditEntriesRequest(page_size=3, order_by=order_by)
        found: list[int] = []
        while not found or request.page_token:
            answer = await federation.access.ListAuditEntries(request, metadata=federation.admin)
            found += [int(MessageToDict(e.after)["description"]) for e in answer.entries]
            request.page_token = answer.next_page_token
        assert found == wanted


@pytest.mark.parametrize(
    ("call", "asked", "values"),
    [
        ("ListAuditEntries", ["audit_entries", "", ""], ["2026-11-01T00:00:00Z", 2**63]),
        ("ListApiKeys", ["api_keys"], ["2026-11-01T00:00:00Z", "a\0b"]),
    ],
)
async def test_a_page_token_made_by_hand_of_what_no_row_can_hold_is_refused(
    federation: Federation, call: str, asked: list[str], values: list[Any]
) -> None:
    """The digest in a token is no signature."""
    digest = hashlib.sha256(orjson.dumps([asked, values])).hexdigest()[:16]
    token = base64.urlsafe_b64encode(orjson.dumps([digest, *values])).decode().rstrip("=")
    request = getattr(pb, f"{call}Request")(page_token=token)
    listing = getattr(federation.access, call)(request, metadata=federation.admin)
    assert await refused(listing) == "PAGE_TOKEN_INVALID"


async def test_others_have_their_turn_after_each_entry_of_a_page(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bound of a value is room for a thousand numbers, each a message in the answer."""
    for number in range(9):
        await federation.enrollment_token(description=str(number))
    turns, began = 0, []

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def noted(stored: StoredEntry) -> pb.AuditEntry:
        began.append(turns)
        return audit.to_message(stored)

    monkeypatch.setattr(access, "audit", SimpleNamespace(to_message=noted))
    waiting = asyncio.create_task(others())
    found = await entries(federation)
    waiting.cancel()
    assert len(found) == len(set(began)) == 9


async def test_an_order_that_there_is_not_is_refused(federation: Federation) -> None:
    request = pb.ListAuditEntriesRequest(order_by="actor")
    call = federation.access.ListAuditEntries(request, metadata=federation.admin)
    assert await refused(call) == "INVALID_FIELD"
