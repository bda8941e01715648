"""One caller that calls too often is told when to come again; all others are served."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from sqlalchemy import event, func
from structlog.testing import capture_logs

from federation.v1 import access_service_pb2, command_service_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.domain.access import Role, TokenLifetime, secret_hash
from federation_server.live.rates import Limit
from federation_server.rpc.methods import CONNECT
from federation_server.rpc.tokens import Tokens
from federation_server.store import registration
from federation_server.store.database import Database
from federation_server.store.schema import api_keys
from neuron_sdk import Neuron, NeuronConfig, lifecycle
from neuron_sdk.mode import Mode
from tests.support.calls import State, command, counted, issue, spec
from tests.support.federation import BareNeuron, Federation, running
from tests.support.gate import bearer, details, gate_of, info
from tests.support.neurons import GENERATION
from tests.support.waiting import eventually

GET, REFRESH = "/federation.v1.FleetService/GetNeuron", "/federation.v1.SessionService/RefreshToken"
WATCH = "/federation.v1.CommandService/WatchCommand"
INVALID = "UNAUTHENTICATED CREDENTIAL_INVALID"
LIMITED = "RESOURCE_EXHAUSTED RATE_LIMITED"


def limits(**these: float) -> dict[Limit, float]:
    """Those limits a second, and the others out of reach."""
    return dict.fromkeys(Limit, 1e6) | {Limit[name]: value for name, value in these.items()}


async def put_key(database: Database, secret: str) -> None:
    values = {"api_key_id": str(uuid.uuid4()), "name": secret, "role": Role.ADMIN}
    async with database.begin() as connection:
        await connection.execute(
            api_keys.insert().values(
                secret_hash=secret_hash(secret), create_time=func.now(), **values
            )
        )


async def limited(call: Awaitable[Any], limit: Limit) -> float:
    """Asserts that the call meets that limit; gives the seconds to wait."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = info(caught.value)
    assert (found.reason, dict(found.metadata)) == ("RATE_LIMITED", {"limit": limit.value})
    retry = error_details_pb2.RetryInfo()
    assert details(caught.value).details[1].Unpack(retry)
    wait_s: float = retry.retry_delay.ToMicroseconds() / 1e6
    assert wait_s > 0.0
    return wait_s


# credentials that are no good


@pytest.mark.parametrize(
    ("rpc", "bad"),
    [
        (GET, "fak_unknown"),
        (GET, "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"),
        (REFRESH, "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"),
        (CONNECT, "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"),
    ],
)
async def test_who_shows_bad_credentials_is_told_to_wait_and_a_good_one_is_let_in_all_the_same(
    database_url: str, rpc: str, bad: str
) -> None:
    database = Database(database_url)
    async with gate_of(database, limits(FAILED_CREDENTIAL_RATE=1.0)) as gate:
        answers = Counter([await gate.knock(rpc, bearer(bad)) for _ in range(30)])
        assert answers == {INVALID: 10, LIMITED: 20}
        await put_key(database, "fak_good")
        assert await gate.knock(GET, bearer("fak_good")) == "admin:fak_good"
        assert await gate.knock(GET) == "UNAUTHENTICATED CREDENTIAL_MISSING"
        gate.clock.now += 1.0
        assert await gate.knock(rpc, bearer(bad)) == INVALID
        wait_s = await limited(gate.call(rpc, bearer(bad)), Limit.FAILED_CREDENTIAL_RATE)
        assert 0.9 < wait_s <= 30.0


@pytest.mark.parametrize("bad", ["fak_unknown", "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"])
async def test_strangers_who_call_without_end_do_not_fill_the_log(
    database_url: str, bad: str
) -> None:
    async with gate_of(Database(database_url), limits(FAILED_CREDENTIAL_RATE=1.0)) as gate:
        with capture_logs() as logged:
            for _ in range(50):
                await gate.knock(GET, bearer(bad))
                await gate.knock(GET)
    loud = [each for each in logged if each["log_level"] != "debug"]
    reasons = Counter(each.get("reason") for each in loud if each["action"] == "rpc_refused")
    assert reasons == {"CREDENTIAL_INVALID": 10}
    assert len(loud) == 10 + 1, "and one that sums up the others"


async def test_expired_tokens_of_a_fleet_that_was_away_for_long_count_as_no_failures(
    database_url: str,
) -> None:
    async with gate_of(Database(database_url), limits(FAILED_CREDENTIAL_RATE=1.0)) as gate:
        await gate.neuron()
        old = gate.token(age=timedelta(days=3))
        answers = {await gate.knock(REFRESH, old) for _ in range(20)}
        assert answers == {"UNAUTHENTICATED CREDENTIAL_EXPIRED"}


async def test_a_storm_of_unknown_keys_asks_the_database_little_and_lets_a_good_one_in(
    database_url: str,
) -> None:
    database = Database(database_url)
    await put_key(database, "fak_good")
    statements: list[str] = []

    def count(*arguments: Any) -> None:
        statements.append(arguments[2])

    async with gate_of(database, limits(FAILED_CREDENTIAL_RATE=1.0)) as gate:
        event.listen(database.engine.sync_engine, "before_cursor_execute", count)
        knocks = [gate.knock(GET, bearer(f"fak_bad_{number}")) for number in range(600)]
        knocks.insert(300, gate.knock(GET, bearer("fak_good")))
        answers = await asyncio.gather(*knocks)
        assert answers.pop(300) == "admin:fak_good"
        assert set(answers) == {INVALID, LIMITED}
        assert 0 < len(statements) < 300, "they are asked for together"


async def test_each_key_has_its_own_answer_where_one_question_is_about_many(
    database_url: str,
) -> None:
    database = Database(database_url)
    for number in range(5):
        await put_key(database, f"fak_{number}")
    async with gate_of(database, limits()) as gate:
        names = [f"fak_{number}" for number in range(10)]
        answers = await asyncio.gather(*(gate.knock(GET, bearer(name)) for name in names))
        assert answers == [f"admin:fak_{number}" for number in range(5)] + [INVALID] * 5


# neurons


async def test_a_neuron_that_calls_too_often_waits_and_no_other_does(database_url: str) -> None:
    async with gate_of(Database(database_url), limits(NEURON_CALL_RATE=1.0)) as gate:
        await gate.neuron("n1")
        await gate.neuron("n2")
        answers = Counter([await gate.knock(REFRESH, gate.token("n1")) for _ in range(15)])
        assert answers == {"neuron:n1": 10, LIMITED: 5}
        await limited(gate.call(CONNECT, gate.token("n1")), Limit.NEURON_CALL_RATE)
        assert await gate.knock(REFRESH, gate.token("n2")) == "neuron:n2"


async def test_a_token_that_was_revoked_uses_up_nothing_of_its_neurons(database_url: str) -> None:
    async with gate_of(Database(database_url), limits(NEURON_CALL_RATE=1.0)) as gate:
        await gate.neuron()
        revoked = gate.token()
        await gate.change_neuron(token_generation=GENERATION + 1)
        assert {await gate.knock(REFRESH, revoked) for _ in range(15)} == {INVALID, LIMITED}
        fresh = gate.tokens.issue("n1", GENERATION + 1, datetime.now(UTC)).token
        assert await gate.knock(REFRESH, bearer(fresh)) == "neuron:n1"


async def test_a_neuron_that_renews_its_token_before_each_call_has_no_more_calls_for_it(
    database_url: str,
) -> None:
    async with running(database_url, neuron_call_rate=0.5) as federation:
        token = await federation.register("n")
        for _ in range(5):
            answer = await federation.session.RefreshToken(
                pb.RefreshTokenRequest(), metadata=bearer(token)
            )
            token = answer.token.token
        refresh = federation.session.RefreshToken(pb.RefreshTokenRequest(), metadata=bearer(token))
        await limited(refresh, Limit.NEURON_CALL_RATE)
        await limited(registering(federation, "n", "", token), Limit.NEURON_CALL_RATE)


async def test_a_neuron_that_registers_again_and_again_waits_and_no_other_does(
    database_url: str,
) -> None:
    async with running(database_url, neuron_call_rate=0.5) as federation:
        token, other = [await federation.register(name) for name in ("n", "other")]
        for _ in range(5):
            token = (await registering(federation, "n", "", token)).token.token
        await limited(registering(federation, "n", "", token), Limit.NEURON_CALL_RATE)
        assert not (await registering(federation, "other", "", other)).created


async def test_streams_that_a_neuron_opens_with_ever_newer_tokens_are_counted(
    database_url: str,
) -> None:
    async with running(database_url, neuron_call_rate=0.5) as federation:
        await federation.register("n")
        tokens = await Tokens.load(federation.app.database, TokenLifetime())
        now = datetime.now(UTC)
        first = registration.newer_generation(0, now)
        hoard = [tokens.issue("n", first + number, now).token for number in range(6)]
        for token in hoard[:5]:
            await BareNeuron(federation, token).hello()
        call = federation.session.Connect(metadata=bearer(hoard[5]))
        await limited(call.read(), Limit.NEURON_CALL_RATE)


async def test_a_revoked_token_registers_nobody_and_is_not_looked_up_for_long(
    database_url: str,
) -> None:
    async with running(database_url, neuron_call_rate=10.0) as federation:
        token = await federation.register("n")
        await federation.access.RevokeNeuronTokens(
            access_service_pb2.RevokeNeuronTokensRequest(neuron_id="n"), metadata=federation.admin
        )
        answers: Counter[str] = Counter()
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registering(federation, "n", "", token)
            answers[info(caught.value).reason] += 1
        assert set(answers) == {"CREDENTIAL_INVALID", "RATE_LIMITED"}
        assert answers["CREDENTIAL_INVALID"] <= 4
        secret = await federation.enrollment_token(allow_reenrollment=True)
        assert (await registering(federation, "n", secret)).token.token


async def test_a_run_that_meets_the_limit_obeys_and_loses_nothing(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, neuron_call_rate=5.0) as federation:
        token = await federation.register("n-1", command_types=[neuron_pb2.CommandType(type="do")])
        assert token
        config = NeuronConfig(
            federation_url=federation.address,
            enrollment_token=await federation.enrollment_token(allow_reenrollment=True),
            state_dir=tmp_path,
            metrics_enabled=False,
        )
        neuron = Neuron("n-1", type="cron", config=config)

        @neuron.command("do")
        async def do() -> None:
            neuron.counter("done").add()

        ordered = [await issue(federation, "n-1", "do") for _ in range(30)]
        assert (await lifecycle.serve(neuron, mode=Mode.ONCE)).failure == ""
        assert refused(federation, Limit.NEURON_CALL_RATE) > 0
        for command_id in ordered:
            found = await command(federation, command_id)
            assert found.state == State.COMMAND_STATE_SUCCEEDED
            assert found.attempt == 1
        assert await counted(federation, "n-1", "done") == len(ordered)


# Register


def registering(
    federation: Federation, name: str, secret: str, token: str = ""
) -> Awaitable[pb.RegisterResponse]:
    request = pb.RegisterRequest(
        description=neuron_pb2.NeuronDescription(neuron_id=name, type="worker"),
        enrollment_token=secret,
    )
    return federation.session.Register(request, metadata=bearer(token) if token else None)


def refused(federation: Federation, limit: Limit) -> float:
    name = "federation_limited_total"
    value = federation.app.metrics.registry.get_sample_value(name, {"limit": limit.value})
    return value or 0.0


async def test_an_address_may_register_so_often_and_a_neuron_with_its_token_always(
    database_url: str,
) -> None:
    async with running(database_url, register_rate=0.5) as federation:
        secret = await federation.enrollment_token()
        answers = [await registering(federation, f"n{number}", secret) for number in range(5)]
        await limited(registering(federation, "n5", secret), Limit.REGISTER_RATE)
        for number, answer in enumerate(answers):
            again = await registering(federation, f"n{number}", "", answer.token.token)
            assert not again.created
        other = registering(federation, "other", secret, answers[0].token.token)
        await limited(other, Limit.REGISTER_RATE)


async def test_who_guesses_enrollment_tokens_or_names_has_far_fewer_tries(
    database_url: str,
) -> None:
    async with running(database_url, register_rate=15.0) as federation:
        taken = await federation.register("taken")
        assert taken
        secret = await federation.enrollment_token()
        codes: Counter[str] = Counter()
        for name, shown_secret in [("taken", secret), ("n", "fet_guess")] * 5:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await registering(federation, name, shown_secret)
            codes[info(caught.value).reason] += 1
        assert codes["RATE_LIMITED"] >= 6
        assert {"NEURON_EXISTS", "ENROLLMENT_REFUSED", "RATE_LIMITED"} == set(codes)


# admins


async def test_an_api_key_that_calls_too_often_waits_and_no_other_does(database_url: str) -> None:
    database = Database(database_url)
    for name in ("fak_busy", "fak_calm"):
        await put_key(database, name)
    async with gate_of(database, limits(ADMIN_CALL_RATE=1.0)) as gate:
        answers = Counter([await gate.knock(GET, bearer("fak_busy")) for _ in range(15)])
        assert answers == {"admin:fak_busy": 10, LIMITED: 5}
        await limited(gate.call(WATCH, bearer("fak_busy")), Limit.ADMIN_CALL_RATE)
        assert await gate.knock(GET, bearer("fak_calm")) == "admin:fak_calm"


async def test_calls_that_a_role_does_not_allow_count_as_well(database_url: str) -> None:
    database = Database(database_url)
    await put_key(database, "fak_curious")
    rates = limits(ADMIN_CALL_RATE=1.0, NEURON_CALL_RATE=1.0)
    async with gate_of(database, rates) as gate:
        await gate.neuron()
        for rpc, credential in ((REFRESH, bearer("fak_curious")), (GET, gate.token())):
            answers = Counter([await gate.knock(rpc, credential) for _ in range(15)])
            assert answers == {"PERMISSION_DENIED ROLE_TOO_LOW": 10, LIMITED: 5}


async def test_a_key_has_room_for_another_stream_once_one_has_ended(database_url: str) -> None:
    async with running(database_url, admin_streams=2) as federation:
        await federation.register("n")
        command_id = await issue(federation, "n", "run")
        request = command_service_pb2.WatchCommandRequest(command_id=command_id)

        def watch() -> Any:
            return federation.command.WatchCommand(request, metadata=federation.admin)

        calls = [watch(), watch()]
        for call in calls:
            assert (await call.read()).command.command_id == command_id
        await limited(watch().read(), Limit.ADMIN_STREAMS)
        ordered = command_service_pb2.ExecuteCommandRequest(command=spec("n", "run"))
        execute: Any = federation.command.ExecuteCommand(ordered, metadata=federation.admin)
        await limited(execute.read(), Limit.ADMIN_STREAMS)
        assert (await command(federation, command_id)).command_id == command_id
        calls.pop().cancel()

        async def has_room() -> bool:
            call = watch()
            try:
                return bool((await call.read()).command.command_id == command_id)
            except grpc.aio.AioRpcError:
                return False
            finally:
                call.cancel()

        await eventually(has_room, describe="there is room for another one")
        calls.pop().cancel()
