"""The real SDK in real processes against the real server: what works, and what it survives.

One server on a PostgreSQL of this module's own, which the tests kill and stop; each neuron is a
process with a STATE_DIR of its own, and reaches the server through a proxy where a test cuts it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import (
    access_service_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
)
from tests.support.calls import (
    FINAL,
    ONLINE,
    State,
    answer,
    command,
    counted,
    done,
    has_presence,
    heartbeats,
    issue,
    online,
    outcomes,
    reached,
    shown,
    spec,
)
from tests.support.faults import Postgres, calling, serving
from tests.support.federation import Served
from tests.support.neuron_process import ROOT, NeuronProcess, exists, neuron_process
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess, free_port
from tests.support.proxy import Proxy, proxy
from tests.support.servers import refusal
from tests.support.waiting import eventually

TEN_LINES = str(ROOT / "examples" / "ten_lines.py")
SERVICE = ("-m", "tests.support.neuron_service")
OFFLINE = neuron_pb2.PRESENCE_OFFLINE
QUICK_RETRY = {"REFUSAL_RETRY": "0.5"}
SETTINGS = {
    "FEDERATION_DRAIN_TIMEOUT": "PT2S",
    # So long that no neuron goes OFFLINE here but by its Goodbye.
    "FEDERATION_OFFLINE_AFTER": "PT60S",
}


# ---- what the tests run on


class Service:
    """The tests' own neuron (tests/support/neuron_service.py), and the files that steer it."""

    def __init__(self, name: str, folder: Path, process: NeuronProcess) -> None:
        self.name = name
        self.process = process
        self._folder = folder

    def lines(self, name: str) -> list[str]:
        file = self._folder / name
        return file.read_text().splitlines() if file.exists() else []

    def touch(self, name: str) -> None:
        (self._folder / name).touch()

    def remove(self, name: str) -> None:
        (self._folder / name).unlink()

    async def pending(self) -> int:
        """How many messages wait for an acknowledgement."""
        pending: int = json.loads((await self.process.page("/status"))[1])["spool"]["pending"]
        return pending

    def ended(self, command_id: str) -> bool:
        """Whether its handler has ended and the journal knows."""
        return any(
            line["command_id"] == command_id for line in self.process.logged("command.ended")
        )


@contextmanager
def service(
    folder: Path, name: str, address: str, token: str = "", **environment: str
) -> Iterator[Service]:
    settings = {
        "NEURON_ID": name,
        "ENROLLMENT_TOKEN": token,
        "SERVICE_FOLDER": str(folder),
        "LOG_LEVEL": "DEBUG",
        **environment,
    }
    with neuron_process(folder, address, *SERVICE, **settings) as process:
        yield Service(name, folder, process)


@pytest_asyncio.fixture(scope="module")
async def busy(server: FederationProcess) -> AsyncIterator[Service]:
    """One service for every test that does not break it."""
    with ExitStack() as stack:
        folder = stack.enter_context(passable_folder())
        async with calling(server) as served:
            token = await served.enrollment_token()
            busy = stack.enter_context(service(folder, "busy", server.address, token))
            await online(served, "busy")
        yield busy


# ---- the ten lines


async def test_the_ten_lines_register_come_online_and_run_a_command_with_progress(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    settings = {"NEURON_ID": "ten", "ENROLLMENT_TOKEN": token}
    with neuron_process(folder, served.address, TEN_LINES, **settings) as neuron:
        found = await online(served, "ten")
        assert found.description.type == "data-processor"
        assert found.description.capabilities == ["data_processing"]
        assert "run_task" in {known.type for known in found.description.command_types}
        seen = [
            step.command
            async for step in served.command.ExecuteCommand(
                command_service_pb2.ExecuteCommandRequest(
                    command=spec("ten", "run_task", input_source="orders", limit=30_000)
                ),
                metadata=served.admin,
                timeout=60,
            )
        ]
        assert seen[-1].state == State.COMMAND_STATE_SUCCEEDED
        assert MessageToDict(seen[-1].response) == {"processed_records": 30_000}
        fractions = [step.progress.fraction for step in seen if step.HasField("progress")]
        assert any(0 < fraction < 1 for fraction in fractions)
        assert fractions == sorted(fractions)
        assert neuron.complaints() == []


async def test_bad_data_is_refused_before_the_neuron_by_the_name_of_each_field(
    served: Served, busy: Service
) -> None:
    call = served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(
            command=spec("busy", "block_thread", seconds="long", colour="red")
        ),
        metadata=served.admin,
    )
    code, reason, violations = await refusal(call)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(violations) == {"command.data.seconds", "command.data.colour"}


async def test_an_unadvertised_type_is_refused_and_if_sent_all_the_same_the_neuron_rejects_it(
    served: Served, busy: Service
) -> None:
    wanted = spec("busy", "sing")
    request = command_service_pb2.IssueCommandRequest(command=wanted)
    code, reason, _ = await refusal(served.command.IssueCommand(request, metadata=served.admin))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert reason == "COMMAND_TYPE_NOT_ADVERTISED"
    wanted.allow_unadvertised = True
    request = command_service_pb2.IssueCommandRequest(command=wanted)
    sent = await served.command.IssueCommand(request, metadata=served.admin)
    ended = await reached(served, sent.command.command_id, *FINAL)
    assert ended.state == State.COMMAND_STATE_REJECTED
    assert ended.error.code == "UNKNOWN_COMMAND"


@pytest.mark.parametrize(
    ("kind", "timeout_s", "state", "code", "said"),
    [
        ("raising", 0, "FAILED", "HANDLER_RAISED", "ValueError: no such row in postgresql://app"),
        ("not_json", 0, "FAILED", "INVALID_RESPONSE", "no JSON form"),
        ("too_large", 0, "FAILED", "RESPONSE_TOO_LARGE", "too large"),
        ("endless", 0.5, "TIMED_OUT", "TIMED_OUT", "longer than 0.5 s"),
    ],
)
async def test_a_handler_that_goes_wrong_ends_its_command_alone_and_says_why(  # noqa: PLR0917 - a table
    served: Served, busy: Service, kind: str, timeout_s: float, state: str, code: str, said: str
) -> None:
    ended = await done(served, "busy", kind, timeout_s=timeout_s)
    assert State.Name(ended.state) == f"COMMAND_STATE_{state}"
    assert ended.error.code == code
    assert said in ended.error.message
    assert "Traceback" not in f"{ended}"
    assert (await answer(served, "busy", "isolated", a=1))["twice"] == 2


@pytest.mark.parametrize("kind", ["block_thread", "block_loop"])
async def test_heartbeats_go_on_while_a_handler_blocks(
    served: Served, busy: Service, kind: str
) -> None:
    began = Timestamp()
    began.GetCurrentTime()
    command_id = await issue(served, "busy", kind, seconds=2.6)
    ended = await reached(served, command_id, *FINAL)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    during = [
        beat
        for beat in await heartbeats(served, "busy", since=began)
        if beat.running_commands == 1
        and ended.start_time.ToNanoseconds()
        <= beat.heartbeat_time.ToNanoseconds()
        <= ended.end_time.ToNanoseconds()
    ]
    assert len(during) >= 2


async def test_an_isolated_handler_runs_in_another_process_and_is_killed_when_its_time_is_over(
    served: Served, busy: Service
) -> None:
    ran = await answer(served, "busy", "isolated", a=21)
    assert ran["twice"] == 42
    assert ran["pid"] != busy.process.process.pid
    command_id = await issue(served, "busy", "isolated_endless", timeout_s=1.5)
    (first, *_) = await eventually(lambda: busy.lines("isolated"), describe="it runs")
    assert exists(int(first))
    ended = await reached(served, command_id, *FINAL)
    assert ended.state == State.COMMAND_STATE_TIMED_OUT
    await eventually(lambda: not exists(int(first)), describe="its process is gone")


# ---- what is built in


async def test_a_paused_neuron_says_so_and_starts_nothing_until_it_is_resumed(
    served: Served, busy: Service
) -> None:
    await answer(served, "busy", "pause")

    async def activity() -> int:
        return (await shown(served, "busy")).last_heartbeat.activity

    async def is_paused() -> bool:
        return await activity() == heartbeat_pb2.ACTIVITY_PAUSED

    waiting = await issue(served, "busy", "isolated", a=1)
    await eventually(is_paused, describe="its heartbeats say PAUSED")
    assert (await command(served, waiting)).state == State.COMMAND_STATE_ACCEPTED
    await answer(served, "busy", "resume")
    assert (await reached(served, waiting, *FINAL)).state == State.COMMAND_STATE_SUCCEEDED


async def test_health_check_and_restart_worker_answer_and_do_it(
    served: Served, busy: Service
) -> None:
    health = await answer(served, "busy", "health_check")
    assert health["status"] == "healthy"
    assert [found["name"] for found in health["dependencies"]] == ["storage"]
    before = len(busy.lines("workers"))
    assert await answer(served, "busy", "restart_worker", name="tick") == {"restarted": ["tick"]}
    await eventually(lambda: len(busy.lines("workers")) == before + 1, describe="it runs anew")


async def test_config_update_changes_the_pace_of_heartbeats(folder: Path, served: Served) -> None:
    token = await served.enrollment_token()
    with service(folder, "slow", served.address, token, HEARTBEAT_INTERVAL="60"):
        await online(served, "slow")
        assert len(await heartbeats(served, "slow")) == 1
        changed = await answer(served, "slow", "config_update", heartbeat_interval=1)
        assert changed["in_effect"]["heartbeat_interval"] == 1

        async def more() -> bool:
            return len(await heartbeats(served, "slow")) >= 4

        await eventually(more, describe="a heartbeat each second")


async def test_a_restart_by_command_runs_the_program_anew_in_the_same_process(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    with service(folder, "again", served.address, token) as neuron:
        first = await online(served, "again")
        assert await answer(served, "again", "restart") == {"restarted": True}
        second = await online(served, "again", epoch=2)
        assert second.session.instance_id != first.session.instance_id
        assert len(neuron.lines("workers")) == 2

        async def same_process() -> bool:
            beat = (await shown(served, "again")).last_heartbeat
            return beat.process.pid == neuron.process.process.pid and beat.uptime.seconds < 20

        await eventually(same_process, describe="a heartbeat of the same process")
        assert neuron.process.alive
        assert await neuron.process.stop() == 0


@pytest.mark.parametrize("how", ["SIGTERM", "command"])
async def test_a_stopped_neuron_is_offline_at_once_and_all_that_it_counted_has_arrived(
    folder: Path, served: Served, how: str
) -> None:
    name, token = f"stopped-{how.lower()}", await served.enrollment_token()
    with service(folder, name, served.address, token, ANALYTICS_INTERVAL="3600") as neuron:
        await online(served, name)
        if how == "command":
            assert await answer(served, name, "stop", reason="enough") == {"stopping": True}
        else:
            await neuron.process.stop()
        assert await neuron.process.ended() == 0
        await eventually(lambda: has_presence(served, name, OFFLINE), within=2, describe="OFFLINE")
        reason = (await shown(served, name)).presence_reason
        assert ("enough" if how == "command" else "SIGTERM") in reason
        (ticked,) = neuron.lines("ticks")
        assert await counted(served, name, "ticks") == int(ticked) > 0


# ---- faults


@pytest.mark.parametrize("fault", ["server killed", "database away", "connection cut"])
async def test_a_fault_between_disturbs_no_handler_loses_nothing_and_doubles_nothing(
    folder: Path, server: FederationProcess, doomed: Postgres, served: Served, fault: str
) -> None:
    name, token = fault.replace(" ", "-"), await served.enrollment_token()
    async with proxy(server.address) as between:
        with service(folder, name, between.address, token) as neuron:
            epoch = (await online(served, name)).session.epoch
            held = await issue(served, name, "hold")
            await reached(served, held, State.COMMAND_STATE_RUNNING)
            new_session = int(fault != "database away")
            async with _lasting(fault, server, doomed, between):
                await eventually(neuron.pending, describe="a spool that fills")
            await online(served, name, epoch=epoch + new_session)
            assert (await command(served, held)).state == State.COMMAND_STATE_RUNNING
            async with _lasting(fault, server, doomed, between):
                neuron.touch("release")
                await eventually(lambda: neuron.ended(held), describe="the handler has ended")
            ended = await reached(served, held, *FINAL)
            assert ended.state == State.COMMAND_STATE_SUCCEEDED
            await online(served, name, epoch=epoch + 2 * new_session)
            assert await neuron.process.stop() == 0
            ended = await command(served, held)
            assert (outcomes(ended), ended.attempt) == (1, 1)
            assert neuron.lines("runs") == [held]
            assert await counted(served, name, "ticks") == int(neuron.lines("ticks")[0]) > 0


@asynccontextmanager
async def _lasting(
    fault: str, server: FederationProcess, doomed: Postgres, between: Proxy
) -> AsyncIterator[None]:
    """The fault lasts as long as the block."""
    try:
        match fault:
            case "server killed":
                await asyncio.to_thread(server.kill)
            case "database away":
                await asyncio.to_thread(doomed.embedded.stop)
            case _:
                between.stall()
        yield
    finally:
        match fault:
            case "server killed":
                await asyncio.to_thread(server.start)
            case "database away":
                await asyncio.to_thread(doomed.start)
            case _:
                between.cut()
                between.go_on()


async def test_a_command_whose_neuron_is_killed_ends_interrupted_and_is_not_run_twice(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    with service(folder, "killed", served.address, token) as neuron:
        await online(served, "killed")
        held = await issue(served, "killed", "hold")
        await reached(served, held, State.COMMAND_STATE_RUNNING)
        neuron.process.kill()
        neuron.process.start()
        ended = await reached(served, held, *FINAL)
        assert ended.state == State.COMMAND_STATE_FAILED
        assert ended.error.code == "INTERRUPTED"
        neuron.touch("release")
        await answer(served, "killed", "hold")
        assert neuron.lines("runs")[0] == held
        assert len(neuron.lines("runs")) == 2


async def test_a_result_that_nobody_has_acknowledged_is_delivered_by_the_next_process(
    folder: Path, server: FederationProcess, served: Served
) -> None:
    token = await served.enrollment_token()
    async with proxy(server.address) as between:
        with service(folder, "unacked", between.address, token) as neuron:
            await online(served, "unacked")
            held = await issue(served, "unacked", "hold")
            await reached(served, held, State.COMMAND_STATE_RUNNING)
            between.stall()
            neuron.touch("release")
            await eventually(lambda: neuron.ended(held), describe="the handler has ended")
            neuron.process.kill()
            assert (await command(served, held)).state == State.COMMAND_STATE_RUNNING
            neuron.process.start(FEDERATION_URL=server.address)
            ended = await reached(served, held, *FINAL)
            assert ended.state == State.COMMAND_STATE_SUCCEEDED
            assert MessageToDict(ended.response) == {"held": 1}
            assert (neuron.lines("runs"), outcomes(ended)) == ([held], 1)


async def test_a_neuron_that_was_there_before_the_server_connects_when_it_comes(
    folder: Path, server: FederationProcess, served: Served
) -> None:
    token = await served.enrollment_token()
    server.kill()
    with service(folder, "early", server.address, token) as neuron:
        await eventually(lambda: neuron.process.logged("session.ended"), describe="it tries")
        assert (await neuron.process.health())[0] == 200
        server.start()
        await online(served, "early")


# ---- access


async def test_a_deactivated_neuron_lives_on_and_comes_back_when_it_is_activated(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    with service(folder, "shut-out", served.address, token, **QUICK_RETRY) as neuron:
        await online(served, "shut-out")
        await served.fleet.DeactivateNeuron(
            fleet_service_pb2.DeactivateNeuronRequest(neuron_id="shut-out", reason="broken"),
            metadata=served.admin,
        )
        await eventually(
            lambda: len(neuron.process.complaints()) >= 2, describe="it is refused and tries again"
        )
        problems = [line["problem"] for line in neuron.process.complaints()]
        assert all("must activate it" in problem for problem in problems)
        assert not await has_presence(served, "shut-out", ONLINE)
        assert (await neuron.process.health())[0] == 200
        await served.fleet.ActivateNeuron(
            fleet_service_pb2.ActivateNeuronRequest(neuron_id="shut-out"), metadata=served.admin
        )
        await online(served, "shut-out", epoch=2)
        assert len(neuron.lines("workers")) == 1


async def test_a_deleted_neuron_enrolls_again_if_its_token_still_may_and_loses_nothing(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    with service(folder, "deleted", served.address, token, **QUICK_RETRY) as neuron:
        first = await online(served, "deleted")
        await answer(served, "deleted", "config_update", analytics_interval=3600)
        await served.fleet.DeleteNeuron(
            fleet_service_pb2.DeleteNeuronRequest(neuron_id="deleted", force=True),
            metadata=served.admin,
        )
        await eventually(
            lambda: len(neuron.process.logged("registration.done")) == 2, describe="it enrolls"
        )
        second = await online(served, "deleted")
        assert second.create_time.ToNanoseconds() > first.create_time.ToNanoseconds()
        assert (await answer(served, "deleted", "isolated", a=1))["twice"] == 2
        before = await counted(served, "deleted", "ticks")
        assert await neuron.process.stop() == 0
        assert await counted(served, "deleted", "ticks") > before


@pytest.mark.parametrize("fault", ["wrong", "expired", "missing"])
async def test_a_neuron_that_may_not_enroll_says_so_once_and_serves_until_its_token_is_mended(
    folder: Path, served: Served, fault: str
) -> None:
    name, token = f"{fault}-token", "fet_of-nobody-in-this-federation"
    if fault == "expired":
        token = await _expired_token(served)
    token = "" if fault == "missing" else token
    with service(folder, name, served.address, token) as neuron:
        (line,) = await eventually(neuron.process.complaints, describe="the complaint")
        assert line["action"] == "session.ended"
        assert "ENROLLMENT_TOKEN" in line["problem"]
        assert line["retry_s"] >= 60
        assert (await neuron.process.health())[0] == 200
        # The control thread complains without waiting for the service's start.
        await eventually(lambda: neuron.lines("workers"), describe="the worker runs")
        assert await neuron.process.stop() == 0
        assert neuron.lines("workers") == ["started"]
        neuron.process.start(ENROLLMENT_TOKEN=await served.enrollment_token())
        await online(served, name)
        # Counted before anybody knew this neuron, and delivered all the same.
        assert await neuron.process.stop() == 0
        ticked = sum(int(line) for line in neuron.lines("ticks"))
        assert await counted(served, name, "ticks") == ticked


async def _expired_token(served: Served) -> str:
    made = await served.access.CreateEnrollmentToken(
        access_service_pb2.CreateEnrollmentTokenRequest(ttl=Duration(seconds=1)),
        metadata=served.admin,
    )

    async def is_over() -> bool:
        found = await served.access.ListEnrollmentTokens(
            access_service_pb2.ListEnrollmentTokensRequest(page_size=1000), metadata=served.admin
        )
        now = Timestamp()
        now.GetCurrentTime()
        times = {each.enrollment_token_id: each.expire_time for each in found.enrollment_tokens}
        expiry = times[made.enrollment_token.enrollment_token_id]
        return expiry.ToNanoseconds() < now.ToNanoseconds()

    await eventually(is_over, describe="the token has expired")
    return made.secret


async def test_a_neuron_whose_id_is_taken_says_so_once_and_comes_when_it_gets_its_own(
    folder: Path, served: Served, busy: Service
) -> None:
    token = await served.enrollment_token()
    epoch = (await shown(served, "busy")).session.epoch
    with service(folder, "busy", served.address, token) as neuron:
        (line,) = await eventually(neuron.process.complaints, describe="the complaint")
        assert "is taken" in line["problem"]
        assert "choose another" in line["problem"]
        assert (await neuron.process.health())[0] == 200
        assert (await shown(served, "busy")).session.epoch == epoch
        assert await neuron.process.stop() == 0
        neuron.process.start(NEURON_ID="its-own")
        await online(served, "its-own")


async def test_two_processes_with_one_neuron_s_state_displace_each_other_no_faster_than_they_must(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    copy = folder / "copy"
    with service(folder, "twin", served.address, token, **QUICK_RETRY) as older:
        await online(served, "twin")
        copy.mkdir()
        (copy / "state").mkdir()
        shutil.copy(older.process.state_dir / "token", copy / "state" / "token")
        with service(copy, "twin", served.address, **QUICK_RETRY) as newer:
            (line,) = await eventually(older.process.complaints, describe="the older one's word")
            assert "same neuron_id" in line["problem"]
            assert line["retry_s"] >= 60  # the server's word counts for more than REFUSAL_RETRY
            await online(served, "twin", epoch=2)
            assert len(older.process.logged("session.opened")) == 1
            assert len(newer.process.logged("session.opened")) == 1


async def test_two_processes_that_enroll_with_one_id_displace_each_other_no_faster_than_they_must(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token(allow_reenrollment=True)
    copy = folder / "copy"
    copy.mkdir()
    with service(folder, "clone", served.address, token) as older:
        await online(served, "clone")
        with service(copy, "clone", served.address, token) as newer:
            (line, *_) = await eventually(older.process.complaints, describe="the older one's word")
            assert "same neuron_id" in line["problem"]
            assert line["retry_s"] >= 60
            await online(served, "clone", epoch=2)
            assert len(older.process.logged("session.opened")) == 1
            assert len(newer.process.logged("session.opened")) == 1


async def test_a_token_is_renewed_while_the_stream_lives_and_serves_for_the_next_one(
    folder: Path, doomed: Postgres
) -> None:
    ttl = {"FEDERATION_TOKEN_TTL": "PT4S"}
    with (
        passable_folder() as data,
        serving(doomed, data, **SETTINGS, **ttl) as server,
    ):
        async with calling(server) as served, proxy(server.address) as between:
            token = await served.enrollment_token()
            with service(folder, "renewed", between.address, token) as neuron:
                await online(served, "renewed")
                first = neuron.process.token
                await eventually(
                    lambda: len(neuron.process.logged("token.renewed")) >= 3,
                    within=15,
                    describe="the first token's life is over",
                )
                assert neuron.process.token != first
                assert (await shown(served, "renewed")).session.epoch == 1
                between.cut()
                await online(served, "renewed", epoch=2)
                assert len(neuron.process.logged("registration.done")) == 1


# ---- what it shows and tells


async def test_the_local_pages_show_health_status_and_metrics_and_503_while_a_need_is_not_met(
    served: Served, busy: Service
) -> None:
    status, health = await busy.process.health()
    assert (status, health["status"]) == (200, "healthy")
    assert health["uptime"] > 0
    assert health["health_score"] > 0
    shows = json.loads((await busy.process.page("/status"))[1])
    assert shows["neuron_id"] == "busy"
    assert shows["federation"]["connected"] is True
    assert shows["federation"]["epoch"] == (await shown(served, "busy")).session.epoch
    assert "hold" in shows["commands"]
    assert "ticks_total" in (await busy.process.page("/metrics"))[1]
    busy.touch("storage-down")

    async def unhealthy() -> bool:
        status, health = await busy.process.health()
        (found,) = health["dependencies"]
        down = (found["name"], found["state"]) == ("storage", "DOWN")
        return status == 503 and health["status"] == "unhealthy" and down

    async def healthy() -> bool:
        return (await busy.process.health())[0] == 200

    await eventually(unhealthy, describe="503, and which dependency")

    async def seen() -> bool:
        (found,) = (await shown(served, "busy")).last_heartbeat.dependencies
        return found.state == heartbeat_pb2.DEPENDENCY_STATE_DOWN and "disk" in found.message

    await eventually(seen, describe="the federation knows")
    busy.remove("storage-down")
    await eventually(healthy, describe="200 again")


async def test_a_taken_metrics_port_is_one_clear_error_and_the_service_goes_on(
    folder: Path, served: Served
) -> None:
    token = await served.enrollment_token()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with service(folder, "portless", served.address, token, METRICS_PORT=port) as neuron:
            await online(served, "portless")
            (line,) = neuron.process.complaints()
            assert f"METRICS_PORT {port} on 127.0.0.1 is in use" in line["error"]
            assert (await answer(served, "portless", "isolated", a=1))["twice"] == 2


async def test_with_port_zero_the_log_says_where_the_pages_are(
    folder: Path, served: Served
) -> None:
    with service(folder, "portzero", f"127.0.0.1:{free_port()}", METRICS_PORT="0") as neuron:
        (line,) = await eventually(
            lambda: neuron.process.logged("http.started"), describe="where the pages are"
        )
        neuron.process.http_port = line["port"]
        assert (await neuron.process.health())[0] == 200


async def test_logs_are_json_lines_and_hold_no_secret_even_at_debug(
    folder: Path, served: Served
) -> None:
    token, wrong = await served.enrollment_token(), "fet_a-wrong-one-that-is-long-enough"
    with service(folder, "discreet", served.address, wrong, **QUICK_RETRY) as neuron:
        await eventually(neuron.process.complaints, describe="the complaint")
        await neuron.process.stop()
        neuron.process.start(ENROLLMENT_TOKEN=token)
        await online(served, "discreet")
        failed = await done(served, "discreet", "raising")
        assert "looking for the row" in failed.log_tail
        await answer(served, "discreet", "restart")
        await online(served, "discreet", epoch=2)
        shows = (await neuron.process.page("/status"))[1]
        own = neuron.process.token
        assert await neuron.process.stop() == 0
        lines = neuron.process.logs
        assert {line["level"] for line in lines} >= {"debug", "info", "warning"}
        assert all(line["timestamp"] and line["logger"] for line in lines)
        everything = f"{neuron.process.output}{shows}{failed}"
        for secret in (token, wrong, own, own.split(".")[2], "hunter2-in-a-log", "hunter3"):
            assert secret not in everything
