"""No secret that a server meets is in what it logs, answers, measures or describes itself by.

A server at DEBUG is led past every place that holds a secret: its settings, registration, tokens
and keys good and bad, a database that goes away, one that never was. Then all that it said to
anybody is searched for all of them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Awaitable
from typing import Any
from urllib.request import urlopen

import grpc
import grpc.aio
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sqlalchemy import make_url

from federation.v1 import access_service_pb2, fleet_service_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.rpc.methods import METHODS
from federation_server.rpc.server import SERVICES
from tests.support.faults import calling, doomed_postgres, health, is_health
from tests.support.federation import BareNeuron, Served
from tests.support.hostile import NEVER_SHOWN, TEXT
from tests.support.postgres import passable_folder
from tests.support.processes import (
    FEDERATION,
    FederationProcess,
    clean_environment,
    federation_process,
    free_port,
)
from tests.support.waiting import eventually

DATABASE_PASSWORD = "sw0rd-f1sh-of-the-database"
ADMIN_KEY = "an-admin-key-that-looks-like-nothing"
REFUSED = {
    "an API key of ours": "fak_uFQeGxuLz3z7Pn2eOHtVCbq_XgYp1k0W",
    "some other key": "a-key-that-was-mistyped",
    "a token of nobody's": "eyJhbGciOiJIUzI1NiIsImtpZCI6IngifQ.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    "an unsigned token": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJuIn0.",
}
ENROLLMENT_REFUSED = "fet_tj9huq8NS8ovrU5QQ5c-rd5JKeo6jDb3LNm-49v3t1I"
GARBAGE = b"\xff\xff\xff\xff\x07garbage"


class Answers:
    """All that a server has answered."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def of(self, call: Awaitable[Any]) -> Any:
        """The answer, or None for an error, of which all that the client gets is kept."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            self.texts += [str(error.code()), str(error.details()), str(error)]
            self.texts += [repr(error.initial_metadata()), repr(error.trailing_metadata())]
            return None


@pytest.mark.parametrize("form", ["json", "console"])
async def test_no_secret_is_in_the_log_an_error_the_metrics_or_the_reflection(form: str) -> None:
    metrics_port = free_port()
    with doomed_postgres() as postgres, passable_folder() as folder:
        url = make_url(postgres.url).set(password=DATABASE_PASSWORD)
        settings = {
            "DATABASE_URL": url.render_as_string(hide_password=False),
            "ADMIN_API_KEY": ADMIN_KEY,
            "FEDERATION_LOG_LEVEL": "DEBUG",
            "FEDERATION_LOG_FORMAT": form,
            "FEDERATION_METRICS_PORT": str(metrics_port),
        }
        with federation_process(folder, "serve", **settings) as server:
            async with calling(server) as served:
                answers = Answers()
                secrets = await meet_every_secret(served, answers)
                answers.texts += [await described(served), await measured(metrics_port)]
                await asyncio.to_thread(postgres.embedded.stop)
                await eventually(
                    lambda: is_health(served, 2), within=20, describe="the database is away"
                )
                await answers.of(served.fleet.ListNeurons(LIST, metadata=admin(ADMIN_KEY)))
                assert await health(served) == 2
            assert server.stop() == 0
            log = server.output
            said = {"log": log, "answers": "\n".join(answers.texts)}
    assert "RPC refused" in said["log"]
    for place, text in said.items():
        for secret in secrets:
            assert secret not in text, (place, secret)
        assert "Traceback" not in text
    assert all(line.isprintable() for line in log.split("\n"))
    assert not any(each in log for each in NEVER_SHOWN)
    events = [line for line in log.split("\n") if line.startswith("forged")]
    assert events == []
    if form == "json":
        assert all(json.loads(line)["event"] for line in log.splitlines())


LIST = fleet_service_pb2.ListNeuronsRequest()


def admin(key: str) -> tuple[tuple[str, str], ...]:
    return (("x-admin-key", key),)


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential}"),)


async def meet_every_secret(served: Served, answers: Answers) -> list[str]:
    """Shows the server secrets good and bad, in every place that takes one; gives them."""
    enrollment = await served.access.CreateEnrollmentToken(
        access_service_pb2.CreateEnrollmentTokenRequest(), metadata=admin(ADMIN_KEY)
    )
    description = neuron_pb2.NeuronDescription(neuron_id="n", type="worker", name="n")
    made = await served.session.Register(
        pb.RegisterRequest(description=description, enrollment_token=enrollment.secret)
    )
    token = made.token.token
    refreshed = await served.session.RefreshToken(pb.RefreshTokenRequest(), metadata=bearer(token))
    neuron = BareNeuron(served, token)
    await neuron.hello()
    await neuron.send(goodbye=pb.Goodbye(reason=TEXT))
    await neuron.call.done_writing()
    await neuron.end()
    for credential in (*REFUSED.values(), token[:-4] + "AAAA"):
        for metadata in (bearer(credential), admin(credential)):
            await answers.of(served.fleet.ListNeurons(LIST, metadata=metadata))
            await answers.of(
                served.session.RefreshToken(pb.RefreshTokenRequest(), metadata=metadata)
            )
        stream: Any = served.session.Connect(metadata=bearer(credential))
        await stream.write(pb.NeuronMessage(hello=pb.Hello(instance_id=credential)))
        await answers.of(stream.read())
    for misplaced in (bearer(enrollment.secret), bearer(token), admin(token)):
        await answers.of(served.fleet.ListNeurons(LIST, metadata=misplaced))
    for secret in (ENROLLMENT_REFUSED, token, ADMIN_KEY):
        other = neuron_pb2.NeuronDescription(neuron_id="other", type="worker", name=TEXT)
        await answers.of(
            served.session.Register(pb.RegisterRequest(description=other, enrollment_token=secret))
        )
    taken = pb.RegisterRequest(description=description)
    await answers.of(served.session.Register(taken, metadata=bearer(REFUSED["an unsigned token"])))
    for text in (TEXT, "type ~ ?"):
        request = fleet_service_pb2.ListNeuronsRequest(filter=text, page_token=text)
        await answers.of(served.fleet.ListNeurons(request, metadata=admin(ADMIN_KEY)))
        get = fleet_service_pb2.GetNeuronRequest(neuron_id=text)
        await answers.of(served.fleet.GetNeuron(get, metadata=admin(ADMIN_KEY)))
    for path in METHODS:
        call: Any = served.channel.stream_stream(path)
        streamed = call(iter([GARBAGE]), metadata=admin(ADMIN_KEY))
        await answers.of(streamed.read())
    made_secrets = [enrollment.secret, token, refreshed.token.token]
    signatures = [each.rpartition(".")[2] for each in (token, refreshed.token.token)]
    return [
        *(DATABASE_PASSWORD, ADMIN_KEY, ENROLLMENT_REFUSED),
        *(*REFUSED.values(), *made_secrets, *signatures),
    ]


async def described(served: Served) -> str:
    """What reflection and channelz say of the server."""
    ask = reflection_pb2.ServerReflectionRequest
    asked = [ask(list_services="")] + [ask(file_containing_symbol=name) for name in SERVICES]
    channel: Any = served.channel  # their types know no asyncio
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    said = [str(each) async for each in reflection.ServerReflectionInfo(iter(asked))]
    assert len(said) == len(asked)
    channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
    said.append(
        str(await channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=admin(ADMIN_KEY)))
    )
    return "\n".join(said)


async def measured(port: int) -> str:
    """What /metrics says."""

    def read() -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    text = await asyncio.to_thread(read)
    assert "federation_sessions_opened_total 1.0" in text
    return text


UNUSABLE = {
    "a host that is not there": f"postgresql://u:{DATABASE_PASSWORD}@127.0.0.1:1/federation",
    "a password in the query": f"postgresql://u@127.0.0.1:1/f?password={DATABASE_PASSWORD}",
    "no URL": f"postgresql//u:{DATABASE_PASSWORD}@db/federation",
    "another database's": f"mysql://u:{DATABASE_PASSWORD}@db/federation",
    "no database": f"postgresql://u:{DATABASE_PASSWORD}@db",
    "a port that is none": f"postgresql://u:{DATABASE_PASSWORD}@db:x/federation",
    "an unknown option": f"postgresql://u:{DATABASE_PASSWORD}@127.0.0.1:1/f?nonsense=1",
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("command", ["serve", "migrate"])
async def test_a_database_url_that_does_not_work_is_told_without_its_password(
    kind: str, command: str
) -> None:
    with passable_folder() as folder:
        server = FederationProcess(folder, command, DATABASE_URL=UNUSABLE[kind])
        try:
            server.launch()
            await eventually(
                lambda: "database_wait" in server.output or server.process.poll() is not None,
                describe="it says what is wrong",
            )
        finally:
            server.kill()
        assert server.output
        assert DATABASE_PASSWORD not in server.output
        assert "Traceback" not in server.output


def test_what_config_show_prints_on_a_pipe_has_no_secret() -> None:
    done = subprocess.run(
        [FEDERATION, "config", "show"],
        env=clean_environment(
            DATABASE_URL=UNUSABLE["a password in the query"], ADMIN_API_KEY=ADMIN_KEY
        ),
        capture_output=True,
        check=True,
        text=True,
    )
    assert "FEDERATION_PORT" in done.stdout
    assert DATABASE_PASSWORD not in done.stdout + done.stderr
    assert ADMIN_KEY not in done.stdout + done.stderr
