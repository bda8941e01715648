"""`federation up` and `serve` as processes: what a newcomer sees, and what is left behind."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.processes import FEDERATION, READY_WITHIN_S, FederationProcess, free_port
from tests.support.waiting import eventually_sync


@contextmanager
def up(folder: Path, *arguments: str, **environment: str) -> Iterator[FederationProcess]:
    """A `federation` that was started; nothing of it is left after the block."""
    federation = FederationProcess(folder, *arguments, **environment)
    federation.launch()
    try:
        yield federation
    finally:
        if federation.process.poll() is None:
            children = descendants(federation.process)
            try:
                federation.stop()
            finally:
                federation.kill()
            eventually_sync(lambda: gone(children), within=20, describe="nothing is left")


def run(
    federation: FederationProcess, command: str, *names: str
) -> subprocess.CompletedProcess[str]:
    """Runs a shell command as a person would in another terminal, where nothing is set but those
    variables of the federation's.
    """
    return subprocess.run(  # noqa: S602 - the banner's commands are meant for a shell
        command,
        shell=True,
        env={name: federation.environment[name] for name in ("HOME", "PATH", *names)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def banner_commands(output: str) -> list[str]:
    """The three commands that the banner tells to try."""
    _, _, after = output.partition("Try, in another terminal:")
    after, _, _ = after.partition("Ctrl-C")
    return [line.strip() for line in after.splitlines() if line.strip()]


def test_a_newcomer_sees_all_there_is_and_the_commands_work_as_printed(folder: Path) -> None:
    with up(folder, "up") as federation:
        output = federation.says("Ctrl-C stops everything")
        assert f"127.0.0.1:{federation.port}" in output
        assert str(federation.data_dir) in output
        key = re.search(r"fak_[\w-]+", output)
        assert key is not None
        assert re.search(r"fet_[\w-]+", output)
        commands = banner_commands(output)
        assert len(commands) == 3

        def listed() -> bool:
            return "ONLINE" in run(federation, commands[0]).stdout

        eventually_sync(listed, within=30, describe="the demo neuron is online")
        for command in commands:
            done = run(federation, command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert "World" in run(federation, commands[1]).stdout
        kept = federation.data_dir / "admin.key"
        assert kept.read_text().strip() == key[0]
        assert kept.stat().st_mode & 0o777 == 0o600


def test_the_line_that_starts_a_neuron_works_as_printed(folder: Path) -> None:
    (folder / "my_neuron.py").write_text(
        "from neuron_sdk import Neuron\nNeuron('mine', type='t').run()\n"
    )
    with up(folder, "up", "--no-demo") as federation:
        output = federation.says("Ctrl-C stops everything")
        (line,) = re.findall(r"^ +(.*python.* my_neuron\.py)$", output, re.MULTILINE)
        given = {name: federation.environment[name] for name in ("HOME", "PATH")}
        given["METRICS_PORT"] = "0"
        neuron = subprocess.Popen(["sh", "-c", f"exec env {line}"], env=given, cwd=folder)
        try:
            listing = banner_commands(output)[0]

            def online() -> bool:
                return "ONLINE" in run(federation, listing).stdout

            eventually_sync(online, within=30, describe="the neuron is online")
        finally:
            neuron.terminate()
            assert neuron.wait(30) == 0


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, "not to be read (No such file or directory)"),
        ("", "none that this federation knows"),
        ("fak_of-another-federation", "none that this federation knows"),
    ],
)
def test_an_admin_key_that_is_of_no_use_is_said_at_the_start(
    folder: Path, kept: str | None, said: str
) -> None:
    with up(folder, "up", "--no-demo") as federation:
        federation.says("Ctrl-C stops everything")
    file = federation.data_dir / "admin.key"
    file.unlink()
    if kept is not None:
        file.write_text(kept)
    with up(folder, "up", "--no-demo") as federation:
        assert f"admin key          {said}" in federation.says("Ctrl-C stops everything")


def test_ctrl_c_stops_everything_in_order_and_leaves_nothing_behind(folder: Path) -> None:
    with up(folder, "up") as federation:
        federation.says("Ctrl-C stops everything")
        children = descendants(federation.process)
        assert len(children) > 2
        federation.process.send_signal(signal.SIGINT)
        assert federation.ended() == 0
        assert gone(children)
        assert "Traceback" not in federation.output


def test_after_kill_9_nothing_runs_and_the_next_start_has_the_same_data(folder: Path) -> None:
    with up(folder, "up") as federation:
        federation.says("Ctrl-C stops everything")
        listing = banner_commands(federation.output)[0]

        def listed() -> bool:
            return "demo-neuron" in run(federation, listing).stdout

        eventually_sync(listed, within=30, describe="the demo neuron is known")
        children = descendants(federation.process)
        federation.process.kill()
        eventually_sync(lambda: gone(children), within=10, describe="no process is left")
    with up(folder, "up", "--no-demo") as federation:
        output = federation.says("Ctrl-C stops everything")
        assert "fak_" not in output
        assert str(federation.data_dir / "admin.key") in output
        assert "demo-neuron" in run(federation, banner_commands(output)[0]).stdout


def test_a_dead_postgresql_is_started_again(folder: Path) -> None:
    with up(folder, "up", "--no-demo") as federation:
        federation.says("Ctrl-C stops everything")
        command = banner_commands(federation.output)[0]
        for child in descendants(federation.process):
            if "postgres" in child.name():
                child.kill()

        def answers() -> bool:
            return run(federation, command).returncode == 0

        eventually_sync(answers, within=30, describe="the server answers again")


def fails(federation: FederationProcess, *words: str) -> None:
    assert federation.ended(READY_WITHIN_S) == 1, federation.output
    output = federation.output.strip()
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    for word in words:
        assert word in last, output


def test_a_taken_port_is_one_line_that_says_what_to_do(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with up(folder, "up", "--no-demo", FEDERATION_PORT=port) as federation:
            fails(federation, port, "Address already in use", "--port")
            assert "Failed to add port" not in federation.output, "gRPC's own line is left out"


def test_a_data_folder_in_use_is_one_line_that_says_what_to_do(folder: Path) -> None:
    with up(folder, "up", "--no-demo") as first:
        first.says("Ctrl-C stops everything")
        with up(folder, "up", "--no-demo") as second:
            fails(second, str(first.process.pid), "FEDERATION_DATA_DIR")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("mysql://localhost/x", "postgresql://"),
        ("nonsense", "postgresql://"),
        ("postgresql://127.0.0.1:port/x", "postgresql://"),
        ("postgresql://localhost", "database"),
    ],
)
def test_a_wrong_database_url_is_one_line_that_says_what_to_do(
    folder: Path, url: str, word: str
) -> None:
    with up(folder, "serve", DATABASE_URL=url) as federation:
        fails(federation, "DATABASE_URL", word)


def test_serve_without_a_database_url_says_what_to_do(folder: Path) -> None:
    with up(folder, "serve") as federation:
        fails(federation, "DATABASE_URL", "federation up")


def test_serve_on_an_empty_database_says_to_migrate(folder: Path, empty_database_url: str) -> None:
    with up(folder, "serve", DATABASE_URL=empty_database_url) as federation:
        fails(federation, "federation migrate")


def test_a_bad_setting_is_named(folder: Path) -> None:
    with up(folder, "serve", FEDERATION_FLUSH_INTERVAL="soon") as federation:
        assert federation.ended(READY_WITHIN_S) == 2
        assert "FEDERATION_FLUSH_INTERVAL" in federation.output
        assert "Traceback" not in federation.output


def test_plaintext_beyond_loopback_needs_to_be_said_aloud(folder: Path, database_url: str) -> None:
    with up(folder, "serve", "--host", "0.0.0.0", DATABASE_URL=database_url) as federation:
        fails(federation, "--insecure")


def test_a_postgresql_that_is_away_is_waited_for_in_clear_lines(folder: Path) -> None:
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/federation"
    with up(folder, "serve", DATABASE_URL=url) as federation:
        output = federation.says("waiting for PostgreSQL")
        assert "Traceback" not in output
        federation.process.send_signal(signal.SIGTERM)
        assert federation.ended() == 0


@pytest.mark.parametrize("command", ["up", "serve", "migrate"])
def test_a_database_that_is_not_there_ends_the_start_in_one_line(
    folder: Path, empty_database_url: str, command: str
) -> None:
    nowhere = empty_database_url.replace("federation_test", "nowhere")
    with up(folder, command, DATABASE_URL=nowhere) as federation:
        fails(federation, "DATABASE_URL lets nobody in: ")
        assert "does not exist" in federation.output


def test_a_migration_url_that_lets_nobody_in_is_named(
    folder: Path, empty_database_url: str
) -> None:
    nowhere = empty_database_url.replace("federation_test", "nowhere")
    settings = {"DATABASE_URL": empty_database_url, "FEDERATION_MIGRATION_URL": nowhere}
    with up(folder, "migrate", **settings) as federation:
        fails(federation, "FEDERATION_MIGRATION_URL lets nobody in: ")


def test_migrate_and_serve_work_on_a_postgresql_of_ones_own(
    folder: Path, empty_database_url: str
) -> None:
    with up(folder, "migrate", DATABASE_URL=empty_database_url) as migrating:
        assert migrating.ended() == 0
    with up(folder, "serve", DATABASE_URL=empty_database_url) as federation:
        federation.says("serving")
        server = shlex.quote(f"127.0.0.1:{federation.port}")
        listing = run(
            federation, f"{FEDERATION} neurons list --server {server}", "FEDERATION_DATA_DIR"
        )
        assert listing.returncode == 0, listing.stderr
        federation.process.send_signal(signal.SIGTERM)
        assert federation.ended() == 0


def test_what_a_start_does_to_keys_is_in_the_audit_log(folder: Path, database_url: str) -> None:
    keys = ("the-first-admin-key-of-all", "the-admin-key-after-that", "the-admin-key-after-that")
    exported = ""
    for key in keys:
        environment = {"DATABASE_URL": database_url, "ADMIN_API_KEY": key}
        with up(folder, "up", "--no-demo", **environment) as federation:
            federation.says("Ctrl-C stops everything")
            server = shlex.quote(f"127.0.0.1:{federation.port}")
            export = f"{FEDERATION} audit export --server {server}"
            exported = run(federation, export, "ADMIN_API_KEY").stdout
    entries = [json.loads(line) for line in exported.splitlines()]
    assert {(entry["actor"], entry["method"], entry["outcome"]) for entry in entries} == {
        ("server", "", "OK")
    }
    assert [(each["object_type"], each["after"].get("how")) for each in entries] == [
        ("api_key", "added"),
        ("enrollment_token", None),
        ("api_key", "replaced"),
        ("enrollment_token", None),
        ("enrollment_token", None),
    ]
    assert {entry["object_id"] for entry in entries if entry["object_type"] == "api_key"} == {
        "admin-env"
    }
    assert entries[1]["after"]["allow_reenrollment"] is True
