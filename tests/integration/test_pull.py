"""Commands for neurons that hold no stream, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import (
    command_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
)
from federation.v1 import session_service_pb2 as pb
from federation.v1.command_service_pb2 import CommandSpec
from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.access import NeuronIdentity, TokenLifetime
from federation_server.live.writer import Writer
from federation_server.rpc import auth, errors
from federation_server.rpc.registration import Registration
from federation_server.rpc.session import SessionServicer
from federation_server.rpc.stream import StreamParts
from federation_server.rpc.tokens import Tokens
from tests.support.calls import FINAL, State, command, reached, shown
from tests.support.federation import BareNeuron, Federation, running
from tests.support.servers import refusal

REPORT = report_pb2.AnalyticsReport(
    start_time=Timestamp(seconds=1),
    end_time=Timestamp(seconds=2),
    points=[report_pb2.MetricPoint(name="rows", counter=1)],
)
ONCE = command_pb2.EXECUTION_AT_MOST_ONCE


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url, presence_patience="PT0S") as federation:
        yield federation


class Puller:
    """A process of a neuron that calls for its commands."""

    def __init__(self, federation: Federation, token: str, instance: str = "p-1") -> None:
        self.session = federation.session
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.instance = instance
        self.epoch = 0
        self.sequence = 0

    async def pull(self, **fields: Any) -> pb.PullCommandsResponse:
        """What there is to do."""
        request = pb.PullCommandsRequest(instance_id=self.instance, **fields)
        answer = await self.session.PullCommands(request, metadata=self.metadata)
        self.epoch = answer.epoch
        return answer

    async def one(self, **fields: Any) -> pb.CommandDelivery:
        """The one command that there is."""
        (delivery,) = (await self.pull(**fields)).commands
        return delivery

    async def update(
        self, of: pb.CommandDelivery | pb.CancelCommand, **update: Any
    ) -> pb.ReportCommandResponse:
        """Says what became of a command."""
        self.sequence += 1
        request = pb.ReportCommandRequest(
            epoch=self.epoch,
            spool_id=self.instance,
            sequence=self.sequence,
            update=pb.CommandUpdate(command_id=of.command_id, attempt=of.attempt, **update),
        )
        return await self.session.ReportCommand(request, metadata=self.metadata)

    async def finish(
        self, of: pb.CommandDelivery | pb.CancelCommand, state: str = "SUCCEEDED"
    ) -> pb.ReportCommandResponse:
        """Says how a command ended."""
        ended = command_pb2.CommandState.Value(f"COMMAND_STATE_{state}")
        return await self.update(of, finished=pb.CommandFinished(state=ended))


async def issued(federation: Federation, **fields: Any) -> str:
    answer = await federation.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(
            command=CommandSpec(neuron_id="n", type="run", **fields)
        ),
        metadata=federation.admin,
    )
    return answer.command.command_id


async def state(federation: Federation, command_id: str) -> str:
    found = (await command(federation, command_id)).state
    return State.Name(found).removeprefix("COMMAND_STATE_")


def span(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


async def test_a_pulled_command_goes_its_whole_way(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    command_id = await issued(federation)
    delivery = await puller.one()
    assert (delivery.command_id, delivery.attempt) == (command_id, 1)
    await puller.update(delivery, accepted=pb.CommandAccepted())
    await puller.update(delivery, progressed=pb.CommandProgressed(fraction=0.5))
    assert await state(federation, command_id) == "RUNNING"
    assert (await puller.finish(delivery)).ack_sequence == 3
    assert await state(federation, command_id) == "SUCCEEDED"
    assert list((await puller.pull()).commands) == []


async def test_a_repeated_report_has_its_effect_once(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    command_id = await issued(federation)
    delivery = await puller.one()
    await puller.finish(delivery)
    puller.sequence = 0
    assert (await puller.finish(delivery, "CANCELLED")).ack_sequence == 1
    assert await state(federation, command_id) == "SUCCEEDED"


async def test_no_more_is_pulled_than_the_neuron_and_the_caller_want(
    federation: Federation,
) -> None:
    token = await federation.register("n", max_concurrent_commands=3)
    puller = Puller(federation, token)
    for _ in range(5):
        await issued(federation)
    first = (await puller.pull(max_commands=2)).commands
    assert len(first) == 2
    held = [pb.RunningCommand(command_id=each.command_id, attempt=1) for each in first]
    assert len((await puller.pull(running_commands=held)).commands) == 1


async def test_what_an_answer_lost_is_sent_again_and_what_the_process_has_is_not(
    federation: Federation,
) -> None:
    puller = Puller(federation, await federation.register("n"))
    await issued(federation)
    lost = await puller.one()  # and never seen
    again = await puller.one()
    assert (again.command_id, again.attempt) == (lost.command_id, 1)
    named = [pb.RunningCommand(command_id=again.command_id, attempt=1)]
    assert list((await puller.pull(running_commands=named)).commands) == []


async def test_what_must_not_run_twice_and_was_lost_on_the_way_is_never_sent_again(
    federation: Federation,
) -> None:
    puller = Puller(federation, await federation.register("n"))
    command_id = await issued(federation, execution=ONCE)
    await puller.one()  # and never seen
    assert list((await puller.pull()).commands) == []
    assert await state(federation, command_id) == "OUTCOME_UNKNOWN"


async def test_of_two_processes_the_newer_holds_the_session_and_the_older_changes_nothing(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    older, newer = Puller(federation, token, "old"), Puller(federation, token, "new")
    command_id = await issued(federation)
    delivery = await older.one()
    again = await newer.one()
    assert (again.command_id, again.attempt) == (command_id, 1)
    assert newer.epoch == older.epoch + 1
    code, reason, _ = await refusal(older.finish(delivery))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED")
    assert await state(federation, command_id) == "SENT"
    await newer.finish(again)
    assert await state(federation, command_id) == "SUCCEEDED"


async def test_a_process_that_was_superseded_is_told_so_when_it_pulls_and_takes_nothing_back(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    older, newer = Puller(federation, token, "old"), Puller(federation, token, "new")
    await older.pull()
    await older.pull(epoch=older.epoch)
    assert older.epoch == 1
    command_id = await issued(federation)
    delivery = await newer.one()
    code, reason, _ = await refusal(older.pull(epoch=older.epoch))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED")
    await newer.finish(delivery)
    assert await state(federation, command_id) == "SUCCEEDED"
    assert (await newer.pull(epoch=newer.epoch)).epoch == 2
    stream = BareNeuron(federation, token)
    await stream.hello()
    _, reason, _ = await refusal(newer.pull(epoch=newer.epoch))
    assert reason == "SESSION_SUPERSEDED"
    stream.call.cancel()


async def test_a_process_that_names_no_epoch_takes_the_session_over(federation: Federation) -> None:
    token = await federation.register("n")
    older, newer = Puller(federation, token, "old"), Puller(federation, token, "new")
    epochs = [(await each.pull()).epoch for each in (older, newer, older, older)]
    assert epochs == [1, 2, 3, 3]


async def test_a_process_whose_session_an_admin_ended_goes_on_once_it_may(
    federation: Federation,
) -> None:
    puller = Puller(federation, await federation.register("n"))
    await puller.pull()
    await federation.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    await federation.fleet.ActivateNeuron(
        fleet_service_pb2.ActivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    before = puller.epoch
    assert (await puller.pull(epoch=before)).epoch > before


async def test_a_pull_supersedes_a_stream_and_a_stream_a_pull(federation: Federation) -> None:
    token = await federation.register("n")
    stream = BareNeuron(federation, token)
    await stream.hello()
    command_id = await issued(federation)
    await stream.command()
    puller = Puller(federation, token)
    delivery = await puller.one()
    assert delivery.command_id == command_id
    code, _ = await stream.end()
    assert code is grpc.StatusCode.ABORTED
    back = BareNeuron(federation, token)
    await back.hello()
    _, reason, _ = await refusal(puller.finish(delivery))
    assert reason == "SESSION_SUPERSEDED"
    assert (await back.command()).command_id == command_id
    back.call.cancel()


async def test_what_a_process_holds_fails_with_its_lease_and_is_tried_again(
    federation: Federation,
) -> None:
    puller = Puller(federation, await federation.register("n"))
    tried = await issued(federation, max_attempts=2, retry_backoff=span(0.01))
    once = await issued(federation, execution=ONCE)
    both = (await puller.pull(lease_duration=span(1))).commands
    assert {each.command_id for each in both} == {tried, once}
    waiting = await reached(federation, tried, State.COMMAND_STATE_QUEUED)
    assert waiting.error.code == "LEASE_EXPIRED"
    ended = await reached(federation, once, *FINAL)
    assert ended.state == State.COMMAND_STATE_OUTCOME_UNKNOWN
    assert (await puller.one()).attempt == 2


async def test_each_pull_and_each_report_renews_the_lease(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    await issued(federation)
    answer = await puller.pull(lease_duration=span(600))
    (delivery,) = answer.commands
    report = await puller.update(delivery, accepted=pb.CommandAccepted())
    again = await puller.pull(lease_duration=span(600))
    times = [each.lease_expire_time.ToNanoseconds() for each in (answer, report, again)]
    assert times == sorted(set(times))


async def test_a_process_hears_of_a_cancel_when_it_calls(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    command_id = await issued(federation)
    delivery = await puller.one()
    await federation.command.CancelCommand(
        command_service_pb2.CancelCommandRequest(command_id=command_id, reason="no need"),
        metadata=federation.admin,
    )
    report = await puller.update(delivery, progressed=pb.CommandProgressed(fraction=0.5))
    (told,) = report.cancel_commands
    assert (told.command_id, told.attempt, told.reason) == (command_id, 1, "no need")
    await puller.finish(told, "CANCELLED")
    assert await state(federation, command_id) == "CANCELLED"


async def test_a_batch_reaches_a_neuron_that_pulls(federation: Federation) -> None:
    token = await federation.register("n")
    request = command_service_pb2.IssueCommandBatchRequest(
        filter='neuron_id = "n"', command=CommandSpec(type="run"), max_in_flight=1
    )
    await federation.command.IssueCommandBatch(request, metadata=federation.admin)
    assert (await Puller(federation, token).one()).type == "run"


async def test_a_neuron_that_pulls_is_shown_with_its_lease_and_not_with_its_last_stream(
    federation: Federation,
) -> None:
    token = await federation.register("n")
    stream = BareNeuron(federation, token)
    await stream.hello()
    puller = Puller(federation, token)
    answer = await puller.pull()
    listed = await federation.fleet.ListNeurons(
        fleet_service_pb2.ListNeuronsRequest(), metadata=federation.admin
    )
    lease = neuron_pb2.SessionInfo(
        epoch=2, instance_id="p-1", lease_expire_time=answer.lease_expire_time
    )
    assert [each.session for each in listed.neurons] == [lease]
    assert (await shown(federation, "n")).session == lease
    back = BareNeuron(federation, token)
    await back.hello()
    session = (await shown(federation, "n")).session
    assert (session.open, session.epoch, session.HasField("lease_expire_time")) == (True, 3, False)
    back.call.cancel()


async def test_a_deactivated_neuron_pulls_nothing(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    await federation.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    _, reason, _ = await refusal(puller.pull())
    assert reason == "NEURON_DEACTIVATED"


async def test_the_lease_of_a_neuron_that_is_deactivated_is_over(federation: Federation) -> None:
    puller = Puller(federation, await federation.register("n"))
    await puller.pull()
    request = fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n")
    await federation.fleet.DeactivateNeuron(request, metadata=federation.admin)
    answer = await federation.fleet.GetNeuron(
        fleet_service_pb2.GetNeuronRequest(neuron_id="n"), metadata=federation.admin
    )
    assert answer.neuron.session.lease_expire_time.ToDatetime() <= datetime.now(UTC).replace(
        tzinfo=None
    )


@pytest.mark.parametrize(
    ("call", "fate", "reason"),
    [
        ("SendHeartbeat", "deactivated", "NEURON_DEACTIVATED"),
        ("SendHeartbeat", "deleted", "CREDENTIAL_INVALID"),
        ("ReportAnalytics", "deactivated", "NEURON_DEACTIVATED"),
        ("ReportAnalytics", "deleted", "CREDENTIAL_INVALID"),
        ("ReportCommand", "deactivated", "NEURON_DEACTIVATED"),
        ("ReportCommand", "deleted", "CREDENTIAL_INVALID"),
        ("ReportCommand", "enrolled anew", "CREDENTIAL_INVALID"),
    ],
)
async def test_a_neuron_hears_what_became_of_it_in_the_middle_of_a_call(
    federation: Federation, call: str, fate: str, reason: str
) -> None:
    token = await federation.register("n")
    puller = Puller(federation, token)
    await issued(federation)
    delivery = await puller.one()
    tokens = await Tokens.load(federation.app.database, TokenLifetime())
    let_in = tokens.verify(token)
    match fate:
        case "deactivated":
            await federation.fleet.DeactivateNeuron(
                fleet_service_pb2.DeactivateNeuronRequest(neuron_id="n"), metadata=federation.admin
            )
        case "deleted":
            await federation.fleet.DeleteNeuron(
                fleet_service_pb2.DeleteNeuronRequest(neuron_id="n", force=True),
                metadata=federation.admin,
            )
        case _:
            anew = await federation.enrollment_token(allow_reenrollment=True)
            description = neuron_pb2.NeuronDescription(neuron_id="n", type="worker")
            await federation.session.Register(
                pb.RegisterRequest(description=description, enrollment_token=anew)
            )
    requests = {
        "SendHeartbeat": pb.SendHeartbeatRequest(
            heartbeat=heartbeat_pb2.Heartbeat(), instance_id="p-1"
        ),
        "ReportAnalytics": pb.ReportAnalyticsRequest(
            spool_id="p-1", sequence=1, send_time=Timestamp(seconds=3), report=REPORT
        ),
        "ReportCommand": pb.ReportCommandRequest(
            epoch=puller.epoch,
            spool_id="p-1",
            sequence=1,
            update=pb.CommandUpdate(
                command_id=delivery.command_id, attempt=1, accepted=pb.CommandAccepted()
            ),
        ),
    }
    with pytest.raises(errors.Refused) as refused:
        await beyond_the_gate(federation, let_in, call, requests[call])
    assert ErrorReason.Name(refused.value.reason) == f"ERROR_REASON_{reason}"


async def test_a_report_that_there_is_no_room_for_is_to_be_sent_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = (("authorization", f"Bearer {await federation.register('n')}"),)
    request = pb.ReportAnalyticsRequest(
        spool_id="p-1", sequence=1, send_time=Timestamp(seconds=3), report=REPORT
    )
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "full", True)
        refused = await refusal(federation.session.ReportAnalytics(request, metadata=metadata))
        assert refused == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE", {})
    answer = await federation.session.ReportAnalytics(request, metadata=metadata)
    assert answer.ack_sequence == 1


async def beyond_the_gate(
    federation: Federation, let_in: NeuronIdentity, call: str, request: Any
) -> None:
    """Serves a call whose token was good when it was looked at."""
    app = federation.app
    tokens = await Tokens.load(app.database, TokenLifetime())
    parts = StreamParts(
        database=app.database,
        writer=app.writer,
        sessions=app.sessions,
        opener=app.opener,
        approvals=app.approvals,
        dispatcher=app.dispatcher,
        metrics=app.metrics,
        admission=app.admission,
        rates=app.rates,
        message_rate=1000.0,
        pacing=app.pacing,
        settings=app.session_settings,
        server_id=app.server_id,
        server_version="1",
        changed=lambda changes: None,
    )
    auth._principal.set(let_in)
    await getattr(SessionServicer(Registration(app.database, tokens), parts), call)(request, None)
