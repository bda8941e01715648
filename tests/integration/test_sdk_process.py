"""A neuron as a process of its own: signals, crashes, restarts, and the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from neuron_sdk.testing import FakeFederation, FinalState
from tests.support.waiting import eventually_sync

ROOT = Path(__file__).resolve().parents[2]
N = "n-1"

TEN_LINES = """
    from neuron_sdk import Neuron, CommandContext

    neuron = Neuron("n-1", type="data-processor", capabilities=["data_processing"])

    @neuron.command("run_task")
    async def run_task(ctx: CommandContext, input_source: str, limit: int = 100) -> dict:
        for done in range(limit):
            await ctx.progress(done / limit, f"{done} rows")
        return {"processed_records": limit}
"""

SERVICE = (
    TEN_LINES
    + """
    import asyncio, pathlib, time

    @neuron.command()
    def hang(marker: str) -> None:
        pathlib.Path(marker).write_text("started")
        while True:
            time.sleep(0.01)

    @neuron.command()
    async def block(marker: str) -> None:
        pathlib.Path(marker).write_text("started")
        time.sleep(3600)

    @neuron.command(isolation="process")
    def isolated(a: int) -> int:
        return a + 1

    @neuron.command(isolation="process")
    def isolated_hang(marker: str) -> None:
        import os
        pathlib.Path(marker).write_text(str(os.getpid()))
        time.sleep(3600)
"""
)

RUN = "\n    neuron.run()            # blocks\n"

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def federation() -> Iterator[FakeFederation]:
    with FakeFederation(heartbeat_interval=0.2) as fake:
        yield fake


@pytest.fixture
def spawn(federation: FakeFederation, tmp_path: Path) -> Iterator[Spawn]:
    processes: list[subprocess.Popen[str]] = []

    def spawn_one(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        settings = {
            "FEDERATION_URL": federation.url,
            "STATE_DIR": str(tmp_path / "state"),
            "METRICS_ENABLED": "false",
            "STOP_GRACE": "0.3",
            "PYTHONPATH": str(ROOT),
        }
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **settings, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield spawn_one
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "service.py"
    path.write_text(textwrap.dedent(SERVICE + RUN))
    return path


def test_the_ten_lines_of_the_design_run_as_they_stand(
    federation: FakeFederation, spawn: Spawn, tmp_path: Path
) -> None:
    path = tmp_path / "ten.py"
    path.write_text(textwrap.dedent(TEN_LINES + RUN))
    process = spawn(str(path))
    outcome = federation.outcome(federation.issue(N, "run_task", {"input_source": "here"}))
    assert outcome.response == {"processed_records": 100}
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert federation.neurons[N].goodbyes == ["stopped by SIGTERM"]
    assert federation.neurons[N].reports, "the last report was sent"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order_and_interrupts_what_does_not_end(
    federation: FakeFederation, spawn: Spawn, script: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = spawn(str(script))
    marker = tmp_path / "marker"
    command_id = federation.issue(N, "hang", {"marker": str(marker)})
    eventually_sync(marker.exists, within=20)
    process.send_signal(number)
    assert process.wait(20) == 0
    outcome = federation.outcome(command_id)
    assert outcome.error is not None
    assert outcome.error.code == "INTERRUPTED"
    assert federation.neurons[N].goodbyes == [f"stopped by {number.name}"]


def test_a_second_signal_does_not_wait_for_the_grace(
    federation: FakeFederation, spawn: Spawn, script: Path, tmp_path: Path
) -> None:
    process = spawn(str(script), STOP_GRACE="3600")
    marker = tmp_path / "marker"
    federation.issue(N, "hang", {"marker": str(marker)})
    eventually_sync(marker.exists, within=20)
    process.send_signal(signal.SIGTERM)
    federation.wait_for(
        lambda: federation.neurons[N].heartbeats[-1].activity == 4, describe="STOPPING"
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_blocked_main_thread_cannot_keep_the_process_from_ending(
    federation: FakeFederation, spawn: Spawn, script: Path, tmp_path: Path
) -> None:
    process = spawn("-c", _with_quick_hooks(script))
    marker = tmp_path / "marker"
    command_id = federation.issue(N, "block", {"marker": str(marker)})
    eventually_sync(marker.exists, within=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 70
    outcome = federation.outcome(command_id)
    assert outcome.error is not None
    assert outcome.error.code == "INTERRUPTED"
    assert federation.neurons[N].goodbyes == ["stopped by SIGTERM"]


def _with_quick_hooks(script: Path) -> str:
    return (
        "import neuron_sdk.runtime as r, neuron_sdk.lifecycle as l, neuron_sdk.ending as e\n"
        "r.HOOKS_S = l._FORCE_AFTER_S = e.ASKED_S = e.INTERRUPTED_S = e.KILLED_S = 0.3\n"
        f"exec(compile(open({str(script)!r}).read(), {str(script)!r}, 'exec'))"
    )


def test_a_command_that_dies_with_the_process_is_told_as_interrupted(
    federation: FakeFederation, spawn: Spawn, script: Path, tmp_path: Path
) -> None:
    first = spawn(str(script))
    marker = tmp_path / "marker"
    command_id = federation.issue(N, "hang", {"marker": str(marker)})
    eventually_sync(marker.exists, within=20)
    first.kill()
    first.wait(10)
    marker.unlink()
    spawn(str(script))
    outcome = federation.outcome(command_id, within=20)
    assert outcome.state is FinalState.FAILED
    assert outcome.error is not None
    assert outcome.error.code == "INTERRUPTED"
    federation.deliver_again(command_id)
    federation.wait_for(
        lambda: sum(u.HasField("finished") for u in federation.updates_of(command_id)) >= 2,
        describe="the same end again",
    )
    assert not marker.exists(), "it did not run again"


def test_a_restart_by_command_comes_back_as_the_same_process_which_then_answers(
    federation: FakeFederation, spawn: Spawn, script: Path
) -> None:
    process = spawn(str(script))
    federation.wait_connected(N, within=20)
    command_id = federation.issue(N, "restart")
    federation.wait_connected(N, sessions=2, within=20)
    running = [run.command_id for run in federation.neurons[N].hellos[1].running_commands]
    assert running == [command_id], "it is RUNNING over the exec"
    outcome = federation.outcome(command_id, within=20)
    assert outcome.state is FinalState.SUCCEEDED
    assert outcome.response == {"restarted": True}
    one, two = federation.neurons[N].hellos
    assert one.instance_id != two.instance_id
    assert one.spool_id == two.spool_id
    assert process.poll() is None
    assert federation.neurons[N].goodbyes == ["restarted by a command"]
    pids = {beat.process.pid for beat in federation.neurons[N].heartbeats}
    assert pids == {process.pid}


def test_an_isolated_handler_of_a_script_runs_and_dies_with_the_neuron(
    federation: FakeFederation, spawn: Spawn, script: Path, tmp_path: Path
) -> None:
    process = spawn(str(script))
    outcome = federation.outcome(federation.issue(N, "isolated", {"a": 1}), within=20)
    assert outcome.response == {"result": 2}
    marker = tmp_path / "pid"
    federation.issue(N, "isolated_hang", {"marker": str(marker)})
    pid = eventually_sync(lambda: marker.exists() and int(marker.read_text() or 0), within=20)
    process.kill()
    process.wait(10)
    eventually_sync(lambda: not psutil.pid_exists(pid), describe="the orphan's end")


# ---- the command line


def test_neuron_run_runs_a_module_s_neuron(
    federation: FakeFederation, spawn: Spawn, tmp_path: Path
) -> None:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    for target in ("service:neuron", "service", "service.py"):
        sessions = len(federation.neurons[N].hellos) if N in federation.neurons else 0
        process = spawn("-m", "neuron_sdk.cli", "run", target)
        federation.wait_connected(N, sessions=sessions + 1, within=20)
        outcome = federation.outcome(federation.issue(N, "isolated", {"a": 1}), within=20)
        assert outcome.response == {"result": 2}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("target", "environment", "says"),
    [
        ("nowhere:neuron", {}, "no module 'nowhere'"),
        ("service:other", {}, "known: neuron"),
        ("service:neuron", {"HEARTBEAT_INTERVAL": "never"}, "HEARTBEAT_INTERVAL 'never'"),
        ("service:neuron", {"FEDERATION_URL": "ftp://x"}, "FEDERATION_URL 'ftp://x'"),
        ("service:neuron", {"LOG_FILE": "/proc/none/x.log"}, "LOG_FILE"),
        ("service:neuron", {"STATE_DIR": "/proc/none"}, "STATE_DIR /proc/none"),
        ("mistaken:neuron", {}, "parameter 'x' has no annotation"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    spawn: Spawn, tmp_path: Path, target: str, environment: dict[str, str], says: str
) -> None:
    (tmp_path / "service.py").write_text(textwrap.dedent(SERVICE))
    (tmp_path / "mistaken.py").write_text(
        "from neuron_sdk import Neuron\n"
        "neuron = Neuron('n-1', type='worker')\n"
        "@neuron.command()\n"
        "def f(x): ...\n"
    )
    process = spawn("-m", "neuron_sdk.cli", "run", target, **environment)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert says in stderr
    assert len(stderr.splitlines()) == 1, stderr


def test_a_script_with_a_setting_that_is_wrong_ends_with_one_line_and_exit_code_2(
    spawn: Spawn, script: Path
) -> None:
    process = spawn(str(script), HEARTBEAT_INTERVAL="never")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "HEARTBEAT_INTERVAL 'never'" in stderr
    assert len(stderr.splitlines()) == 1, stderr


def test_a_script_that_runs_its_neuron_itself_is_run_once_by_neuron_run(
    federation: FakeFederation, spawn: Spawn, script: Path
) -> None:
    process = spawn("-m", "neuron_sdk.cli", "run", script.name)
    federation.wait_connected(N, within=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert len(federation.neurons[N].hellos) == 1


def test_a_second_neuron_on_the_same_state_is_refused_by_name(
    federation: FakeFederation, spawn: Spawn, script: Path
) -> None:
    first = spawn(str(script))
    federation.wait_connected(N, within=20)
    second = spawn("-m", "neuron_sdk.cli", "run", "service")
    # The script runs its neuron when it is imported: the error comes through it.
    _, stderr = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in stderr


def test_an_idle_neuron_with_its_pages_is_small(
    federation: FakeFederation, spawn: Spawn, tmp_path: Path
) -> None:
    path = tmp_path / "ten.py"
    path.write_text(textwrap.dedent(TEN_LINES + RUN))
    process = spawn(str(path), METRICS_ENABLED="true", METRICS_PORT="0")
    federation.wait_connected(N, within=20)
    federation.outcome(federation.issue(N, "run_task", {"input_source": "here"}))
    rss = psutil.Process(process.pid).memory_info().rss
    assert rss <= 60 * 2**20, f"{rss / 2**20:.1f} MiB"
