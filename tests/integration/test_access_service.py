"""AccessService over gRPC: enrollment tokens made, listed and revoked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from federation.v1 import access_service_pb2 as pb
from federation.v1 import neuron_pb2, session_service_pb2
from tests.support.federation import Federation, running
from tests.support.gate import info


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


async def make(federation: Federation, **wanted: Any) -> pb.CreateEnrollmentTokenResponse:
    request = pb.CreateEnrollmentTokenRequest(**wanted)
    return await federation.access.CreateEnrollmentToken(request, metadata=federation.admin)


async def test_a_repeated_create_shows_the_same_token_and_no_secret(federation: Federation) -> None:
    first = await make(federation, request_id="r", description="d", labels={"a": "1", "b": "2"})
    assert first.secret.startswith("fet_")
    assert first.enrollment_token.creator == "admin-env"
    token = first.enrollment_token
    assert token.expire_time.seconds - token.create_time.seconds == 24 * 3600
    second = await make(federation, request_id="r", description="d", labels={"b": "2", "a": "1"})
    assert second.secret == ""
    assert second.enrollment_token == first.enrollment_token


async def test_another_create_with_the_same_request_id_is_refused(federation: Federation) -> None:
    await make(federation, request_id="r", description="one")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await make(federation, request_id="r", description="two")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert info(caught.value).reason == "REQUEST_ID_REUSED"


async def test_tokens_are_listed_in_pages_without_their_secrets(federation: Federation) -> None:
    made = [(await make(federation, description=str(number))) for number in range(3)]
    request = pb.ListEnrollmentTokensRequest(page_size=2)
    first = await federation.access.ListEnrollmentTokens(request, metadata=federation.admin)
    request.page_token = first.next_page_token
    second = await federation.access.ListEnrollmentTokens(request, metadata=federation.admin)
    assert second.next_page_token == ""
    listed = [*first.enrollment_tokens, *second.enrollment_tokens]
    assert listed == [answer.enrollment_token for answer in reversed(made)]


async def test_a_foreign_page_token_is_refused(federation: Federation) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await federation.access.ListEnrollmentTokens(
            pb.ListEnrollmentTokensRequest(page_token="x"), metadata=federation.admin
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info(caught.value).reason == "PAGE_TOKEN_INVALID"


async def test_a_revoked_token_enrolls_nobody_and_stays_listed(federation: Federation) -> None:
    made = await make(federation)
    request = pb.RevokeEnrollmentTokenRequest(
        enrollment_token_id=made.enrollment_token.enrollment_token_id
    )
    first = await federation.access.RevokeEnrollmentToken(request, metadata=federation.admin)
    second = await federation.access.RevokeEnrollmentToken(request, metadata=federation.admin)
    assert first.enrollment_token.HasField("revoke_time")
    assert second == first
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await federation.session.Register(
            session_service_pb2.RegisterRequest(
                description=neuron_pb2.NeuronDescription(neuron_id="n1", type="worker"),
                enrollment_token=made.secret,
            )
        )
    assert info(caught.value).reason == "ENROLLMENT_REFUSED"


@pytest.mark.parametrize("name", ["nobody's", "00000000-0000-4000-8000-000000000000"])
async def test_revoking_what_is_no_token_is_not_found(federation: Federation, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await federation.access.RevokeEnrollmentToken(
            pb.RevokeEnrollmentTokenRequest(enrollment_token_id=name), metadata=federation.admin
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert info(caught.value).reason == "ENROLLMENT_TOKEN_NOT_FOUND"
