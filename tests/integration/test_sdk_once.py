"""A neuron that runs once, against a federation whose calls fail when a test says so."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from federation.v1 import command_pb2
from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import (
    SessionServiceServicer,
    add_SessionServiceServicer_to_server,
)
from neuron_sdk import CommandContext, Neuron, NeuronConfig, lifecycle, pull_session
from neuron_sdk.backoff import Backoff
from neuron_sdk.convert import to_timestamp
from neuron_sdk.mode import Mode

State = command_pb2.CommandState
AWAY = grpc.StatusCode.UNAVAILABLE
T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext[Any, Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour at a pace that tests can wait for."""
    monkeypatch.setattr(
        pull_session, "Backoff", lambda most_s: Backoff(first_s=0.02, most_s=min(most_s, 0.1))
    )


@dataclass(frozen=True)
class Fault:
    """How a call fails."""

    code: grpc.StatusCode = AWAY
    reason: str = ""
    stored: bool = False
    """Only the answer is lost."""


class Desk(SessionServiceServicer):
    """Hands out commands, and keeps what it is told."""

    def __init__(self) -> None:
        self.waiting: list[pb.CommandDelivery] = []
        self.cancels: list[pb.CancelCommand] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.objection: Callable[[Any], Fault | None] = lambda _: None
        """What is wrong with a request, whenever it comes."""
        self.calls: list[tuple[str, Any]] = []
        self.updates: list[pb.CommandUpdate] = []
        self.marks: dict[str, int] = defaultdict(int)
        self.reports = 0
        self._given: dict[str, pb.CommandDelivery] = {}

    def give(self, kind: str, command_id: str = "c-1", **data: Any) -> None:
        """A command that waits."""
        delivery = pb.CommandDelivery(command_id=command_id, attempt=1, type=kind, max_attempts=1)
        delivery.data.update(data)
        self.waiting.append(delivery)

    def fail(self, name: str, *faults: Fault) -> None:
        """Lets the next calls fail, in this order."""
        self.faults[name].extend(faults)

    def called(self, name: str) -> list[Any]:
        """The requests of a call, in their order."""
        return [request for called, request in self.calls if called == name]

    @property
    def ends(self) -> list[tuple[str, str, str]]:
        """How commands ended: id, state and error code."""
        return [
            (
                each.command_id,
                State.Name(each.finished.state).removeprefix("COMMAND_STATE_"),
                each.finished.error.code,
            )
            for each in self.updates
            if each.HasField("finished")
        ]

    # ---- the calls

    def Connect(self, request_iterator: Any, context: Context) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def Deregister(self, request: Any, context: Context) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def RefreshToken(self, request: Any, context: Context) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def Register(  # noqa: N802 - gRPC's name
        self, request: pb.RegisterRequest, context: Context
    ) -> pb.RegisterResponse:
        lost = await self._begin("Register", request, context)
        now = time.time()
        token = pb.NeuronToken(
            token="t", expire_time=to_timestamp(now + 600), refresh_time=to_timestamp(now + 300)
        )
        return await _answer(pb.RegisterResponse(token=token), lost, context)

    async def SendHeartbeat(  # noqa: N802 - gRPC's name
        self, request: pb.SendHeartbeatRequest, context: Context
    ) -> pb.SendHeartbeatResponse:
        lost = await self._begin("SendHeartbeat", request, context)
        return await _answer(pb.SendHeartbeatResponse(), lost, context)

    async def ReportAnalytics(  # noqa: N802 - gRPC's name
        self, request: pb.ReportAnalyticsRequest, context: Context
    ) -> pb.ReportAnalyticsResponse:
        lost = await self._begin("ReportAnalytics", request, context)
        self.reports += self._fresh(request)
        mark = self.marks[request.spool_id]
        return await _answer(pb.ReportAnalyticsResponse(ack_sequence=mark), lost, context)

    async def PullCommands(  # noqa: N802 - gRPC's name
        self, request: pb.PullCommandsRequest, context: Context
    ) -> pb.PullCommandsResponse:
        lost = await self._begin("PullCommands", request, context)
        named = {each.command_id for each in request.running_commands}
        again = [each for key, each in self._given.items() if key not in named]
        fresh, self.waiting = self.waiting, []
        self._given |= {each.command_id: each for each in fresh}
        answer = pb.PullCommandsResponse(epoch=1, commands=again + fresh)
        return await _answer(answer, lost, context)

    async def ReportCommand(  # noqa: N802 - gRPC's name
        self, request: pb.ReportCommandRequest, context: Context
    ) -> pb.ReportCommandResponse:
        lost = await self._begin("ReportCommand", request, context)
        if self._fresh(request):
            self.updates.append(request.update)
            if request.update.HasField("finished"):
                self._given.pop(request.update.command_id, None)
        cancels, self.cancels = self.cancels, []
        answer = pb.ReportCommandResponse(
            ack_sequence=self.marks[request.spool_id], cancel_commands=cancels
        )
        return await _answer(answer, lost, context)

    def _fresh(self, request: pb.ReportCommandRequest | pb.ReportAnalyticsRequest) -> bool:
        fresh = request.sequence > self.marks[request.spool_id]
        self.marks[request.spool_id] = max(request.sequence, self.marks[request.spool_id])
        return fresh

    async def _begin(self, name: str, request: Any, context: Context) -> Fault | None:
        self.calls.append((name, request))
        fault = self.objection(request)
        if fault is None and self.faults[name]:
            fault = self.faults[name].popleft()
        if fault is not None and not fault.stored:
            await _abort(fault, context)
        return fault


async def _answer(answer: T, lost: Fault | None, context: Context) -> T:
    if lost is not None:
        await _abort(lost, context)
    return answer


async def _abort(fault: Fault, context: Context) -> None:
    if fault.reason:
        packed = AnyMessage()
        packed.Pack(error_details_pb2.ErrorInfo(reason=fault.reason, domain="federation"))
        status = status_pb2.Status(code=fault.code.value[0], details=[packed])
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(fault.code, "so it is")


@dataclass
class Bench:
    """A desk, and a neuron that runs once against it as often as a test likes."""

    desk: Desk
    address: str
    folder: Path

    def neuron(self) -> Neuron:
        """A neuron, to be decorated."""
        config = NeuronConfig(
            state_dir=self.folder,
            federation_url=self.address,
            enrollment_token="fet_one",
            metrics_enabled=False,
            stop_grace=5.0,
        )
        return Neuron("n-1", type="cron", config=config)

    async def run(self, neuron: Neuron | None = None) -> str:
        """One run. Returns why it failed; "" if it did not."""
        made = neuron or self.neuron()
        if neuron is None:
            made.command("add")(add)
        return (await lifecycle.serve(made, mode=Mode.ONCE)).failure


def add(a: float, b: float) -> dict[str, float]:
    return {"sum": a + b}


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    server = grpc.aio.server()
    desk = Desk()
    add_SessionServiceServicer_to_server(desk, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Bench(desk, f"127.0.0.1:{port}", tmp_path / "state")
    finally:
        await server.stop(0)


async def test_a_run_shows_itself_first_reports_before_it_pulls_again_and_shows_itself_last(
    bench: Bench,
) -> None:
    bench.desk.give("add", a=1, b=2)
    assert await bench.run() == ""
    names = [name for name, _ in bench.desk.calls]
    assert names[:3] == ["Register", "SendHeartbeat", "PullCommands"]
    assert names[-1] == "SendHeartbeat"
    assert "ReportAnalytics" in names
    assert names[names.index("PullCommands") + 1] == "ReportCommand"
    last_pull = len(names) - 1 - names[::-1].index("PullCommands")
    assert set(names[last_pull + 1 :]) <= {"ReportAnalytics", "SendHeartbeat"}
    kinds = [each.WhichOneof("update") for each in bench.desk.updates]
    assert kinds == ["accepted", "progressed", "finished"]


@pytest.mark.parametrize("call", ["Register", "SendHeartbeat", "PullCommands", "ReportCommand"])
@pytest.mark.parametrize("stored", [False, True])
async def test_a_call_that_fails_is_made_again_and_has_its_effect_once(
    bench: Bench, call: str, stored: bool
) -> None:
    bench.desk.give("add", a=1, b=2)
    slow = Fault(grpc.StatusCode.DEADLINE_EXCEEDED, stored=stored)
    bench.desk.fail(call, Fault(stored=stored), slow)
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]
    assert len(bench.desk.updates) == 3


async def test_a_last_report_whose_call_fails_is_sent_again(bench: Bench) -> None:
    bench.desk.fail("ReportAnalytics", Fault(), Fault(stored=True))
    assert await bench.run() == ""
    assert len({each.sequence for each in bench.desk.called("ReportAnalytics")}) == 1
    assert bench.desk.reports == 1


async def test_a_result_that_is_refused_is_replaced_by_one_that_says_so(bench: Bench) -> None:
    def object_to_success(request: Any) -> Fault | None:
        is_update = isinstance(request, pb.ReportCommandRequest)
        if is_update and request.update.finished.state == State.COMMAND_STATE_SUCCEEDED:
            return Fault(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        return None

    bench.desk.give("add", a=1, b=2)
    bench.desk.objection = object_to_success
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "FAILED", "INVALID_RESPONSE")]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE"),
    ],
)
async def test_a_heartbeat_or_a_report_that_is_refused_holds_nothing_up(
    bench: Bench, fault: Fault
) -> None:
    bench.desk.give("add", a=1, b=2)
    bench.desk.fail("SendHeartbeat", fault)
    bench.desk.fail("ReportAnalytics", fault)
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]
    assert len(bench.desk.called("ReportAnalytics")) == 1


async def test_a_token_that_expires_in_the_middle_is_replaced(bench: Bench) -> None:
    bench.desk.give("add", a=1, b=2)
    bench.desk.fail("ReportCommand", Fault(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"))
    assert await bench.run() == ""
    assert len(bench.desk.called("Register")) == 2
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]


async def test_a_server_that_is_no_federation_ends_the_run_at_once(bench: Bench) -> None:
    bench.desk.fail("Register", Fault(grpc.StatusCode.UNIMPLEMENTED))
    assert "leads to a gRPC server that is no federation" in await bench.run()
    assert [name for name, _ in bench.desk.calls] == ["Register"]


async def test_what_waits_longer_than_its_patience_gives_up_and_keeps_its_reports(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_session, "PATIENCE_S", 1.0)
    bench.desk.give("add", a=1, b=2)

    def away(request: Any) -> Fault | None:
        return Fault() if isinstance(request, pb.ReportCommandRequest) else None

    bench.desk.objection = away
    assert "kept in STATE_DIR for the next run" in await bench.run()
    assert bench.desk.updates == []
    bench.desk.objection = lambda _: None
    monkeypatch.undo()
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]


async def test_a_result_that_was_never_reported_is_named_in_the_next_run_s_first_pull(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_session, "PATIENCE_S", 1.0)
    bench.desk.give("add", a=1, b=2)

    def deaf(request: Any) -> Fault | None:
        return Fault() if isinstance(request, pb.ReportCommandRequest) else None

    bench.desk.objection = deaf
    assert await bench.run()
    bench.desk.objection = lambda _: None
    monkeypatch.undo()
    pulls = len(bench.desk.called("PullCommands"))
    assert await bench.run() == ""
    first, *_, last = bench.desk.called("PullCommands")[pulls:]
    assert [(each.command_id, each.attempt) for each in first.running_commands] == [("c-1", 1)]
    assert list(last.running_commands) == []


async def test_a_superseded_run_interrupts_what_runs_and_reports_it_in_the_next_one(
    bench: Bench,
) -> None:
    neuron = bench.neuron()
    seen: list[str] = []

    @neuron.command()
    async def hold(ctx: CommandContext) -> None:
        bench.desk.fail("ReportCommand", Fault(grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED"))
        await ctx.progress(0.5)
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(ctx.cancel_reason or "")

    bench.desk.give("hold")
    assert "SESSION_SUPERSEDED" in await bench.run(neuron)
    assert seen == ["another process of this neuron has begun"]
    assert bench.desk.ends == []
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "FAILED", "INTERRUPTED")]


async def test_a_run_that_is_superseded_when_it_pulls_interrupts_what_runs_and_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_session, "LEASE_S", 0.3)
    neuron = bench.neuron()
    seen: list[str] = []

    @neuron.command()
    async def hold(ctx: CommandContext) -> None:
        bench.desk.objection = object_to_an_epoch
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(ctx.cancel_reason or "")

    def object_to_an_epoch(request: Any) -> Fault | None:
        if isinstance(request, pb.PullCommandsRequest) and request.epoch:
            return Fault(grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED")
        return None

    bench.desk.give("hold")
    assert "another process runs with the same neuron_id" in await bench.run(neuron)
    assert seen == ["another process of this neuron has begun"]
    assert [each.epoch for each in bench.desk.called("PullCommands")] == [0, 1]
    bench.desk.objection = lambda _: None
    assert await bench.run() == ""
    assert bench.desk.called("PullCommands")[2].epoch == 0, "a new process begins"


async def test_a_run_that_works_renews_its_lease_by_pulls_of_its_epoch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_session, "LEASE_S", 0.3)
    neuron = bench.neuron()
    desk = bench.desk

    @neuron.command()
    async def hold() -> None:
        while len(desk.called("PullCommands")) < 5:  # noqa: ASYNC110 - the desk runs here
            await asyncio.sleep(0.01)

    desk.give("hold")
    assert await bench.run(neuron) == ""
    assert desk.ends == [("c-1", "SUCCEEDED", "")]
    epochs = [each.epoch for each in desk.called("PullCommands")]
    assert epochs == [0] + [1] * (len(epochs) - 1)
    assert len(desk.updates) == 3


async def test_a_cancel_in_the_answer_to_a_report_is_obeyed(bench: Bench) -> None:
    neuron = bench.neuron()

    @neuron.command()
    async def hold(ctx: CommandContext) -> None:
        bench.desk.cancels.append(pb.CancelCommand(command_id="c-1", attempt=1, reason="no need"))
        await ctx.progress(0.5)
        await asyncio.Event().wait()

    bench.desk.give("hold")
    assert await bench.run(neuron) == ""
    assert bench.desk.ends == [("c-1", "CANCELLED", "")]


async def test_a_run_that_is_told_to_stop_takes_no_more_and_reports_what_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_session, "LEASE_S", 0.3)
    neuron, desk = bench.neuron(), bench.desk
    pulls: list[int] = []

    @neuron.command()
    async def hold() -> None:
        neuron.stop()
        while renews():  # noqa: ASYNC110 - the desk runs here
            await asyncio.sleep(0.01)

    def renews() -> bool:
        pulls.append(len(desk.called("PullCommands")))
        desk.waiting = [pb.CommandDelivery(command_id="c-2", attempt=1, type="hold")]
        return len(desk.called("ReportCommand")) < 4

    desk.give("hold")
    assert await bench.run(neuron) == ""
    assert desk.ends == [("c-1", "SUCCEEDED", "")]
    assert set(pulls) == {1}
    assert len(desk.called("PullCommands")) == 1


async def test_a_run_that_is_told_to_stop_while_its_calls_fail_takes_no_more_either(
    bench: Bench,
) -> None:
    neuron, desk = bench.neuron(), bench.desk

    @neuron.command()
    async def hold(ctx: CommandContext) -> None:
        neuron.stop()
        desk.fail("ReportCommand", Fault(), Fault(stored=True))
        desk.give("hold", "c-2")
        while desk.faults["ReportCommand"]:
            await ctx.progress(0.5)
            await asyncio.sleep(0.01)

    desk.give("hold")
    assert await bench.run(neuron) == ""
    assert desk.ends == [("c-1", "SUCCEEDED", "")]
    assert len(desk.called("PullCommands")) == 1


async def test_an_old_copy_of_state_dir_becomes_another_spool_and_loses_nothing(
    bench: Bench,
) -> None:
    assert await bench.run() == ""
    (known,) = bench.desk.marks
    bench.desk.marks[known] += 1_000  # what the newer copy has sent
    bench.desk.give("add", a=1, b=2)
    assert await bench.run() == ""
    assert len(bench.desk.marks) == 2
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]
    kinds = [each.WhichOneof("update") for each in bench.desk.updates]
    assert kinds == ["accepted", "progressed", "finished"]


async def test_an_old_copy_of_state_dir_sends_nothing_again_that_was_stored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    desk = bench.desk
    desk.give("add", a=1, b=2)

    def lose_the_answer(request: Any) -> Fault | None:
        return Fault(stored=True) if isinstance(request, pb.ReportCommandRequest) else None

    desk.objection = lose_the_answer
    monkeypatch.setattr(pull_session, "PATIENCE_S", 1.0)
    assert "kept in STATE_DIR for the next run" in await bench.run()
    monkeypatch.undo()
    shutil.copytree(bench.folder, tmp_path / "copy")
    desk.objection = lambda _: None
    assert await bench.run() == ""
    assert await bench.run() == ""
    reports = desk.reports
    shutil.rmtree(bench.folder)
    (tmp_path / "copy").rename(bench.folder)
    desk.give("add", "c-2", a=1, b=2)
    assert await bench.run() == ""
    assert len(desk.marks) == 2
    assert desk.ends == [("c-1", "SUCCEEDED", ""), ("c-2", "SUCCEEDED", "")]
    assert len(desk.updates) == 6
    assert desk.reports == reports + 1, "the last report of the last run"


async def test_a_mark_that_no_spool_reaches_ends_the_run_at_once_and_nothing_is_lost(
    bench: Bench,
) -> None:
    assert await bench.run() == ""
    (known,) = bench.desk.marks
    mark, bench.desk.marks[known] = bench.desk.marks[known], 2**64 - 1
    bench.desk.give("add", a=1, b=2)
    assert "leads to a gRPC server that is no federation" in await bench.run()
    assert bench.desk.updates == []
    bench.desk.marks[known] = mark
    assert await bench.run() == ""
    assert bench.desk.ends == [("c-1", "SUCCEEDED", "")]
    assert list(bench.desk.marks) == [known]


async def test_commands_do_not_wait_for_a_start_that_fails(bench: Bench) -> None:
    neuron = bench.neuron()

    @neuron.on_start
    async def start() -> None:
        raise RuntimeError("no database")

    bench.desk.give("add", a=1, b=2)
    with pytest.raises(RuntimeError, match="no database"):
        await bench.run(neuron)
    assert bench.desk.calls == [], "nothing was taken that could not be done"
