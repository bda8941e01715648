"""Register by a neuron's own token, RefreshToken, Deregister, and who waits for whom."""

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
from sqlalchemy import text, update
from structlog.testing import capture_logs

from federation.v1 import neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.domain.neuron import Lifecycle
from federation_server.rpc import errors
from federation_server.store.database import Database
from federation_server.store.schema import (
    neurons,
)
from tests.support.federation import running
from tests.support.office import Office
from tests.support.waiting import eventually


@pytest_asyncio.fixture
async def office(database_url: str) -> AsyncIterator[Office]:
    database = Database(database_url)
    yield Office(database)
    await database.close()


# by the neuron's own token


async def test_a_neuron_renews_its_description_by_its_own_token(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token(), name="One")
    second = await office.register(own=first.token.token, name="Two", version="2")
    assert not second.created
    assert (second.neuron.description.name, second.neuron.description.version) == ("Two", "2")
    assert second.neuron.create_time == first.neuron.create_time
    assert second.neuron.update_time.ToNanoseconds() > first.neuron.update_time.ToNanoseconds()
    assert await office.identity(first.token.token) is not None
    assert await office.uses() == 1


async def test_an_unchanged_description_leaves_the_update_time(office: Office) -> None:
    described: dict[str, Any] = {
        "labels": {"a": "b"},
        "capabilities": ["c"],
        "max_concurrent_commands": 9,
    }
    first = await office.register(enrollment_token=await office.enrollment_token(), **described)
    second = await office.register(own=first.token.token, **described)
    assert second.neuron == first.neuron


async def test_what_an_admin_has_set_stays_and_the_rest_is_renewed(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    await office.change(
        name="Admin's",
        alert_thresholds={"heartbeat_timeout_s": 30.0},
        overridden_fields=["name", "alert_thresholds"],
    )
    second = await office.register(
        own=first.token.token,
        name="Neuron's",
        version="2",
        alert_thresholds=neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=7)),
    )
    assert second.neuron.description.name == "Admin's"
    assert second.neuron.description.version == "2"
    assert list(second.neuron.overridden_fields) == ["name", "alert_thresholds"]
    assert (await office.state())["heartbeat_timeout"] == timedelta(seconds=120)


async def test_a_new_heartbeat_timeout_reaches_the_sweepers_copy(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    await office.register(
        own=first.token.token,
        alert_thresholds=neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=7)),
    )
    assert (await office.state())["heartbeat_timeout"] == timedelta(seconds=7)


async def test_renewing_leaves_the_live_session_alone(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    opened = await office.open_session(first.token.token)
    assert opened is not None
    await office.register(own=first.token.token, name="Two")
    state = await office.state()
    assert (state["session_open"], state["session_epoch"]) == (True, opened.epoch)
    assert state["presence"] == "ONLINE"


async def test_an_own_token_that_is_no_longer_good_is_the_error(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    state = await office.state()
    old = office.tokens.issue(
        "n1", state["token_generation"], datetime.now(UTC) - timedelta(days=32)
    )
    assert await office.refused(own=old.token) == "CREDENTIAL_EXPIRED"
    assert await office.refused(own="eyJ.a.b") == "CREDENTIAL_INVALID"
    assert await office.refused("n2", own=first.token.token) == "NOT_THIS_NEURON"
    await office.change(token_generation=state["token_generation"] + 1)
    assert await office.refused(own=first.token.token) == "CREDENTIAL_INVALID"


async def test_an_own_token_that_is_not_good_does_not_stand_in_the_way_of_enrollment(
    office: Office,
) -> None:
    token = await office.enrollment_token()
    first = await office.register(enrollment_token=token)
    await office.delete()
    expired = office.tokens.issue("n1", 1, datetime.now(UTC) - timedelta(days=32)).token
    for number, own in enumerate((expired, "eyJ.a.b", "fak_key", first.token.token)):
        answer = await office.register(f"m{number}", own=own, enrollment_token=token)
        assert answer.created
    assert (await office.register(own=first.token.token, enrollment_token=token)).created


async def test_a_token_of_a_deleted_neuron_is_not_one_of_its_namesake(office: Office) -> None:
    token = await office.enrollment_token()
    first = await office.register(enrollment_token=token)
    await office.delete()
    second = await office.register(enrollment_token=token)
    assert await office.identity(first.token.token) is None
    assert await office.identity(second.token.token) is not None
    assert await office.refused(own=first.token.token) == "CREDENTIAL_INVALID"


@pytest.mark.parametrize(("days", "reason"), [(30, ""), (32, "CREDENTIAL_EXPIRED")])
async def test_an_expired_token_registers_its_neuron_for_a_month_and_does_nothing_else(
    office: Office, days: int, reason: str
) -> None:
    await office.register(enrollment_token=await office.enrollment_token())
    generation = (await office.state())["token_generation"]
    late = office.tokens.issue("n1", generation, datetime.now(UTC) - timedelta(days=days)).token
    with pytest.raises(errors.Refused, match="expired"):
        office.tokens.verify(late)
    if reason:
        assert await office.refused(own=late) == reason
    else:
        assert await office.identity((await office.register(own=late)).token.token)


# a neuron that is shut out


async def test_a_deactivated_neuron_registers_by_no_credential(office: Office) -> None:
    token = await office.enrollment_token(allow_reenrollment=True)
    first = await office.register(enrollment_token=token, request_id="r")
    await office.change(lifecycle=Lifecycle.DEACTIVATED)
    before = await office.state()
    assert await office.refused(own=first.token.token) == "NEURON_DEACTIVATED"
    assert await office.refused(enrollment_token=token) == "NEURON_DEACTIVATED"
    refused = await office.refused(enrollment_token=token, request_id="r")
    assert refused == "NEURON_DEACTIVATED"
    assert await office.state() == before
    assert await office.uses() == 1


# RefreshToken and Deregister


@pytest.mark.parametrize("by", ["Register", "Connect"])
async def test_a_token_is_good_until_the_one_behind_it_is_used(office: Office, by: str) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    answer = await office.registration.refresh_token(office.tokens.verify(first.token.token))
    old, new = first.token.token, answer.token.token
    assert await office.open_session(old) is not None
    assert await office.identity(new) is not None
    if by == "Register":
        await office.register(own=new)
    else:
        assert await office.open_session(new) is not None
    assert await office.identity(old) is None
    assert await office.open_session(old) is None
    assert await office.refused(own=old) == "CREDENTIAL_INVALID"
    with pytest.raises(errors.Refused, match="not valid"):
        await office.registration.refresh_token(office.tokens.verify(old))
    assert await office.open_session(new) is not None


async def test_a_register_by_the_own_token_gives_a_newer_one(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    second = await office.register(own=first.token.token)
    old, new = (office.tokens.verify(answer.token.token) for answer in (first, second))
    assert new.generation > old.generation
    assert await office.identity(first.token.token) is not None


async def test_tokens_that_nobody_has_used_yet_die_with_the_generation(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    unused = await office.registration.refresh_token(office.tokens.verify(first.token.token))
    await office.register(enrollment_token=await office.enrollment_token(allow_reenrollment=True))
    assert await office.identity(unused.token.token) is None
    assert await office.open_session(unused.token.token) is None


async def test_deregister_shuts_the_neuron_out_and_ends_its_session(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    opened = await office.open_session(first.token.token)
    assert opened is not None
    listener = await office.listener()
    neuron = office.tokens.verify(first.token.token)
    with capture_logs() as logs:
        await office.registration.deregister(neuron, pb.DeregisterRequest(reason="moved"))
    assert [line["action"] for line in logs] == ["neuron_deregistered"]
    state = await office.state()
    assert (state["lifecycle"], state["lifecycle_reason"]) == ("DEACTIVATED", "moved")
    assert (state["presence"], state["presence_reason"]) == ("OFFLINE", "moved")
    assert (state["session_open"], state["session_epoch"]) == (False, opened.epoch + 1)
    assert await office.identity(first.token.token) is None
    assert await office.hints(listener) == [f"end:DEACTIVATED:{opened.epoch + 1} n1"]
    await listener.close()


async def test_deregister_a_second_time_changes_nothing(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    neuron = office.tokens.verify(first.token.token)
    await office.registration.deregister(neuron, pb.DeregisterRequest(reason="first"))
    before = await office.state()
    await office.registration.deregister(neuron, pb.DeregisterRequest(reason="second"))
    assert await office.state() == before


async def test_deregister_does_nothing_for_a_token_that_was_revoked_meanwhile(
    office: Office,
) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    neuron = office.tokens.verify(first.token.token)
    await office.register(enrollment_token=await office.enrollment_token(allow_reenrollment=True))
    before = await office.state()
    with pytest.raises(errors.Refused, match="not valid"):
        await office.registration.deregister(neuron, pb.DeregisterRequest())
    assert await office.state() == before
    await office.delete()
    with pytest.raises(errors.Refused, match="not valid"):
        await office.registration.deregister(neuron, pb.DeregisterRequest())


# who comes second waits


async def waiting_for_a_lock(office: Office) -> bool:
    async with office.database.begin() as connection:
        waiters = await connection.execute(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )
        return bool(waiters.scalar_one())


@pytest.mark.parametrize("by", ["own", "enrollment_token"])
async def test_a_register_waits_for_who_is_deactivating_the_neuron(office: Office, by: str) -> None:
    token = await office.enrollment_token(allow_reenrollment=True)
    own = (await office.register(enrollment_token=token)).token.token
    credential = {by: {"own": own, "enrollment_token": token}[by]}
    async with asyncio.TaskGroup() as group, office.database.begin() as connection:
        await connection.execute(update(neurons).values(lifecycle=Lifecycle.DEACTIVATED))
        refused = group.create_task(office.refused(**credential))
        await eventually(lambda: waiting_for_a_lock(office))
    assert refused.result() == "NEURON_DEACTIVATED"


async def test_a_deregister_waits_for_who_is_re_enrolling_the_neuron(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    neuron = office.tokens.verify(first.token.token)
    async with office.database.begin() as connection:
        await connection.execute(update(neurons).values(token_generation=2**62))
        late = asyncio.create_task(office.registration.deregister(neuron, pb.DeregisterRequest()))
        await eventually(lambda: waiting_for_a_lock(office))
    with pytest.raises(errors.Refused, match="not valid"):
        await late
    assert (await office.state())["lifecycle"] == Lifecycle.ACTIVE


# beside the writer


async def test_register_does_not_wait_for_who_refers_to_the_neuron(office: Office) -> None:
    """The writer inserts rows that refer to neurons while it holds state rows."""
    first = await office.register(enrollment_token=await office.enrollment_token())
    async with await office.database.connect("test") as writer, writer.transaction():
        await writer.execute("SELECT FROM neurons WHERE neuron_id = 'n1' FOR KEY SHARE")
        async with asyncio.timeout(10):
            await office.register(own=first.token.token, name="Two")


# through gRPC


async def test_a_neurons_life_by_its_tokens_alone(database_url: str) -> None:
    async with running(database_url) as federation:
        token = await federation.register("n1")
        session = federation.session

        def shown(secret: str) -> tuple[tuple[str, str]]:
            return (("authorization", f"Bearer {secret}"),)

        refreshed = await session.RefreshToken(pb.RefreshTokenRequest(), metadata=shown(token))
        renewed = await session.Register(
            pb.RegisterRequest(
                description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker")
            ),
            metadata=shown(refreshed.token.token),
        )
        assert not renewed.created
        for secret in (renewed.token.token, refreshed.token.token, token):
            await session.Deregister(pb.DeregisterRequest(), metadata=shown(secret))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session.RefreshToken(pb.RefreshTokenRequest(), metadata=shown(secret))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session.Register(
                pb.RegisterRequest(
                    description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker")
                ),
                metadata=shown(token),
            )
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
