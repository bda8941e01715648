"""Tokens are rotated over the stream; the one before is good until the new one is used."""

from __future__ import annotations

import grpc
import grpc.aio
import jwt
import pytest
from google.protobuf.duration_pb2 import Duration

from federation.v1 import access_service_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.live import rotation
from tests.support.federation import BareNeuron, Federation, running
from tests.support.servers import refusal
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "TICK_S", 0.05)


async def rotated(neuron: BareNeuron) -> str:
    while not (message := await neuron.receive()).HasField("token_rotation"):
        pass
    return message.token_rotation.token.token


async def refresh(federation: Federation, token: str) -> str:
    metadata = (("authorization", f"Bearer {token}"),)
    answer = await federation.session.RefreshToken(pb.RefreshTokenRequest(), metadata=metadata)
    return answer.token.token


async def test_a_stream_gets_new_tokens_in_the_middle_of_their_lives_and_goes_on(
    database_url: str,
) -> None:
    async with running(database_url, token_ttl="PT4S") as federation:
        first = await federation.register("n")
        neuron = BareNeuron(federation, first)
        await neuron.hello()
        second = await rotated(neuron)
        await refresh(federation, first)
        third = await rotated(neuron)
        await refresh(federation, third)
        for old in (first, second):
            refused = await refusal(refresh(federation, old))
            assert refused[0] is grpc.StatusCode.UNAUTHENTICATED
        await rotated(neuron)  # the stream has outlived the token that opened it
        neuron.call.cancel()


async def rotate_key(federation: Federation, overlap_s: int) -> str:
    request = access_service_pb2.RotateSigningKeyRequest(overlap=Duration(seconds=overlap_s))
    answer = await federation.access.RotateSigningKey(request, metadata=federation.admin)
    return answer.signing_key.kid


async def test_a_stream_whose_token_was_signed_by_a_key_that_was_ended_gets_no_other(
    database_url: str,
) -> None:
    async with running(database_url, token_ttl="PT4S") as federation:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        session = federation.app.sessions.get("n")
        assert session is not None
        await rotate_key(federation, overlap_s=0)
        await eventually(lambda: session.credential is None, describe="it gets none")
        await neuron.send(goodbye=pb.Goodbye())
        await neuron.call.done_writing()
        while isinstance(message := await neuron.call.read(), pb.FederationMessage):
            assert not message.HasField("token_rotation")


async def test_a_stream_gets_a_token_of_the_new_key_before_the_one_before_retires(
    database_url: str,
) -> None:
    async with running(database_url) as federation:
        neuron = BareNeuron(federation, await federation.register("n"))
        await neuron.hello()
        kid = await rotate_key(federation, overlap_s=3600)
        token = await rotated(neuron)
        assert jwt.get_unverified_header(token)["kid"] == kid
        await refresh(federation, token)
        neuron.call.cancel()


async def test_a_session_whose_token_was_replaced_by_a_newer_one_gets_none(
    database_url: str,
) -> None:
    async with running(database_url, token_ttl="PT4S") as federation:
        first = await federation.register("n")
        neuron = BareNeuron(federation, first)
        await neuron.hello()
        await refresh(federation, await refresh(federation, first))
        session = federation.app.sessions.get("n")
        assert session is not None
        await eventually(lambda: session.credential is None, describe="it was due")
        await neuron.send(goodbye=pb.Goodbye())
        await neuron.call.done_writing()
        while isinstance(message := await neuron.call.read(), pb.FederationMessage):
            assert not message.HasField("token_rotation")
