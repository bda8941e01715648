"""Register by an enrollment token: who gets in, how often, and what that does to the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import select
from structlog.testing import capture_logs

from federation.v1 import neuron_pb2
from federation_server.rpc import errors
from federation_server.store import enrollment
from federation_server.store.database import Database
from federation_server.store.schema import enrollment_uses
from tests.support.office import Office


@pytest_asyncio.fixture
async def office(database_url: str) -> AsyncIterator[Office]:
    database = Database(database_url)
    yield Office(database)
    await database.close()


# a new neuron


async def test_a_new_neuron_is_stored_as_it_describes_itself_and_gets_a_token(
    office: Office,
) -> None:
    answer = await office.register(
        enrollment_token=await office.enrollment_token(),
        name="One",
        labels={"zone": "eu"},
        capabilities=["a", "b"],
        alert_thresholds=neuron_pb2.AlertThresholds(heartbeat_timeout=Duration(seconds=7)),
    )
    assert answer.created
    assert answer.neuron.description.name == "One"
    assert answer.neuron.lifecycle == neuron_pb2.LIFECYCLE_ACTIVE
    assert answer.neuron.presence == neuron_pb2.PRESENCE_OFFLINE
    assert answer.neuron.presence_reason == "registered"
    assert not answer.neuron.HasField("session")
    state = await office.state()
    assert state["labels"] == {"zone": "eu"}
    assert state["capabilities"] == ["a", "b"]
    assert state["heartbeat_timeout"] == timedelta(seconds=7)
    assert await office.identity(answer.token.token) is not None
    span = answer.token.expire_time.ToDatetime() - answer.token.refresh_time.ToDatetime()
    assert span == timedelta(hours=12)


async def test_a_new_neurons_generation_is_its_time_in_microseconds(office: Office) -> None:
    await office.register(enrollment_token=await office.enrollment_token())
    state = await office.state()
    span = state["create_time"] - datetime(1970, 1, 1, tzinfo=UTC)
    assert state["token_generation"] == span // timedelta(microseconds=1)


async def test_without_a_credential_nobody_registers(office: Office) -> None:
    assert await office.refused() == "CREDENTIAL_MISSING"
    assert await office.row() is None


@pytest.mark.parametrize(
    "wanted",
    [
        {"ttl": timedelta(seconds=-1)},
        {"neuron_type": "other"},
        {"neuron_id_pattern": "m*"},
        {"neuron_id_pattern": "n"},
        {"labels": {"zone": "eu"}},
    ],
    ids=["expired", "another type", "another id", "a part of the id", "other labels"],
)
async def test_an_enrollment_token_that_does_not_fit_is_refused_with_no_word_why(
    office: Office, wanted: dict[str, Any]
) -> None:
    good = await office.enrollment_token()
    token = await office.enrollment_token(allow_reenrollment=True, **wanted)
    words = set()
    for attempt in ("new", "taken"):
        for secret in ("fet_unknown", token):
            with pytest.raises(errors.Refused) as caught:
                await office.register(enrollment_token=secret, labels={"zone": "us"})
            assert caught.value.reason_name == "ENROLLMENT_REFUSED"
            words.add(str(caught.value))
        if attempt == "new":
            await office.register(enrollment_token=good)
    assert len(words) == 1
    assert await office.uses() == 1


async def test_a_revoked_enrollment_token_is_refused(office: Office) -> None:
    token = await office.enrollment_token()
    async with office.database.begin() as connection:
        tokens, _ = await enrollment.list_tokens(connection, page_size=1, page_token="")
        await enrollment.revoke(connection, tokens[0].enrollment_token_id)
    assert await office.refused(enrollment_token=token) == "ENROLLMENT_REFUSED"


async def test_an_enrollment_token_enrolls_what_it_is_pinned_to(office: Office) -> None:
    token = await office.enrollment_token(
        neuron_type="worker", neuron_id_pattern="w-*-eu", labels={"zone": "eu"}
    )
    answer = await office.register(
        "w-1-eu", enrollment_token=token, labels={"zone": "eu", "a": "b"}
    )
    assert answer.created


async def test_what_a_neuron_enrolled_as_binds_it_no_longer_but_what_an_admin_set_does(
    office: Office,
) -> None:
    token = await office.enrollment_token(neuron_type="worker", labels={"zone": "eu"})
    first = await office.register(enrollment_token=token, labels={"zone": "eu"})
    second = await office.register(own=first.token.token, type="other", labels={"zone": "us"})
    assert second.neuron.description.type == "other"
    assert dict(second.neuron.description.labels) == {"zone": "us"}
    await office.change(labels={"zone": "eu"}, overridden_fields=["labels"])
    third = await office.register(own=first.token.token, labels={"zone": "us"})
    assert dict(third.neuron.description.labels) == {"zone": "eu"}


async def test_an_enrollment_token_enrolls_no_more_than_max_uses_even_at_once(
    office: Office,
) -> None:
    token = await office.enrollment_token(max_uses=3)
    answers = await asyncio.gather(
        *(office.register(f"n{number}", enrollment_token=token) for number in range(8)),
        return_exceptions=True,
    )
    refused = [answer for answer in answers if isinstance(answer, errors.Refused)]
    assert [answer.reason_name for answer in refused] == ["ENROLLMENT_REFUSED"] * 5
    assert len(answers) - len(refused) == 3
    assert await office.uses() == 3


async def test_a_refused_register_is_logged_with_its_reason_and_no_secret(office: Office) -> None:
    token = await office.enrollment_token(neuron_type="other")
    with capture_logs() as logs:
        await office.refused(enrollment_token=token)
    assert [(line["action"], line["reason"]) for line in logs] == [
        ("enrollment_refused", "pinned to another type")
    ]
    assert token not in str(logs)


async def test_a_register_is_logged_without_its_token(office: Office) -> None:
    token = await office.enrollment_token()
    with capture_logs() as logs:
        answer = await office.register(enrollment_token=token)
    assert [(line["action"], line["neuron_id"], line["how"]) for line in logs] == [
        ("neuron_registered", "n1", "created")
    ]
    assert token not in str(logs)
    assert answer.token.token not in str(logs)


# the same request again


async def test_the_same_request_again_is_the_same_neuron_and_counts_once(office: Office) -> None:
    token = await office.enrollment_token(max_uses=1)
    first = await office.register(enrollment_token=token, request_id="r")
    second = await office.register(enrollment_token=token, request_id="r")
    assert first.created
    assert second.created
    assert second.neuron == first.neuron
    assert second.token.token != first.token.token
    assert await office.identity(first.token.token) is not None
    assert await office.identity(second.token.token) is not None
    assert await office.uses() == 1


async def test_the_same_request_at_once_makes_one_neuron_and_counts_once(office: Office) -> None:
    token = await office.enrollment_token(max_uses=1)
    answers = await asyncio.gather(
        *(office.register(enrollment_token=token, request_id="r") for _ in range(6))
    )
    assert len({answer.neuron.create_time.ToNanoseconds() for answer in answers}) == 1
    assert await office.uses() == 1


async def test_another_request_is_another_use_and_the_id_is_taken(office: Office) -> None:
    token = await office.enrollment_token()
    await office.register(enrollment_token=token, request_id="r")
    for request_id in ("s", ""):
        refused = await office.refused(enrollment_token=token, request_id=request_id)
        assert refused == "NEURON_EXISTS"
    assert await office.uses() == 1


async def test_a_used_up_token_does_not_tell_whether_an_id_is_taken(office: Office) -> None:
    token = await office.enrollment_token(max_uses=1)
    await office.register("taken", enrollment_token=token, request_id="r")
    for neuron_id in ("taken", "free"):
        assert await office.refused(neuron_id, enrollment_token=token) == "ENROLLMENT_REFUSED"
        refused = await office.refused(neuron_id, enrollment_token=token, request_id="s")
        assert refused == "ENROLLMENT_REFUSED"


async def test_a_request_of_an_earlier_generation_is_not_repeated(office: Office) -> None:
    token = await office.enrollment_token(max_uses=1)
    await office.register(enrollment_token=token, request_id="r")
    again = await office.enrollment_token(allow_reenrollment=True)
    await office.register(enrollment_token=again)
    refused = await office.refused(enrollment_token=token, request_id="r")
    assert refused == "ENROLLMENT_REFUSED"


async def test_a_deleted_neuron_does_not_come_back_by_its_old_request(office: Office) -> None:
    token = await office.enrollment_token(max_uses=1)
    await office.register(enrollment_token=token, request_id="r")
    await office.delete()
    refused = await office.refused(enrollment_token=token, request_id="r")
    assert refused == "ENROLLMENT_REFUSED"
    assert await office.row() is None


async def test_registers_of_one_id_by_two_tokens_at_once_make_one_neuron(office: Office) -> None:
    secrets = [await office.enrollment_token() for _ in range(6)]
    answers = await asyncio.gather(
        *(office.register(enrollment_token=secret) for secret in secrets), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, errors.Refused)]
    assert [answer.reason_name for answer in refused] == ["NEURON_EXISTS"] * 5
    assert await office.uses() == 1


async def test_uses_without_a_request_id_leave_no_trace_but_the_count(office: Office) -> None:
    await office.register(enrollment_token=await office.enrollment_token())
    async with office.database.begin() as connection:
        assert (await connection.execute(select(enrollment_uses))).all() == []


# re-enrollment


async def test_re_enrollment_kills_older_tokens_and_ends_the_session(office: Office) -> None:
    first = await office.register(enrollment_token=await office.enrollment_token())
    opened = await office.open_session(first.token.token)
    assert opened is not None
    listener = await office.listener()
    token = await office.enrollment_token(allow_reenrollment=True)
    second = await office.register(enrollment_token=token, name="Two")
    assert not second.created
    assert second.neuron.description.name == "Two"
    assert await office.identity(first.token.token) is None
    assert await office.identity(second.token.token) is not None
    state = await office.state()
    assert (state["session_open"], state["session_epoch"]) == (False, opened.epoch + 1)
    assert (state["presence"], state["presence_reason"]) == ("SUSPECT", "re-enrolled")
    assert await office.hints(listener) == [f"end:REVOKED:{opened.epoch + 1} n1"]
    await listener.close()
    assert await office.open_session(first.token.token) is None


async def test_re_enrollment_of_a_neuron_without_a_session_leaves_its_presence(
    office: Office,
) -> None:
    await office.register(enrollment_token=await office.enrollment_token())
    before = await office.state()
    token = await office.enrollment_token(allow_reenrollment=True)
    await office.register(enrollment_token=token)
    after = await office.state()
    for name in ("presence", "presence_time", "presence_reason"):
        assert after[name] == before[name]


async def test_re_enrollment_counts_once_for_each_request_id(office: Office) -> None:
    await office.register(enrollment_token=await office.enrollment_token(max_uses=1))
    token = await office.enrollment_token(allow_reenrollment=True, max_uses=2)
    first = await office.register(enrollment_token=token, request_id="r")
    second = await office.register(enrollment_token=token, request_id="r")
    assert not second.created
    assert await office.identity(first.token.token) is not None
    assert await office.uses() == 2
    await office.register(enrollment_token=token)
    assert await office.refused(enrollment_token=token) == "ENROLLMENT_REFUSED"
    assert await office.uses() == 3


async def test_re_enrollments_at_once_leave_one_generation(office: Office) -> None:
    await office.register(enrollment_token=await office.enrollment_token())
    secrets = [await office.enrollment_token(allow_reenrollment=True) for _ in range(5)]
    answers = await asyncio.gather(
        *(office.register(enrollment_token=secret) for secret in secrets)
    )
    good = [await office.identity(answer.token.token) is not None for answer in answers]
    assert sorted(good) == [False, False, False, False, True]
