"""`neuron run --once` in real processes against the real server: a neuron that comes and goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from federation.v1 import (
    command_pb2,
    command_service_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
)
from federation.v1 import session_service_pb2 as pb
from tests.support.calls import (
    FINAL,
    State,
    command,
    counted,
    heartbeats,
    issue,
    outcomes,
    reached,
    shown,
    spec,
)
from tests.support.faults import Postgres, calling, serving
from tests.support.federation import Served
from tests.support.neuron_process import ROOT, NeuronProcess
from tests.support.postgres import passable_folder
from tests.support.processes import free_port
from tests.support.waiting import eventually

ONCE = ("-m", "neuron_sdk.cli", "run", "--once", "tests.support.once_service:neuron")
TEN_LINES = str(ROOT / "examples" / "ten_lines.py")
SETTINGS = {
    "FEDERATION_DRAIN_TIMEOUT": "PT2S",
    "FEDERATION_OFFLINE_AFTER": "PT60S",
    # A lease that runs out is noticed at once.
    "FEDERATION_PRESENCE_PATIENCE": "PT0S",
}
SHORT_LEASE = {"ONCE_LEASE": "6"}


class Cron:
    """A neuron that is run again and again, and the files that steer it."""

    def __init__(self, name: str, folder: Path, address: str, **environment: str) -> None:
        self.name = name
        self.folder = folder
        self.process = NeuronProcess(
            folder,
            address,
            *ONCE,
            NEURON_ID=name,
            ONCE_FOLDER=str(folder),
            METRICS_ENABLED="false",
            **environment,
        )

    async def run(self, **environment: str) -> int:
        """One run, from its start to its end. Returns its exit status."""
        self.process.start(**environment)
        return await self.process.ended()

    async def succeeds(self) -> None:
        """One run in which nothing goes wrong."""
        assert await self.run() == 0, self.process.output

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    async def holds(self, count: int = 1) -> None:
        """Waits until that many held commands have started."""
        await eventually(
            lambda: len(self.lines("runs")) >= count, within=20, describe="a held command runs"
        )

    def release(self) -> None:
        """Lets held commands end."""
        (self.folder / "release").touch()

    @property
    def last_line(self) -> str:
        """What it has printed last."""
        return self.process.output.splitlines()[-1]


Made = Callable[..., Awaitable[Cron]]


@contextmanager
def crons(folder: Path, served: Served) -> Iterator[Made]:
    """Makes neurons that are registered; kills what still runs at the end."""
    made: list[Cron] = []

    async def make(name: str, **environment: str) -> Cron:
        home = folder / name
        home.mkdir()
        token = await served.enrollment_token()
        address = environment.pop("address", served.address)
        made.append(Cron(name, home, address, ENROLLMENT_TOKEN=token, **environment))
        return made[-1]

    try:
        yield make
    finally:
        for cron in made:
            cron.process.kill()


@pytest.fixture
def cron(folder: Path, served: Served) -> Iterator[Made]:
    with crons(folder, served) as make:
        yield make


async def known(made: Made, name: str, **environment: str) -> Cron:
    """A neuron that the federation knows from an earlier run."""
    cron = await made(name, **environment)
    await cron.succeeds()
    return cron


async def test_a_run_with_nothing_to_do_shows_the_neuron_and_ends(
    cron: Made, served: Served
) -> None:
    idle = await cron("idle")
    await idle.succeeds()
    assert idle.lines("hooks") == ["start", "stop"]
    assert idle.process.complaints() == []
    first, *_, last = sorted(
        await heartbeats(served, "idle"), key=lambda beat: beat.heartbeat_time.ToNanoseconds()
    )
    assert first.activity == heartbeat_pb2.ACTIVITY_ACTIVE
    assert last.activity == heartbeat_pb2.ACTIVITY_STOPPING
    assert not (await shown(served, "idle")).session.open


async def test_a_command_that_waits_is_carried_out_with_its_progress_and_its_result(
    cron: Made, served: Served
) -> None:
    plus = await known(cron, "plus")
    command_id = await issue(served, "plus", "add", a=2, b=3)
    await plus.succeeds()
    ended = await command(served, command_id)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    assert MessageToDict(ended.response) == {"sum": 5}
    assert MessageToDict(ended.checkpoint) == {"a": 2}
    assert ended.progress.message == "halfway"
    ways = [step.state for step in ended.transitions]
    assert ways[-4:] == [
        State.COMMAND_STATE_SENT,
        State.COMMAND_STATE_ACCEPTED,
        State.COMMAND_STATE_RUNNING,
        State.COMMAND_STATE_SUCCEEDED,
    ]
    assert plus.process.complaints() == []


async def test_the_ten_lines_run_as_a_cron_job_and_print_nothing_if_all_is_well(
    cron: Made, served: Served
) -> None:
    ten = await cron("ten-by-cron", LOG_LEVEL="ERROR")
    ten.process = NeuronProcess(
        ten.folder,
        served.address,
        *ONCE[:-1],
        f"{TEN_LINES}:neuron",
        **{
            name: ten.process.environment[name]
            for name in ("NEURON_ID", "ENROLLMENT_TOKEN", "LOG_LEVEL", "METRICS_ENABLED")
        },
    )
    await ten.succeeds()
    command_id = await issue(served, "ten-by-cron", "run_task", input_source="orders", limit=30)
    await ten.succeeds()
    ended = await command(served, command_id)
    assert MessageToDict(ended.response) == {"processed_records": 30}
    assert ten.process.output == ""


async def test_a_script_that_runs_its_neuron_itself_comes_and_goes_as_well(
    cron: Made, served: Served, tmp_path: Path
) -> None:
    script = tmp_path / "by_itself.py"
    script.write_text("from neuron_sdk import Neuron\nneuron = Neuron(type='job')\nneuron.run()\n")
    alone = await cron("by-itself", LOG_LEVEL="ERROR")
    names = ("NEURON_ID", "ENROLLMENT_TOKEN", "LOG_LEVEL", "METRICS_ENABLED")
    environment = {name: alone.process.environment[name] for name in names}
    target = (*ONCE[:-1], str(script))
    alone.process = NeuronProcess(alone.folder, served.address, *target, **environment)
    await alone.succeeds()
    assert (await shown(served, "by-itself")).presence == neuron_pb2.PRESENCE_ONLINE


async def test_more_commands_than_have_room_are_carried_out_one_after_the_other(
    cron: Made, served: Served
) -> None:
    narrow = await known(cron, "narrow", ONCE_PLACES="1")
    ids = [await issue(served, "narrow", "add", a=number) for number in range(3)]
    await narrow.succeeds()
    found = [await command(served, command_id) for command_id in ids]
    assert {each.state for each in found} == {State.COMMAND_STATE_SUCCEEDED}
    sent = [each.transitions[-4].transition_time.ToNanoseconds() for each in found]
    ended = [each.transitions[-1].transition_time.ToNanoseconds() for each in found]
    assert sent[1] > ended[0]
    assert sent[2] > ended[1]


async def test_what_is_issued_while_a_run_works_is_carried_out_by_it(
    cron: Made, served: Served
) -> None:
    late = await known(cron, "late", **SHORT_LEASE)
    held = await issue(served, "late", "hold")
    late.process.start()
    await late.holds()
    added = await issue(served, "late", "add", a=1)
    ended = await reached(served, added, *FINAL)
    assert ended.state == State.COMMAND_STATE_SUCCEEDED
    assert (await command(served, held)).state == State.COMMAND_STATE_RUNNING
    late.release()
    assert await late.process.ended() == 0
    assert (await command(served, held)).state == State.COMMAND_STATE_SUCCEEDED


async def test_a_lease_is_renewed_for_as_long_as_a_command_runs(cron: Made, served: Served) -> None:
    long = await known(cron, "long", **SHORT_LEASE)
    command_id = await issue(served, "long", "hold")
    sessions = len(long.process.logged("session.opened"))
    long.process.start()
    await long.holds()
    before = len(await heartbeats(served, "long"))

    async def several_leases_later() -> bool:
        return len(await heartbeats(served, "long")) >= before + 8  # one each second at the most

    await eventually(several_leases_later, within=30, describe="it lives longer than its lease")
    assert (await command(served, command_id)).state == State.COMMAND_STATE_RUNNING
    assert len(long.process.logged("session.opened")) == sessions + 1
    long.release()
    assert await long.process.ended() == 0
    ended = await command(served, command_id)
    assert (ended.state, ended.attempt) == (State.COMMAND_STATE_SUCCEEDED, 1)
    assert long.lines("runs") == [f"{command_id} 1"]


async def test_a_command_that_is_cancelled_while_it_runs_is_given_up(
    cron: Made, served: Served
) -> None:
    given_up = await known(cron, "given-up", **SHORT_LEASE)
    command_id = await issue(served, "given-up", "hold")
    given_up.process.start()
    await given_up.holds()
    await served.command.CancelCommand(
        command_service_pb2.CancelCommandRequest(command_id=command_id, reason="no need"),
        metadata=served.admin,
    )
    assert await given_up.process.ended() == 0
    assert (await command(served, command_id)).state == State.COMMAND_STATE_CANCELLED


async def test_a_run_that_was_killed_is_answered_for_by_the_next_one(
    cron: Made, served: Served
) -> None:
    killed = await known(cron, "killed")
    running = await issue(served, "killed", "hold")
    killed.process.start()
    await killed.holds()
    await reached(served, running, State.COMMAND_STATE_RUNNING)
    killed.process.kill()
    killed.release()
    await killed.succeeds()
    ended = await command(served, running)
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "INTERRUPTED")
    assert killed.lines("runs") == [f"{running} 1"]


async def test_what_a_killed_run_had_not_started_fails_if_it_is_never_sent_twice(
    cron: Made, served: Served
) -> None:
    paused = await known(cron, "paused", ONCE_LEASE="18")
    await issue(served, "paused", "hold")
    pause = await issue(served, "paused", "pause")
    paused.process.start()
    await reached(served, pause, *FINAL)
    wanted = spec("paused", "add", a=1)
    wanted.execution = command_pb2.EXECUTION_AT_MOST_ONCE
    issued = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=served.admin
    )
    command_id = issued.command.command_id
    await reached(served, command_id, State.COMMAND_STATE_ACCEPTED)
    paused.process.kill()
    paused.release()
    await paused.succeeds()
    ended = await command(served, command_id)
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "NOT_STARTED")


@pytest.mark.parametrize("killed", [False, True])
async def test_what_ended_while_the_federation_was_away_is_reported_once_by_the_next_run(
    doomed: Postgres, killed: bool
) -> None:
    name = f"away-{killed}".lower()
    with (
        passable_folder() as folder,
        serving(doomed, folder, **SETTINGS) as other,
    ):
        async with calling(other) as served:
            with crons(folder, served) as make:
                away = await known(make, name)
                kept = await served.command.IssueCommand(
                    command_service_pb2.IssueCommandRequest(
                        command=_once(spec(name, "hold")),
                    ),
                    metadata=served.admin,
                )
                command_id = kept.command.command_id
                away.process.start(ONCE_PATIENCE="60" if killed else "3")
                await away.holds()
                await reached(served, command_id, State.COMMAND_STATE_RUNNING)
                other.kill()
                away.release()
                if killed:
                    await eventually(
                        lambda: away.process.logged("command.ended"), describe="it has ended"
                    )
                    away.process.kill()
                else:
                    assert await away.process.ended() == 1
                    assert "kept in STATE_DIR for the next run" in away.last_line
                other.start()
                assert await away.run(ONCE_PATIENCE="60") == 0, away.process.output
                ended = await command(served, command_id)
                assert ended.state == State.COMMAND_STATE_SUCCEEDED, ended
                assert outcomes(ended) == 1
                assert away.lines("runs") == [f"{command_id} 1"]


def _once(wanted: command_service_pb2.CommandSpec) -> command_service_pb2.CommandSpec:
    wanted.execution = command_pb2.EXECUTION_AT_MOST_ONCE
    return wanted


async def test_a_run_that_freezes_beyond_its_lease_fails_its_attempt_and_gets_the_next_one(
    cron: Made, served: Served
) -> None:
    frozen = await known(cron, "frozen", **SHORT_LEASE)
    wanted = spec("frozen", "hold")
    wanted.max_attempts = 2
    wanted.retry_backoff.FromMilliseconds(10)
    issued = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=served.admin
    )
    command_id = issued.command.command_id
    frozen.process.start()
    await frozen.holds()
    frozen.process.process.send_signal(signal.SIGSTOP)
    waiting = await reached(served, command_id, State.COMMAND_STATE_QUEUED)
    assert waiting.error.code == "LEASE_EXPIRED"
    frozen.process.process.send_signal(signal.SIGCONT)
    await frozen.holds(2)
    frozen.release()
    assert await frozen.process.ended() == 0
    ended = await command(served, command_id)
    assert (ended.state, ended.attempt) == (State.COMMAND_STATE_SUCCEEDED, 2)
    assert frozen.lines("runs") == [f"{command_id} 1", f"{command_id} 2"]


async def test_a_run_that_another_process_displaces_stops_its_commands_and_says_so(
    cron: Made, served: Served
) -> None:
    older = await known(cron, "displaced", **SHORT_LEASE)
    command_id = await issue(served, "displaced", "hold")
    older.process.start()
    await older.holds()
    await reached(served, command_id, State.COMMAND_STATE_RUNNING)
    token = (("authorization", f"Bearer {older.process.token}"),)
    request = pb.PullCommandsRequest(instance_id="newer")
    newer = await served.session.PullCommands(request, metadata=token)
    assert [each.command_id for each in newer.commands] == [command_id]
    assert await older.process.ended() == 1
    assert older.last_line.startswith("neuron: SESSION_SUPERSEDED")
    assert "another process runs with the same neuron_id" in older.last_line
    assert (await command(served, command_id)).state == State.COMMAND_STATE_RUNNING
    again = await served.session.PullCommands(request, metadata=token)
    assert again.epoch == newer.epoch, "the older one has not taken the session back"


async def test_a_federation_that_is_not_there_ends_a_run_with_one_line(
    cron: Made, served: Served
) -> None:
    port = free_port()
    alone = await cron("alone", address=f"127.0.0.1:{port}", ONCE_PATIENCE="1")
    assert await alone.run() == 1
    assert alone.last_line.startswith(f"neuron: no success with 127.0.0.1:{port}")
    assert alone.lines("hooks") == ["start", "stop"]


async def test_a_refused_run_names_the_remedy_and_does_not_wait(cron: Made, served: Served) -> None:
    stranger = await cron("stranger")
    assert await stranger.run(ENROLLMENT_TOKEN="fet_of-nobody") == 1
    assert "ask an admin for a new one" in stranger.last_line
    barred = await known(cron, "barred")
    await served.fleet.DeactivateNeuron(
        fleet_service_pb2.DeactivateNeuronRequest(neuron_id="barred"), metadata=served.admin
    )
    assert await barred.run() == 1
    assert barred.last_line.startswith("neuron: NEURON_DEACTIVATED")
    assert "`federation neurons activate` does that" in barred.last_line
    assert "retry_s" not in stranger.process.output + barred.process.output


async def test_sigterm_ends_a_run_as_any_neuron_and_reports_what_became_of_its_commands(
    cron: Made, served: Served
) -> None:
    stopped = await known(cron, "stopped", STOP_GRACE="0.2")
    command_id = await issue(served, "stopped", "hold")
    stopped.process.start()
    await stopped.holds()
    assert await stopped.process.stop() == 0
    ended = await command(served, command_id)
    assert (ended.state, ended.error.code) == (State.COMMAND_STATE_FAILED, "INTERRUPTED")


async def test_a_restart_begins_the_run_anew_and_is_answered_by_it(
    cron: Made, served: Served
) -> None:
    again = await known(cron, "again")
    hooks = len(again.lines("hooks"))
    command_id = await issue(served, "again", "restart")
    await again.succeeds()
    ended = await command(served, command_id)
    assert MessageToDict(ended.response) == {"restarted": True}
    assert again.lines("hooks")[hooks:] == ["start", "stop"] * 2


async def test_what_was_measured_is_counted_once_over_all_runs(cron: Made, served: Served) -> None:
    counting = await known(cron, "counting")
    for number in range(3):
        await issue(served, "counting", "add", a=number)
        await counting.succeeds()

    async def all_counted() -> bool:
        return await counted(served, "counting", "runs") == 3

    await eventually(all_counted, within=20, describe="three runs are counted")


async def test_two_runs_do_not_share_a_state_dir(cron: Made, served: Served) -> None:
    first = await known(cron, "overlapping")
    command_id = await issue(served, "overlapping", "hold")
    first.process.start()
    await first.holds()
    second = Cron(
        "overlapping", first.folder, served.address, STATE_DIR=str(first.process.state_dir)
    )
    assert await second.run() == 2
    assert "in use" in second.last_line
    os.kill(first.process.process.pid, 0)
    first.release()
    assert await first.process.ended() == 0
    assert (await command(served, command_id)).state == State.COMMAND_STATE_SUCCEEDED
