"""A neuron against a federation: sessions, durable messages, commands, and ways to lose them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from federation.v1 import heartbeat_pb2, report_pb2
from federation.v1 import session_service_pb2 as pb
from neuron_sdk import (
    ApiEndpoint,
    CommandContext,
    ConfigError,
    LifecycleError,
    Neuron,
    NeuronConfig,
    StateDirInUse,
)
from neuron_sdk.channel import open_channel
from neuron_sdk.convert import from_struct
from neuron_sdk.session import Session
from neuron_sdk.testing import CommandOutcome, FakeFederation, FinalState
from tests.support.waiting import eventually_sync

N = "n-1"
SMALLEST = 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same behaviour at a pace that tests can wait for."""
    monkeypatch.setenv("REFUSAL_RETRY", "0.2")
    monkeypatch.setattr("neuron_sdk.session.Backoff", _quick_backoff)
    monkeypatch.setattr("neuron_sdk.stall.STALL_LIMIT_S", 0.3)
    monkeypatch.setattr("neuron_sdk.stall.PING_S", 0.05)
    monkeypatch.setattr("neuron_sdk.runtime.FLUSH_S", 2.0)


def _quick_backoff() -> Any:
    from neuron_sdk.backoff import Backoff

    return Backoff(first_s=0.02, most_s=0.2)


@pytest.fixture
def federation() -> Iterator[FakeFederation]:
    with FakeFederation(heartbeat_interval=SMALLEST) as fake:
        yield fake


Start = Callable[..., Neuron]


@pytest.fixture
def build(federation: FakeFederation, tmp_path: Path) -> Start:
    def build_one(neuron_id: str = N, **arguments: Any) -> Neuron:
        config = NeuronConfig(
            state_dir=tmp_path / neuron_id,
            federation_url=federation.url,
            metrics_enabled=False,
            stop_grace=arguments.pop("stop_grace", 1.0),
            analytics_interval=arguments.pop("analytics_interval", None),
        )
        return Neuron(neuron_id, type="worker", config=config, **arguments)

    return build_one


@pytest.fixture
def start() -> Iterator[Callable[[Neuron], Neuron]]:
    started: list[Neuron] = []

    def start_one(neuron: Neuron) -> Neuron:
        neuron.start()
        started.append(neuron)
        return neuron

    yield start_one
    for neuron in started:
        neuron.stop()


Started = Callable[[Neuron], Neuron]


def code(outcome: CommandOutcome) -> str:
    assert outcome.error is not None, outcome
    return outcome.error.code


# ---- the life of a session


def test_a_neuron_registers_with_its_whole_description(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = build(
        name="A name",
        version="1.2",
        capabilities=["a"],
        dependencies=["redis"],
        labels={"zone": "x"},
        metadata={"team": {"size": 5}},
        api_endpoints=[ApiEndpoint("/data", "POST", "takes data")],
        base_url="http://here:1",
    )

    @neuron.command()
    async def run_task(limit: int = 5) -> None:
        """Run it."""

    start(neuron)
    federation.wait_connected(N)
    said = federation.neurons[N].description
    assert (said.name, said.version, said.type, said.language) == (
        "A name",
        "1.2",
        "worker",
        "python",
    )
    assert from_struct(said.metadata) == {"team": {"size": 5}}
    assert said.api_endpoints[0].method == "POST"
    types = {command.type: command for command in said.command_types}
    assert types["run_task"].description == "Run it."
    assert not types["run_task"].control
    schema = from_struct(types["run_task"].data_schema)
    assert schema["properties"]["limit"]["default"] == 5
    assert types["stop"].control
    assert said.max_concurrent_commands == 4


def test_the_first_heartbeat_is_complete_and_comes_at_once(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = build(version="9")
    neuron.dependency("redis", interval=0.05)(lambda: True)
    start(neuron)
    federation.wait_for(lambda: N in federation.neurons and federation.neurons[N].heartbeats)
    first = federation.neurons[N].heartbeats[0]
    assert first.activity == heartbeat_pb2.ACTIVITY_ACTIVE
    assert first.process.rss_bytes > 0
    assert first.host.hostname
    assert first.system.memory_used_bytes > 0
    assert first.versions.service == "9"
    assert first.HasField("health_score")

    def up() -> bool:
        last = federation.neurons[N].heartbeats[-1]
        return [d.state for d in last.dependencies] == [heartbeat_pb2.DEPENDENCY_STATE_UP]

    federation.wait_for(up, describe="the dependency in a heartbeat")
    federation.wait_for(lambda: len(federation.neurons[N].heartbeats) > 1)
    assert not federation.neurons[N].heartbeats[-1].HasField("host"), "it has not changed"


def test_heartbeats_come_at_the_federations_pace_and_never_faster(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    federation.set_intervals(heartbeat=0.2)
    start(build())
    federation.wait_for(
        lambda: N in federation.neurons and len(federation.neurons[N].heartbeats) > 4
    )
    beats = federation.neurons[N].heartbeats
    times = [beat.heartbeat_time.ToMicroseconds() / 1e6 for beat in beats]
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) > 0.195, gaps  # the clock is not the monotonic one


def test_new_settings_change_the_pace_at_once(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    federation.set_intervals(heartbeat=3600)
    start(build())
    federation.wait_for(lambda: N in federation.neurons and federation.neurons[N].heartbeats)
    federation.set_intervals(heartbeat=SMALLEST)
    federation.wait_for(lambda: len(federation.neurons[N].heartbeats) > 3)


def test_a_neuron_stopped_while_it_is_let_in_sends_what_it_has_and_says_goodbye(
    federation: FakeFederation, build: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    greeted, flushing = threading.Event(), threading.Event()
    open_stream, flush = federation.open_stream, Session.flush

    def open_late(neuron_id: str, hello: pb.Hello) -> Any:
        greeted.set()
        assert flushing.wait(5)
        return open_stream(neuron_id, hello)

    async def flush_from_now_on(session: Session, timeout_s: float) -> None:
        asyncio.get_running_loop().call_soon(flushing.set)
        await flush(session, timeout_s)

    monkeypatch.setattr(federation, "open_stream", open_late)
    monkeypatch.setattr(Session, "flush", flush_from_now_on)
    neuron = build()
    neuron.start()
    assert greeted.wait(5)
    neuron.event("last", severity="ERROR")
    neuron.stop()
    known = federation.neurons[N]
    assert "last" in {event.type for report in known.reports for event in report.events}
    assert known.goodbyes == ["stopped by the program"]


def test_a_neuron_says_goodbye_with_its_reason(federation: FakeFederation, build: Start) -> None:
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.stop()
    assert federation.neurons[N].goodbyes == ["stopped by the program"]
    assert not federation.connected(N)


def test_a_neuron_can_be_started_again(federation: FakeFederation, build: Start) -> None:
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.stop()
    neuron.start()
    federation.wait_connected(N, sessions=2)
    neuron.stop()
    one, two = federation.neurons[N].hellos
    assert one.instance_id != two.instance_id
    assert one.spool_id == two.spool_id


# ---- coming back


def test_a_lost_stream_is_replaced(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    federation.wait_connected(N)
    federation.drop_streams()
    federation.wait_connected(N, sessions=2)
    assert len(federation.neurons[N].registrations) == 1, "the token is still good"


def test_the_service_works_while_the_federation_is_away(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    federation.stop()
    ran = threading.Event()
    neuron = build()

    @neuron.worker
    async def work() -> None:
        ran.set()

    start(neuron)
    assert ran.wait(5)
    federation.start()
    federation.wait_connected(N)


def test_a_federation_that_comes_back_finds_the_neuron(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    federation.wait_connected(N)
    federation.stop()
    federation.start()
    federation.wait_connected(N, sessions=2)


def test_a_neuron_that_is_asked_to_come_back_waits_as_long_as_asked(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    federation.wait_connected(N)
    asked = time.monotonic()
    federation.reconnect(after=0.5)
    federation.wait_connected(N, sessions=2)
    assert time.monotonic() - asked >= 0.5


@pytest.mark.parametrize("call", ["refuse_register", "refuse_connect"])
@pytest.mark.parametrize("reason", ["DATABASE_UNAVAILABLE", "SERVER_BUSY", "RATE_LIMITED"])
def test_retry_info_is_obeyed(
    federation: FakeFederation, build: Start, start: Started, call: str, reason: str
) -> None:
    setattr(federation, call, (reason, 0.6))
    start(build())
    federation.wait_for(lambda: federation.refused)
    asked = time.monotonic()
    setattr(federation, call, None)
    federation.wait_connected(N)
    assert time.monotonic() - asked >= 0.4


@pytest.mark.parametrize("reason", ["SERVER_BUSY", "RATE_LIMITED"])
def test_a_neuron_whose_turn_has_not_come_keeps_its_connection(
    federation: FakeFederation,
    build: Start,
    start: Started,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    opened: list[object] = []

    def counting(target: str, credentials: Any) -> object:
        opened.append(target)
        return open_channel(target, credentials)

    monkeypatch.setattr("neuron_sdk.session.open_channel", counting)
    federation.refuse_connect = (reason, 0.05)
    start(build())
    federation.wait_for(lambda: len(federation.refused) >= 3)
    federation.refuse_connect = None
    federation.wait_connected(N)
    assert len(opened) == 1


def test_a_superseded_session_waits_before_it_returns(
    federation: FakeFederation,
    build: Start,
    start: Started,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start(build())
    federation.wait_connected(N)
    asked = time.monotonic()
    federation.end_streams("SESSION_SUPERSEDED")
    federation.wait_connected(N, sessions=2)
    assert time.monotonic() - asked >= 0.2
    assert "same neuron_id" in _problems(caplog)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("NEURON_EXISTS", "choose another (in the code, or NEURON_ID"),
        ("ENROLLMENT_REFUSED", "this ENROLLMENT_TOKEN is unknown"),
        ("NEURON_DEACTIVATED", "federation neurons activate"),
    ],
)
def test_a_refused_registration_says_the_remedy_and_is_tried_again(  # noqa: PLR0917 - fixtures
    federation: FakeFederation,
    build: Start,
    start: Started,
    caplog: pytest.LogCaptureFixture,
    reason: str,
    remedy: str,
) -> None:
    federation.refuse_register = (reason, 0.0)
    start(build())
    eventually_sync(lambda: remedy in _problems(caplog), describe="the remedy in the log")
    federation.refuse_register = None
    federation.wait_connected(N)


def _problems(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(str(getattr(record, "problem", "")) for record in caplog.records)


# ---- the credential


def test_a_second_start_shows_the_first_ones_token(tmp_path: Path) -> None:
    with FakeFederation(enrollment_tokens=("fet_good",)) as federation:
        config = NeuronConfig(state_dir=tmp_path, metrics_enabled=False)
        arguments: dict[str, Any] = {"federation_url": federation.url, "config": config}
        first = Neuron(N, type="worker", enrollment_token="fet_good", **arguments)
        first.start()
        federation.wait_connected(N)
        first.stop()
        token_file = tmp_path / "token"
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        assert token_file.read_text().strip() == federation.neurons[N].tokens[-1]

        second = Neuron(N, type="worker", **arguments)
        second.start()
        federation.wait_connected(N, sessions=2)
        second.stop()
        assert federation.neurons[N].registrations[-1].enrollment_token == ""


def test_a_refused_token_is_replaced_by_enrolling_again(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build(enrollment_token="fet_any"))
    federation.wait_connected(N)
    federation.revoke_tokens(N)
    federation.end_streams("CREDENTIAL_INVALID")
    federation.wait_connected(N, sessions=2)
    assert len(federation.neurons[N].registrations) == 2


def test_a_token_is_renewed_in_the_middle_of_its_life(
    federation: FakeFederation, build: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.registration.MIN_REFRESH_S", 0.1)
    with FakeFederation(token_life=1.0) as short:
        neuron = Neuron(
            N,
            type="worker",
            config=NeuronConfig(
                state_dir=tmp_path, federation_url=short.url, metrics_enabled=False
            ),
        )
        neuron.start()
        short.wait_for(lambda: N in short.neurons and len(short.neurons[N].tokens) >= 3)
        newest = short.neurons[N].tokens[1]
        neuron.stop()
        assert len(short.neurons[N].hellos) == 1, "the stream stays open"
        assert (tmp_path / "token").read_text().strip() in short.neurons[N].tokens[1:]
        assert newest


# ---- durable messages


def test_an_error_travels_at_once_in_a_report_of_its_own_and_takes_other_events_along(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = start(build(analytics_interval=3600))
    federation.wait_connected(N)
    neuron.event("calm", "nothing special")
    neuron.event("disk_full", "no room", severity="ERROR", free=0)
    reports = federation.neurons[N].reports
    federation.wait_for(lambda: len(reports) == 2, within=5)
    assert [[e.type for e in report.events] for report in reports] == [["disk_full"], ["calm"]]
    assert reports[0].events[0].severity == report_pb2.SEVERITY_ERROR
    assert reports[0].events[0].attributes["free"] == 0


def test_measurements_travel_each_interval_and_at_the_end(
    federation: FakeFederation, build: Start
) -> None:
    federation.set_intervals(analytics=0.3)
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.track_request(12.5)
    neuron.track_request(20, ok=False)
    neuron.counter("rows", unit="rows", labels={"table": "a"}).add(7)
    federation.wait_for(lambda: len(federation.neurons[N].reports) >= 2)
    neuron.gauge("depth").set(3)
    neuron.stop()

    counted = {"requests": 0.0, "failed_requests": 0.0, "rows": 0.0}
    names = set()
    for report in federation.neurons[N].reports:
        for point in report.points:
            names.add(point.name)
            if point.name in counted:
                counted[point.name] += point.counter
    assert counted == {"requests": 2, "failed_requests": 1, "rows": 7}
    assert names >= {"response_ms", "system.cpu_percent", "system.memory_percent"}
    assert names >= {"process.rss_bytes", "depth"}


def test_nothing_is_lost_and_nothing_counts_twice_over_broken_streams(
    federation: FakeFederation, build: Start
) -> None:
    federation.set_intervals(analytics=0.02)
    neuron = build()
    neuron.start()
    counter = neuron.counter("things")
    for round_ in range(5):
        federation.wait_connected(N, sessions=round_ + 1)
        federation.acknowledge = round_ % 3 != 1
        federation.lose = round_ % 3 == 2
        for _ in range(20):
            counter.add(1)
            time.sleep(0.002)
        federation.drop_streams()
    federation.acknowledge, federation.lose = True, False
    federation.wait_connected(N, sessions=6)
    neuron.stop()
    total = sum(
        point.counter
        for report in federation.neurons[N].reports
        for point in report.points
        if point.name == "things"
    )
    assert total == 100
    sequences = [sequence for sequence, _ in federation.neurons[N].received]
    assert len(sequences) > len(set(sequences)), "something was sent again"


def test_without_acknowledgements_the_window_is_bounded_and_the_order_kept(
    federation: FakeFederation, build: Start, start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.session.WINDOW_MESSAGES", 10)
    monkeypatch.setattr("neuron_sdk.reporter.URGENT_SPACING_S", 0.0)
    federation.acknowledge = False
    neuron = start(build(analytics_interval=3600))
    federation.wait_connected(N)

    def pending() -> int:
        last = federation.neurons[N].heartbeats
        return int(last[-1].spool.pending) if last else 0

    def say_more() -> bool:
        neuron.event("e", severity="ERROR")
        return pending() > 30

    eventually_sync(say_more, describe="30 messages waiting")
    assert len(federation.neurons[N].received) == 10
    federation.acknowledge_all()
    federation.wait_for(lambda: len(federation.neurons[N].received) > 30)
    sequences = [sequence for sequence, _ in federation.neurons[N].received]
    assert sequences == sorted(sequences)


def test_an_old_copy_of_the_state_becomes_a_new_spool(
    federation: FakeFederation, build: Start, tmp_path: Path
) -> None:
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.stop()
    spool_id = federation.neurons[N].hellos[-1].spool_id
    federation.neurons[N].last_sequence[spool_id] = 1000  # as if this copy were from before
    neuron.start()
    federation.wait_for(lambda: federation.neurons[N].hellos[-1].spool_id != spool_id)
    neuron.event("after", severity="ERROR")

    def arrived() -> bool:
        events = [e.type for r in federation.neurons[N].reports for e in r.events]
        return "after" in events

    federation.wait_for(arrived, describe="a message of the new spool")
    neuron.stop()


def test_an_old_copy_of_the_state_is_known_by_what_was_never_sent_from_it(
    federation: FakeFederation, build: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.reporter.URGENT_SPACING_S", 0.0)  # each event by itself
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.stop()
    shutil.copytree(tmp_path / N, tmp_path / "copy")
    neuron.start()
    federation.wait_connected(N, sessions=2)
    neuron.event("original", severity="ERROR")
    neuron.stop()
    spool_id = federation.neurons[N].hellos[-1].spool_id
    shutil.rmtree(tmp_path / N)
    (tmp_path / "copy").rename(tmp_path / N)
    federation.stop()
    neuron.start()
    for number in range(9):  # more than the original has sent since
        neuron.event(f"copy-{number}", severity="ERROR")
        time.sleep(0.02)
    federation.start()
    wanted = {f"copy-{number}" for number in range(9)}

    def arrived() -> bool:
        return wanted <= {e.type for r in federation.neurons[N].reports for e in r.events}

    federation.wait_for(arrived, describe="all events of the copy")
    assert federation.neurons[N].hellos[-1].spool_id != spool_id
    neuron.stop()


def test_an_old_copy_of_the_state_sends_nothing_again_that_was_stored(
    federation: FakeFederation, build: Start, tmp_path: Path
) -> None:
    neuron = build()
    neuron.command("task")(lambda: {"done": True})
    neuron.start()
    federation.wait_connected(N)
    federation.acknowledge = False
    neuron.counter("things").add(1)
    federation.outcome(federation.issue(N, "task"))
    neuron.stop()
    shutil.copytree(tmp_path / N, tmp_path / "copy")
    federation.acknowledge = True
    neuron.start()
    for _ in range(20):
        neuron.event("before", severity="ERROR")
        time.sleep(0.01)
    neuron.stop()
    spool_id = federation.neurons[N].hellos[-1].spool_id
    shutil.rmtree(tmp_path / N)
    (tmp_path / "copy").rename(tmp_path / N)
    neuron.start()
    federation.wait_for(lambda: federation.neurons[N].hellos[-1].spool_id != spool_id)
    neuron.counter("things").add(1)
    neuron.stop()
    counts = [
        point.counter
        for report in federation.neurons[N].reports
        for point in report.points
        if point.name == "things"
    ]
    assert counts == [1, 1]
    kinds = [update.WhichOneof("update") for update in federation.neurons[N].updates]
    assert kinds == ["accepted", "progressed", "finished"]


@pytest.mark.parametrize(
    "message",
    [
        pb.FederationMessage(ack_sequence=2**63),
        pb.FederationMessage(ack_sequence=2**64 - 1),
        pb.FederationMessage(refusal=pb.Refusal(sequence=2**64 - 1)),
    ],
)
def test_a_sequence_that_no_spool_gives_ends_the_session_and_nothing_is_lost(
    federation: FakeFederation,
    build: Start,
    start: Started,
    caplog: pytest.LogCaptureFixture,
    message: pb.FederationMessage,
) -> None:
    federation.lose = True
    neuron = start(build())
    federation.wait_connected(N)
    neuron.event("kept", severity="ERROR")
    federation.wait_for(lambda: federation.neurons[N].received)
    federation.lose = False
    federation.send(message)
    federation.wait_connected(N, sessions=2)
    federation.wait_for(lambda: federation.neurons[N].reports, describe="what was lost, again")
    assert "no federation" in _problems(caplog)
    assert not [each for each in caplog.records if getattr(each, "action", "") == "spool.failed"]


def test_a_mark_that_no_spool_reaches_opens_no_session_and_nothing_is_lost(
    federation: FakeFederation, build: Start, start: Started, caplog: pytest.LogCaptureFixture
) -> None:
    federation.lose = True
    neuron = build()
    neuron.start()
    federation.wait_connected(N)
    neuron.event("kept", severity="ERROR")
    federation.wait_for(lambda: federation.neurons[N].received)
    neuron.stop()
    federation.lose = False
    marks, spool_id = federation.neurons[N].last_sequence, federation.neurons[N].hellos[-1].spool_id
    marks[spool_id] = 2**64 - 1
    start(neuron)
    eventually_sync(lambda: "no federation" in _problems(caplog), describe="the remedy in the log")
    del marks[spool_id]
    federation.wait_for(lambda: federation.neurons[N].reports)
    assert {hello.spool_id for hello in federation.neurons[N].hellos} == {spool_id}


def test_a_refused_result_becomes_a_failure_that_says_so(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    def refuse(message: pb.NeuronMessage) -> str:
        finished = message.command_update.finished
        return "no such thing" if "bad" in finished.response.fields else ""

    federation.refuse_message = refuse
    neuron = build()
    neuron.command("task")(lambda: {"bad": 1})
    start(neuron)
    outcome = federation.outcome(federation.issue(N, "task"))
    assert outcome.state is FinalState.FAILED
    assert code(outcome) == "INVALID_RESPONSE"
    assert "no such thing" in str(outcome.error)


# ---- commands


def test_a_command_is_accepted_started_and_finished_in_order(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = build()

    @neuron.command()
    async def run_task(ctx: CommandContext, rows: int) -> dict[str, int]:
        await ctx.progress(0.5, "half")
        await asyncio.sleep(0.05)
        return {"rows": rows}

    start(neuron)
    command_id = federation.issue(N, "run_task", {"rows": 3})
    outcome = federation.outcome(command_id)
    assert outcome.state is FinalState.SUCCEEDED
    assert outcome.response == {"rows": 3}
    assert outcome.run_duration is not None
    assert outcome.run_duration >= 0.05
    updates = federation.updates_of(command_id)
    kinds = [u.WhichOneof("update") for u in updates]
    assert (kinds[0], kinds[-1]) == ("accepted", "finished")
    assert updates[-2].progressed.message == "half"


def test_a_redelivered_command_runs_once(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    runs: list[int] = []
    release = threading.Event()
    neuron = build()

    @neuron.command()
    def task(ctx: CommandContext) -> None:
        runs.append(ctx.attempt)
        release.wait(5)

    start(neuron)
    command_id = federation.issue(N, "task")
    eventually_sync(lambda: runs)
    federation.deliver_again(command_id)
    federation.drop_streams()
    federation.wait_connected(N, sessions=2)
    hello = federation.neurons[N].hellos[-1]
    assert [(r.command_id, r.attempt) for r in hello.running_commands] == [(command_id, 1)]
    federation.deliver_again(command_id)
    release.set()
    federation.outcome(command_id)
    federation.deliver_again(command_id)
    federation.wait_for(
        lambda: sum(u.HasField("finished") for u in federation.updates_of(command_id)) == 2,
        describe="the finish once more",
    )
    assert runs == [1]


def test_no_more_commands_run_than_may_and_control_commands_pass(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    running: list[str] = []
    most: list[int] = []
    release = threading.Event()
    neuron = build(max_concurrent_commands=2)

    @neuron.command()
    def task(ctx: CommandContext) -> None:
        running.append(ctx.command_id)
        most.append(len(running))
        release.wait(10)
        running.remove(ctx.command_id)

    start(neuron)
    issued = [federation.issue(N, "task") for _ in range(5)]
    eventually_sync(lambda: len(running) == 2)
    health = federation.outcome(federation.issue(N, "health_check"))
    assert health.response is not None
    assert health.response["status"] in ("healthy", "degraded")
    release.set()
    for command_id in issued:
        assert federation.outcome(command_id).state is FinalState.SUCCEEDED
    assert max(most) == 2


def test_the_higher_priority_runs_first(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    order: list[str] = []
    release = threading.Event()
    neuron = build(max_concurrent_commands=1)
    neuron.command("block")(lambda: release.wait(10) and None)

    @neuron.command()
    async def note(name: str) -> None:
        order.append(name)

    start(neuron)
    federation.wait_connected(N)
    federation.issue(N, "block")
    commands = [
        federation.issue(N, "note", {"name": name}, priority=priority)
        for name, priority in [("low", 1), ("usual", 5), ("urgent", 9), ("usual too", 5)]
    ]
    federation.wait_for(
        lambda: all(federation.updates_of(command) for command in commands),
        describe="all accepted",
    )
    release.set()
    for command in commands:
        federation.outcome(command)
    assert order == ["urgent", "usual", "usual too", "low"]


def test_a_command_that_has_not_started_in_time_expires(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    release = threading.Event()
    neuron = build(max_concurrent_commands=1)
    neuron.command("block")(lambda: release.wait(10) and None)
    start(neuron)
    federation.wait_connected(N)
    blocking = federation.issue(N, "block")
    outcome = federation.outcome(federation.issue(N, "block", expire_after=0.1))
    assert outcome.state is FinalState.REJECTED
    assert code(outcome) == "EXPIRED"
    assert outcome.run_duration is None
    release.set()
    assert federation.outcome(blocking).state is FinalState.SUCCEEDED


def test_a_blocked_work_loop_is_told_and_stops_no_heartbeat(
    federation: FakeFederation,
    build: Start,
    start: Started,
    caplog: pytest.LogCaptureFixture,
) -> None:
    neuron = build()
    release = threading.Event()

    @neuron.command()
    async def blocks() -> str:
        release.wait(20)  # what no coroutine should do
        return "done"

    @neuron.command()
    async def other() -> str:
        return "ok"

    start(neuron)
    command_id = federation.issue(N, "blocks")

    def stalled() -> bool:
        last = federation.neurons[N].heartbeats[-1]
        return last.activity == heartbeat_pb2.ACTIVITY_STALLED and last.running_commands >= 1

    federation.wait_for(lambda: N in federation.neurons and federation.neurons[N].heartbeats)
    federation.wait_for(stalled, describe="STALLED in a heartbeat")
    assert federation.outcome(federation.issue(N, "health_check")).state is FinalState.SUCCEEDED
    assert "release.wait" in " ".join(str(getattr(r, "stack", "")) for r in caplog.records)
    timed = federation.issue(N, "other", run_timeout=0.1)
    assert federation.outcome(timed).state is FinalState.TIMED_OUT
    release.set()
    assert federation.outcome(command_id).response == {"result": "done"}
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == heartbeat_pb2.ACTIVITY_ACTIVE,
        describe="ACTIVE again",
    )


def test_running_commands_get_a_grace_and_are_then_interrupted(
    federation: FakeFederation, build: Start
) -> None:
    neuron = build(stop_grace=0.3)
    started = threading.Barrier(3)

    @neuron.command()
    def quick() -> str:
        started.wait(5)
        time.sleep(0.1)
        return "in time"

    @neuron.command()
    def slow(ctx: CommandContext) -> None:
        started.wait(5)
        while not ctx.cancelled:
            time.sleep(0.01)

    neuron.start()
    first, second = federation.issue(N, "quick"), federation.issue(N, "slow")
    started.wait(5)
    neuron.stop()
    assert federation.outcome(first).response == {"result": "in time"}
    outcome = federation.outcome(second)
    assert outcome.state is FinalState.FAILED
    assert code(outcome) == "INTERRUPTED"
    assert federation.neurons[N].goodbyes == ["stopped by the program"]


def test_what_waits_when_the_neuron_stops_runs_after_the_next_start(
    federation: FakeFederation, build: Start
) -> None:
    ran: list[str] = []
    started = threading.Event()
    neuron = build(max_concurrent_commands=1, stop_grace=0.5)

    @neuron.command()
    def task(ctx: CommandContext) -> None:
        ran.append(ctx.command_id)
        started.set()
        time.sleep(0.3)

    neuron.start()
    federation.wait_connected(N)
    first = federation.issue(N, "task")
    assert started.wait(5)
    second = federation.issue(N, "task")
    federation.wait_for(lambda: federation.updates_of(second))
    neuron.stop()
    assert federation.outcome(first).state is FinalState.SUCCEEDED
    assert ran == [first]
    neuron.start()
    assert federation.outcome(second).state is FinalState.SUCCEEDED
    neuron.stop()
    assert ran == [first, second]


# ---- built-in commands


def test_a_paused_neuron_lets_new_commands_wait(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = build()
    neuron.command("task")(lambda: None)
    start(neuron)
    federation.outcome(federation.issue(N, "pause"))
    command_id = federation.issue(N, "task")
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == heartbeat_pb2.ACTIVITY_PAUSED,
        describe="PAUSED in a heartbeat",
    )
    federation.wait_for(lambda: federation.updates_of(command_id))
    assert [u.WhichOneof("update") for u in federation.updates_of(command_id)] == ["accepted"]
    federation.outcome(federation.issue(N, "resume"))
    assert federation.outcome(command_id).state is FinalState.SUCCEEDED


def test_config_update_names_what_it_changed_and_refuses_what_it_does_not_know(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    good = federation.outcome(
        federation.issue(N, "config_update", {"analytics_interval": 77, "log_level": "DEBUG"})
    )
    logging.getLogger("neuron_sdk").setLevel(logging.NOTSET)
    assert good.response == {
        "changed": {"analytics_interval": 77, "log_level": "DEBUG"},
        "in_effect": {"heartbeat_interval": SMALLEST, "analytics_interval": 77},
    }
    for data in ({"colour": "red"}, {"heartbeat_interval": 0}, {"log_level": "LOUD"}):
        bad = federation.outcome(federation.issue(N, "config_update", data))
        assert code(bad) == "INVALID_DATA"
        assert next(iter(data)) in str(bad.error)
    nothing = federation.outcome(federation.issue(N, "config_update"))
    assert code(nothing) == "NOTHING_TO_CHANGE"


def test_restart_worker_starts_the_service_s_workers_anew(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    starts: list[str] = []
    ends: list[str] = []
    neuron = build()

    @neuron.worker
    async def work() -> None:
        starts.append("work")
        try:
            await asyncio.sleep(3600)
        finally:
            ends.append("work")

    start(neuron)
    outcome = federation.outcome(federation.issue(N, "restart_worker"))
    assert outcome.response == {"restarted": ["work"]}
    eventually_sync(lambda: (starts, ends) == (["work", "work"], ["work"]))
    unknown = federation.outcome(federation.issue(N, "restart_worker", {"name": "x"}))
    assert code(unknown) == "UNKNOWN_WORKER"


def test_stop_ends_the_neuron_after_it_has_answered(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    outcome = federation.outcome(federation.issue(N, "stop", {"reason": "maintenance"}))
    assert outcome.response == {"stopping": True}
    federation.wait_for(lambda: federation.neurons[N].goodbyes)
    assert federation.neurons[N].goodbyes == ["stopped by a command: maintenance"]


def test_a_neuron_within_a_program_cannot_be_restarted_by_command(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    assert code(federation.outcome(federation.issue(N, "restart"))) == "NOT_SUPPORTED"


# ---- starting and ending


async def test_serve_ends_in_order_when_it_is_cancelled(
    federation: FakeFederation, build: Start
) -> None:
    events: list[str] = []
    neuron = build()
    neuron.on_start(lambda: events.append("start"))

    @neuron.on_stop
    async def on_stop() -> None:
        events.append("stop")

    serving = asyncio.create_task(neuron.serve())
    await asyncio.to_thread(federation.wait_connected, N)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert events == ["start", "stop"]
    assert federation.neurons[N].goodbyes == ["cancelled"]


def test_a_failing_on_start_fails_the_start(federation: FakeFederation, build: Start) -> None:
    neuron = build()

    @neuron.on_start
    def broken() -> None:
        raise RuntimeError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        neuron.start()


def test_commands_wait_for_on_start(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    order: list[str] = []
    neuron = build()

    @neuron.on_start
    async def load() -> None:
        await asyncio.to_thread(federation.wait_connected, N)
        await asyncio.sleep(0.1)
        order.append("loaded")

    neuron.command("task")(lambda: order.append("ran"))
    command_id = federation.issue(N, "task")
    start(neuron)
    federation.outcome(command_id)
    assert order == ["loaded", "ran"]


def test_two_neurons_cannot_share_a_state_dir(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    start(build())
    with pytest.raises(StateDirInUse, match="in use by process"):
        build().start()


def test_a_running_neuron_takes_no_more_commands_and_no_second_start(
    federation: FakeFederation, build: Start, start: Started
) -> None:
    neuron = start(build())
    with pytest.raises(LifecycleError, match="runs already"):
        neuron.start()
    with pytest.raises(LifecycleError, match="too late"):
        neuron.command("late")(lambda: None)


def test_bad_settings_raise_before_anything_starts(tmp_path: Path) -> None:
    neuron = Neuron(N, type="worker", federation_url="http://nowhere")
    with pytest.raises(ConfigError, match="federation_url"):
        neuron.start()


def test_a_worker_that_fails_is_started_again(
    federation: FakeFederation, build: Start, start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron_sdk.backoff import Backoff

    monkeypatch.setattr("neuron_sdk.workers.Backoff", lambda **_: Backoff(first_s=0.01))
    runs: list[int] = []
    neuron = build()

    @neuron.worker
    async def work() -> None:
        runs.append(1)
        raise ValueError("again")

    start(neuron)
    eventually_sync(lambda: len(runs) >= 3)
