"""Who may join without a credential, who waits for an approval, and whose tokens are revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from federation.v1 import access_service_pb2, fleet_service_pb2, heartbeat_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.app import App, StartError
from federation_server.live import approvals
from federation_server.live.notifier import Notifier
from federation_server.rpc import auth, errors, pull, registration, stream
from federation_server.rpc.standing import turned_away
from federation_server.settings import Settings
from federation_server.store import applications
from federation_server.store.database import Database
from neuron_sdk import Neuron, NeuronConfig
from tests.support.calls import online, shown
from tests.support.federation import BareNeuron, Federation, connected, running
from tests.support.servers import refusal
from tests.support.waiting import eventually

PENDING = neuron_pb2.LIFECYCLE_PENDING
ACTIVE = neuron_pb2.LIFECYCLE_ACTIVE
DEACTIVATED = neuron_pb2.LIFECYCLE_DEACTIVATED
REQUEST_ID = "a-request-id-nobody-guesses"
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approvals, "INTERVAL_S", 0.05)


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url, enrollment="approve") as federation:
        yield federation


async def join(
    federation: Federation, neuron_id: str = "n", request_id: str = "", own: str | None = None
) -> pb.RegisterResponse:
    description = neuron_pb2.NeuronDescription(neuron_id=neuron_id, type="worker")
    request = pb.RegisterRequest(description=description, request_id=request_id)
    return await federation.session.Register(request, metadata=bearer(own) if own else None)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def approve(federation: Federation, **request: Any) -> neuron_pb2.Neuron:
    answer = await federation.access.ApproveNeuron(
        access_service_pb2.ApproveNeuronRequest(neuron_id="n", **request),
        metadata=federation.admin,
    )
    return answer.neuron


async def reject(federation: Federation, reason: str = "") -> neuron_pb2.Neuron:
    answer = await federation.access.RejectNeuron(
        access_service_pb2.RejectNeuronRequest(neuron_id="n", reason=reason),
        metadata=federation.admin,
    )
    return answer.neuron


async def waiting(federation: Federation, token: str) -> BareNeuron:
    """A stream that has said Hello and waits."""
    neuron = BareNeuron(federation, token)
    await neuron.greet()
    await eventually(
        lambda: len(federation.app.approvals._waiting) > 0, describe="the stream waits"
    )
    return neuron


async def test_a_stranger_waits_on_its_stream_until_an_admin_approves_it(
    federation: Federation,
) -> None:
    joined = await join(federation)
    assert (joined.neuron.lifecycle, joined.created) == (PENDING, True)
    neuron = await waiting(federation, joined.token.token)
    assert (await shown(federation, "n")).presence == neuron_pb2.PRESENCE_OFFLINE
    approved = await approve(federation, approval_code=joined.neuron.approval_code)
    assert (approved.lifecycle, approved.approval_code) == (ACTIVE, "")
    assert (await neuron.receive()).HasField("welcome")
    assert (await approve(federation)).lifecycle == ACTIVE  # a second time changes nothing
    neuron.call.cancel()


async def test_a_neuron_that_is_approved_while_it_is_being_turned_away_is_let_in(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def approved_meanwhile(*of: Any) -> errors.Refused | None:
        await approve(federation)
        return await turned_away(*of)

    monkeypatch.setattr(stream, "turned_away", approved_meanwhile)
    neuron = BareNeuron(federation, (await join(federation)).token.token)
    await neuron.hello()
    neuron.call.cancel()


async def test_a_pull_during_which_the_neuron_is_approved_is_to_be_made_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def let_in(*of: Any) -> None:
        """As the gate, had it been asked a moment later."""

    async def approved_meanwhile(*of: Any) -> errors.Refused | None:
        await approve(federation)
        return await turned_away(*of)

    monkeypatch.setattr(auth.Authentication, "_check_standing", let_in)
    monkeypatch.setattr(pull, "turned_away", approved_meanwhile)
    metadata = bearer((await join(federation)).token.token)
    request = pb.PullCommandsRequest(instance_id="i")
    refused = await refusal(federation.session.PullCommands(request, metadata=metadata))
    assert refused[:2] == (grpc.StatusCode.ABORTED, "CONFLICT")
    assert (await federation.session.PullCommands(request, metadata=metadata)).epoch


async def test_a_stranger_that_is_rejected_is_shut_out_with_its_token(
    federation: Federation,
) -> None:
    joined = await join(federation)
    neuron = await waiting(federation, joined.token.token)
    rejected = await reject(federation, "not one of ours")
    assert (rejected.lifecycle, rejected.lifecycle_reason) == (DEACTIVATED, "not one of ours")
    assert (await neuron.end())[0] is PRECONDITION
    assert (await reject(federation)).lifecycle_reason == "not one of ours"
    await federation.fleet.ActivateNeuron(
        fleet_service_pb2.ActivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    refused = await refusal(join(federation, own=joined.token.token))
    assert refused[1] == "CREDENTIAL_INVALID"


async def test_the_code_that_the_neuron_logs_is_the_one_that_the_admin_sees(
    federation: Federation,
) -> None:
    joined = await join(federation)
    code = joined.neuron.approval_code
    assert (await shown(federation, "n")).approval_code == code
    refused = await refusal(approve(federation, approval_code="AAAA-AAAA"))
    assert refused[:2] == (PRECONDITION, "NEURON_NOT_PENDING")
    said = code.replace("-", "").lower()
    assert (await approve(federation, approval_code=said)).lifecycle == ACTIVE


async def test_who_waits_for_approval_may_do_nothing_else(federation: Federation) -> None:
    token = (await join(federation)).token.token
    request = pb.SendHeartbeatRequest(heartbeat=heartbeat_pb2.Heartbeat(), instance_id="i")
    for call in (
        federation.session.SendHeartbeat(request, metadata=bearer(token)),
        federation.session.RefreshToken(pb.RefreshTokenRequest(), metadata=bearer(token)),
        federation.session.PullCommands(
            pb.PullCommandsRequest(instance_id="i"), metadata=bearer(token)
        ),
        # It would leave the id taken for ever, and free the place for another one: without end.
        federation.session.Deregister(pb.DeregisterRequest(), metadata=bearer(token)),
    ):
        assert (await refusal(call))[:2] == (PRECONDITION, "NEURON_PENDING")


@pytest.mark.parametrize("call", ["ActivateNeuron", "DeactivateNeuron"])
async def test_activating_and_deactivating_are_no_way_around_an_approval(
    federation: Federation, call: str
) -> None:
    await join(federation)
    request = getattr(fleet_service_pb2, f"{call}Request")(neuron_id="n")
    refused = await refusal(getattr(federation.fleet, call)(request, metadata=federation.admin))
    assert refused[:2] == (PRECONDITION, "NEURON_PENDING")
    assert (await shown(federation, "n")).lifecycle == PENDING


async def test_an_id_that_exists_is_nobodys_but_its_own(federation: Federation) -> None:
    joined = await join(federation, request_id=REQUEST_ID)
    for request_id in ("", "another-request-id"):
        refused = await refusal(join(federation, request_id=request_id))
        assert refused[:2] == (grpc.StatusCode.ALREADY_EXISTS, "NEURON_EXISTS")
    assert (await join(federation, own=joined.token.token)).neuron.lifecycle == PENDING


async def test_a_repeated_call_of_a_stranger_gets_the_same_neuron_until_it_has_gone_on(
    federation: Federation,
) -> None:
    first = await join(federation, request_id=REQUEST_ID)
    again = await join(federation, request_id=REQUEST_ID)
    assert again.neuron.create_time == first.neuron.create_time
    renewed = await join(federation, own=again.token.token)
    await join(federation, own=renewed.token.token)
    assert (await refusal(join(federation, request_id=REQUEST_ID)))[1] == "NEURON_EXISTS"


async def test_a_request_id_that_stands_for_a_credential_is_not_in_the_audit_log(
    federation: Federation,
) -> None:
    await join(federation, request_id=REQUEST_ID)
    await join(federation, request_id=REQUEST_ID)
    await refusal(join(federation, request_id=f"another-{REQUEST_ID}"))

    async def entries() -> list[access_service_pb2.AuditEntry]:
        answer = await federation.access.ListAuditEntries(
            access_service_pb2.ListAuditEntriesRequest(), metadata=federation.admin
        )
        found = list(answer.entries)
        return found if any(entry.reason == "NEURON_EXISTS" for entry in found) else []

    found = await eventually(entries, describe="the refused one is there too")
    assert REQUEST_ID not in str(found)


async def test_a_request_id_that_could_be_guessed_is_no_proof(federation: Federation) -> None:
    short = "r" * (applications.SECRET_LENGTH - 1)
    await join(federation, request_id=short)
    assert (await refusal(join(federation, request_id=short)))[1] == "NEURON_EXISTS"


async def test_only_so_many_may_wait(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "MOST_PENDING", 2)
    for number in range(2):
        await join(federation, f"n{number}")
    refused = await refusal(join(federation, "n2"))
    assert refused[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
    assert await federation.register("enrolled")  # who has a token does not wait


async def test_more_streams_than_may_wait_are_told_to_come_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "MOST_WAITING", 1)
    first = await waiting(federation, (await join(federation)).token.token)
    second = BareNeuron(federation, (await join(federation, "m")).token.token)
    await second.greet()
    assert (await second.end())[0] is PRECONDITION
    first.call.cancel()
    await eventually(lambda: not federation.app.approvals._waiting, describe="it has gone")


async def test_of_the_streams_of_a_neuron_the_newest_waits_and_takes_one_place(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "MOST_WAITING", 2)
    token = (await join(federation)).token.token
    older = await waiting(federation, token)
    for _ in range(3):
        newer = BareNeuron(federation, token)
        await newer.greet()
        assert (await older.end())[0] is grpc.StatusCode.ABORTED
        older = newer
    other = BareNeuron(federation, (await join(federation, "m")).token.token)
    await other.greet()
    await eventually(
        lambda: len(federation.app.approvals._waiting) == 2, describe="both neurons wait"
    )
    await approve(federation)
    assert (await older.receive()).HasField("welcome")
    older.call.cancel()
    other.call.cancel()


async def test_revoked_tokens_end_a_stream_that_waits(federation: Federation) -> None:
    neuron = await waiting(federation, (await join(federation)).token.token)
    await federation.access.RevokeNeuronTokens(
        access_service_pb2.RevokeNeuronTokensRequest(neuron_id="n"), metadata=federation.admin
    )
    async with asyncio.timeout(5):
        assert (await neuron.end())[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await shown(federation, "n")).lifecycle == PENDING


async def test_a_server_that_stops_sends_away_who_waits(database_url: str) -> None:
    async with running(database_url, enrollment="approve", drain_timeout="PT30S") as federation:
        neuron = await waiting(federation, (await join(federation)).token.token)
        async with asyncio.timeout(10):
            await federation.app.drain()
        assert (await neuron.end())[0] is PRECONDITION


async def test_who_nobody_approves_is_forgotten(federation: Federation) -> None:
    await join(federation)
    await federation.register("active")
    async with await federation.app.database.connect("test") as connection:
        assert await applications.forget(connection, timedelta(hours=1)) == []
        await connection.execute("UPDATE neurons SET create_time = now() - interval '2 h'")
        assert await applications.forget(connection, timedelta(hours=1)) == ["n"]


async def test_with_open_enrollment_anybody_joins_and_takes_over_nobody(
    database_url: str,
) -> None:
    async with running(database_url, enrollment="open") as federation:
        joined = await join(federation)
        assert joined.neuron.lifecycle == ACTIVE
        neuron = BareNeuron(federation, joined.token.token)
        await neuron.hello()
        assert (await refusal(join(federation)))[1] == "NEURON_EXISTS"
        neuron.call.cancel()


async def test_without_saying_so_a_server_takes_in_nobody_without_a_token(
    database_url: str,
) -> None:
    async with running(database_url) as federation:
        refused = await refusal(join(federation))
        assert refused[:2] == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING")


async def test_open_enrollment_beyond_loopback_has_to_be_said_aloud(database_url: str) -> None:
    settings = Settings(enrollment="open", host="0.0.0.0", insecure=True, port=0, metrics_port=0)
    database = Database(database_url)
    with pytest.raises(StartError, match="FEDERATION_OPEN_TO_ANYONE"):
        async with App(settings, database).running():
            raise AssertionError("it serves")
    await database.close()


async def test_revoked_tokens_end_the_stream_on_another_server_and_every_call(
    database_url: str,
) -> None:
    async with running(database_url) as here, running(database_url) as there:
        async with connected(there, "n") as neuron:
            unused = await here.register("m")
            await here.access.RevokeNeuronTokens(
                access_service_pb2.RevokeNeuronTokensRequest(neuron_id="n", reason="stolen"),
                metadata=here.admin,
            )
            async with asyncio.timeout(5):
                code, _ = await neuron.end()
            assert code is grpc.StatusCode.UNAUTHENTICATED
            after = await shown(here, "n")
            assert (after.presence, after.presence_reason) == (
                neuron_pb2.PRESENCE_OFFLINE,
                "stolen",
            )
        await here.session.RefreshToken(pb.RefreshTokenRequest(), metadata=bearer(unused))


@pytest.mark.parametrize("by", ["a stream", "a process", "an admin"])
async def test_a_stream_whose_end_is_not_hinted_at_is_told_the_same_reason(
    database_url: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(Notifier, "_take", lambda notifier, payload: None)
    async with running(database_url) as here, running(database_url) as there:
        token = await there.register("n")
        neuron, other = BareNeuron(there, token), BareNeuron(here, token)
        await neuron.hello()
        if by == "a stream":
            await other.hello()
        elif by == "a process":
            await here.session.PullCommands(
                pb.PullCommandsRequest(instance_id="i"), metadata=bearer(token)
            )
        else:
            await here.access.RevokeNeuronTokens(
                access_service_pb2.RevokeNeuronTokensRequest(neuron_id="n"), metadata=here.admin
            )
        async with asyncio.timeout(5):
            code, _ = await neuron.end()
        revoked, superseded = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.ABORTED
        assert code is (revoked if by == "an admin" else superseded)
        other.call.cancel()


async def test_a_neuron_whose_tokens_were_revoked_comes_back_only_by_re_enrollment(
    database_url: str,
) -> None:
    async with running(database_url) as federation:
        token = await federation.register("n")
        await federation.access.RevokeNeuronTokens(
            access_service_pb2.RevokeNeuronTokensRequest(neuron_id="n"), metadata=federation.admin
        )
        assert (await refusal(join(federation, own=token)))[1] == "CREDENTIAL_INVALID"
        description = neuron_pb2.NeuronDescription(neuron_id="n", type="worker")
        for allowed in (False, True):
            secret = await federation.enrollment_token(allow_reenrollment=allowed)
            request = pb.RegisterRequest(description=description, enrollment_token=secret)
            if allowed:
                assert (await federation.session.Register(request)).token.token
            else:
                refused = await refusal(federation.session.Register(request))
                assert refused[1] == "NEURON_EXISTS"


async def test_a_neuron_of_the_sdk_waits_for_its_approval_and_goes_on(
    federation: Federation, tmp_path: Path
) -> None:
    config = NeuronConfig(
        state_dir=tmp_path / "state", federation_url=federation.address, metrics_enabled=False
    )
    neuron = Neuron("n", type="worker", config=config)
    starting = asyncio.create_task(asyncio.to_thread(neuron.start))
    await eventually(lambda: len(federation.app.approvals._waiting) > 0, describe="it waits")
    seen = await shown(federation, "n")
    await approve(federation, approval_code=seen.approval_code)
    await online(federation, "n")
    await starting
    await asyncio.to_thread(neuron.stop)
