"""What becomes of commands: attempts, timers, cancelling, following, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import command_pb2, command_service_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.command_service_pb2 import CommandSpec
from tests.support.calls import FINAL, State, command, reached
from tests.support.federation import BareNeuron, Federation, connected, running
from tests.support.servers import refusal
from tests.support.waiting import eventually

QUEUED = State.COMMAND_STATE_QUEUED
SENT = State.COMMAND_STATE_SENT
RUNNING = State.COMMAND_STATE_RUNNING
CANCELLING = State.COMMAND_STATE_CANCELLING
CANCELLED = State.COMMAND_STATE_CANCELLED
TIMED_OUT = State.COMMAND_STATE_TIMED_OUT
FAILED = State.COMMAND_STATE_FAILED
UNKNOWN = State.COMMAND_STATE_OUTCOME_UNKNOWN
ONCE = command_pb2.EXECUTION_AT_MOST_ONCE


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    patience = {"presence_patience": "PT0S", "offline_after": "PT0.2S"}
    async with running(database_url, command_lost_after="PT0.2S", **patience) as federation:
        yield federation


def span(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


async def issued(federation: Federation, **fields: Any) -> str:
    """Issues a command for the neuron n; gives its id."""
    answer = await federation.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(
            command=CommandSpec(neuron_id="n", type="run", **fields)
        ),
        metadata=federation.admin,
    )
    return answer.command.command_id


async def cancel(federation: Federation, command_id: str, reason: str = "") -> command_pb2.Command:
    answer = await federation.command.CancelCommand(
        command_service_pb2.CancelCommandRequest(command_id=command_id, reason=reason),
        metadata=federation.admin,
    )
    return answer.command


async def retry(federation: Federation, command_id: str, **fields: Any) -> command_pb2.Command:
    answer = await federation.command.RetryCommand(
        command_service_pb2.RetryCommandRequest(command_id=command_id, **fields),
        metadata=federation.admin,
    )
    return answer.command


async def explained(federation: Federation, command_id: str) -> list[str]:
    answer = await federation.command.ExplainCommand(
        command_service_pb2.ExplainCommandRequest(command_id=command_id),
        metadata=federation.admin,
    )
    return [fact.code for fact in answer.facts]


async def watch(
    federation: Federation, command_id: str, after_revision: int = 0
) -> AsyncGenerator[command_pb2.Command]:
    call = federation.command.WatchCommand(
        command_service_pb2.WatchCommandRequest(
            command_id=command_id, after_revision=after_revision
        ),
        metadata=federation.admin,
    )
    try:
        async for shown in call:
            yield shown.command
    finally:
        call.cancel()


async def history(federation: Federation, command_id: str) -> list[tuple[str, int]]:
    """The states that a command went through, and in which attempt."""
    found = await command(federation, command_id)
    return [
        (State.Name(step.state).removeprefix("COMMAND_STATE_"), step.attempt)
        for step in found.transitions
    ]


# ---- attempts


async def test_a_failed_attempt_is_followed_by_the_next_which_gets_its_checkpoint(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(federation, max_attempts=3, retry_backoff=span(0.05))
        first = await neuron.command()
        assert (first.attempt, first.max_attempts) == (1, 3)
        noted = pb.CommandProgressed(fraction=0.5, checkpoint={"row": 7})  # type: ignore[arg-type]
        await neuron.update(first, progressed=noted)
        await neuron.finish(first, "FAILED", "BROKEN")
        second = await neuron.command()
        assert (second.attempt, MessageToDict(second.checkpoint)) == (2, {"row": 7.0})
        between = await command(federation, command_id)
        assert (between.state, between.attempt) == (SENT, 2)
        assert not between.HasField("error")
        assert not between.HasField("progress")
        await neuron.finish(second, "SUCCEEDED")
        await reached(federation, command_id, State.COMMAND_STATE_SUCCEEDED)
        assert await history(federation, command_id) == [
            ("QUEUED", 0),
            ("SENT", 1),
            ("RUNNING", 1),
            ("QUEUED", 1),
            ("SENT", 2),
            ("SUCCEEDED", 2),
        ]
        reasons = [step.reason for step in (await command(federation, command_id)).transitions]
        assert reasons[3] == "attempt 1 of 3 ended as FAILED: BROKEN: so it is"


async def test_a_command_that_waits_for_its_next_attempt_says_so(federation: Federation) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(federation, max_attempts=2, retry_backoff=span(3600))
        await neuron.finish(await neuron.command(), "FAILED", "BROKEN")
        waiting = await reached(federation, command_id, QUEUED)
        assert waiting.HasField("next_attempt_time")
        assert waiting.error.code == "BROKEN"
        assert await explained(federation, command_id) == [
            "WAITS_FOR_RETRY",
            "EXPIRES",
            "ATTEMPT_FAILED",
        ]


async def test_a_late_word_on_an_earlier_attempt_changes_nothing_and_is_acknowledged(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(federation, max_attempts=2, retry_backoff=span(0.01))
        first = await neuron.command()
        await neuron.finish(first, "FAILED", "BROKEN")
        await neuron.command()
        await neuron.acked(await neuron.finish(first, "SUCCEEDED"))
        assert (await command(federation, command_id)).state == SENT


# ---- timers


@pytest.mark.parametrize(
    ("limit", "code"),
    [("accept_timeout", "ACCEPT_TIMEOUT"), ("progress_timeout", "PROGRESS_TIMEOUT")],
)
async def test_an_attempt_that_takes_too_long_times_out_and_the_neuron_is_told_before_the_next(
    federation: Federation, limit: str, code: str
) -> None:
    async with connected(federation, "n") as neuron:
        limits = {limit: span(0.1), "max_attempts": 2, "retry_backoff": span(0.01)}
        command_id = await issued(federation, **limits)
        for attempt in (1, 2):
            delivery = await neuron.command()
            assert delivery.attempt == attempt
            if limit == "progress_timeout":
                await neuron.update(delivery, progressed=pb.CommandProgressed(fraction=0.1))
            to_cancel = await neuron.cancelled()
            assert (to_cancel.command_id, to_cancel.attempt) == (command_id, attempt)
            assert code in to_cancel.reason
            await neuron.finish(to_cancel, "CANCELLED")
        ended = await reached(federation, command_id, *FINAL)
        assert (ended.state, ended.error.code, ended.attempt) == (TIMED_OUT, code, 2)


async def test_progress_keeps_a_command_alive(federation: Federation) -> None:
    async with connected(federation, "n") as neuron:
        quiet = await issued(federation, progress_timeout=span(0.5))
        lively = await issued(federation, progress_timeout=span(0.5), priority=1)
        first, second = await neuron.command(), await neuron.command()
        await neuron.update(first, progressed=pb.CommandProgressed())

        async def quiet_is_over() -> bool:
            await neuron.update(second, progressed=pb.CommandProgressed())
            return (await command(federation, quiet)).state == TIMED_OUT

        await eventually(quiet_is_over, describe="the silent one's end")
        assert (await command(federation, lively)).state == RUNNING


async def test_what_a_neuron_has_that_stays_away_is_given_up_once_its_time_is_over(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        soon = Timestamp()
        soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=1))
        command_id = await issued(federation, expire_time=soon)
        later = await issued(federation)
        await neuron.command()
        await neuron.command()
    ended = await reached(federation, command_id, *FINAL)
    assert (ended.state, ended.state_reason) == (
        UNKNOWN,
        "its neuron is away, and its time is over",
    )
    assert (await command(federation, later)).state == SENT
    assert await explained(federation, later) == [
        "WAITS_FOR_NEURON",
        "WAITS_FOR_ACCEPT",
        "EXPIRES",
    ]


# ---- at most once


async def test_what_must_not_run_twice_is_not_sent_again_and_its_neuron_s_word_is_waited_for(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    first = BareNeuron(federation, token)
    await first.hello()
    lost = await issued(federation, execution=ONCE)
    done = await issued(federation, execution=ONCE)
    deliveries = [await first.command(), await first.command()]
    first.call.cancel()
    # It comes back with a message in its spool, and with nothing of the other one.
    second = BareNeuron(federation, token)
    await second.hello(next_sequence=2)
    (of_done,) = [each for each in deliveries if each.command_id == done]
    witness = await issued(federation)
    assert (await second.command()).command_id == witness  # and not one of the two
    await second.acked(await second.finish(of_done, "SUCCEEDED"))
    ended = await reached(federation, lost, *FINAL)
    assert ended.state == UNKNOWN
    assert "must not be sent twice" in ended.state_reason
    assert (await command(federation, done)).state == State.COMMAND_STATE_SUCCEEDED
    second.call.cancel()


async def test_what_must_not_run_twice_has_one_attempt(federation: Federation) -> None:
    await federation.register("n")
    _, _, fields = await refusal(issued(federation, execution=ONCE, max_attempts=2))
    assert list(fields) == ["command.max_attempts"]


# ---- cancelling


async def test_a_queued_command_is_cancelled_at_once(federation: Federation) -> None:
    await federation.register("n")
    command_id = await issued(federation)
    assert (await cancel(federation, command_id, "no need")).state == CANCELLED
    ended = await command(federation, command_id)
    assert (ended.state_reason, ended.transitions[-1].actor) == ("no need", "admin:admin-env")
    assert (await cancel(federation, command_id)).state == CANCELLED  # again changes nothing


async def test_a_command_in_flight_is_cancelled_by_its_neuron_which_is_asked_in_each_session(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    command_id = await issued(federation)
    delivery = await neuron.command()
    await neuron.update(delivery, progressed=pb.CommandProgressed(fraction=0.5))
    await reached(federation, command_id, RUNNING)
    assert (await cancel(federation, command_id, "no need")).state == CANCELLING
    told = await neuron.cancelled()
    assert (told.command_id, told.attempt, told.reason) == (command_id, 1, "no need")
    assert await explained(federation, command_id) == ["WAITS_FOR_CANCEL"]
    neuron.call.cancel()
    back = BareNeuron(federation, token)
    await back.hello(running=[pb.RunningCommand(command_id=command_id, attempt=1)])
    assert await back.cancelled() == told
    back.sequence = neuron.sequence
    await back.finish(told, "CANCELLED")
    await reached(federation, command_id, CANCELLED)
    assert [state for state, _ in await history(federation, command_id)] == [
        "QUEUED",
        "SENT",
        "RUNNING",
        "CANCELLING",
        "CANCELLED",
    ]
    back.call.cancel()


async def test_a_command_that_ends_before_its_neuron_hears_of_the_cancel_ends_as_it_did(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(federation, max_attempts=3)
        delivery = await neuron.command()
        await cancel(federation, command_id)
        await neuron.finish(delivery, "FAILED", "BROKEN")
        assert (await reached(federation, command_id, *FINAL)).state == FAILED
        code, reason, _ = await refusal(cancel(federation, command_id))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "COMMAND_ENDED")


async def test_a_cancelled_command_that_was_never_accepted_is_not_sent_again(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    command_id = await issued(federation)
    await neuron.command()
    neuron.call.cancel()
    await cancel(federation, command_id)
    back = BareNeuron(federation, token)
    await back.hello()
    message = await back.receive()
    assert message.cancel_command.command_id == command_id
    await back.finish(message.cancel_command, "CANCELLED")
    await reached(federation, command_id, CANCELLED)
    back.call.cancel()


async def test_a_neuron_that_runs_what_nobody_waits_for_is_told_to_give_it_up(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    neuron = BareNeuron(federation, token)
    of_another = "00000000-0000-4000-8000-000000000001"
    await neuron.hello(running=[pb.RunningCommand(command_id=of_another, attempt=3)])
    told = await neuron.cancelled()
    assert (told.command_id, told.attempt) == (of_another, 3)
    await neuron.acked(await neuron.finish(told, "CANCELLED"))
    neuron.call.cancel()


# ---- again


async def test_a_command_that_has_ended_is_issued_anew_with_the_same_spec(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(
            federation, priority=7, max_attempts=2, run_timeout=span(60), retry_backoff=span(9)
        )
        _, reason, _ = await refusal(retry(federation, command_id))
        assert reason == "COMMAND_NOT_ENDED"
        await neuron.finish(await neuron.command(), "REJECTED", "BUSY")
        old = await reached(federation, command_id, *FINAL)
        new = await retry(federation, command_id, request_id="r")
        assert new.retry_of_command_id == command_id
        for name in ("type", "data", "priority", "max_attempts", "run_timeout", "retry_backoff"):
            assert getattr(new, name) == getattr(old, name)
        assert (await neuron.command()).command_id == new.command_id
        again = await retry(federation, command_id, request_id="r")
        assert again.command_id == new.command_id


# ---- following


async def test_a_watcher_goes_on_where_its_stream_broke_and_misses_nothing(
    federation: Federation,
) -> None:
    async with connected(federation, "n") as neuron:
        command_id = await issued(federation)
        watching = watch(federation, command_id)
        seen = [await anext(watching)]
        delivery = await neuron.command()
        while seen[-1].state != SENT:
            seen.append(await anext(watching))
        await watching.aclose()
        await neuron.update(delivery, accepted=pb.CommandAccepted())
        await neuron.update(delivery, progressed=pb.CommandProgressed(fraction=0.5))
        await neuron.finish(delivery, "SUCCEEDED")
        await reached(federation, command_id, *FINAL)
        seen += [shown async for shown in watch(federation, command_id, seen[-1].revision)]
        steps = [step for shown in seen for step in shown.transitions]
        assert steps == list((await command(federation, command_id)).transitions)
        assert len(steps) == 5


async def test_a_watcher_of_a_command_that_has_ended_gets_it_once(federation: Federation) -> None:
    await federation.register("n")
    command_id = await issued(federation)
    ended = await cancel(federation, command_id)
    (shown,) = [each async for each in watch(federation, command_id, ended.revision)]
    assert (shown.state, list(shown.transitions)) == (CANCELLED, [])


async def test_explain_says_what_a_waiting_command_waits_for(federation: Federation) -> None:
    token = await federation.register("n", max_concurrent_commands=1)
    first = await issued(federation)
    assert await explained(federation, first) == ["WAITS_FOR_NEURON", "EXPIRES"]
    neuron = BareNeuron(federation, token)
    await neuron.hello()
    await neuron.command()
    second = await issued(federation)
    assert await explained(federation, second) == ["WAITS_FOR_PLACE", "EXPIRES"]
    neuron.call.cancel()


@pytest.mark.parametrize("call", ["Cancel", "Retry", "Explain", "Watch"])
async def test_an_unknown_command_is_not_found(federation: Federation, call: str) -> None:
    request = getattr(command_service_pb2, f"{call}CommandRequest")(command_id="nothing")
    rpc = getattr(federation.command, f"{call}Command")(request, metadata=federation.admin)
    _, reason, _ = await refusal(rpc.read() if call == "Watch" else rpc)
    assert reason == "COMMAND_NOT_FOUND"
