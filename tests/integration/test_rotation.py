"""Tokens are rotated over the stream; the one before is good until the new one is used."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

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
