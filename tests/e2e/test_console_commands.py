"""The console against a real server: what an operator does with commands, one and many."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from federation.v1 import session_service_pb2 as pb
from federation.v1.neuron_pb2 import CommandType, NeuronDescription
from tests.support.console import Console, lines_until
from tests.support.neuron_process import neuron_process
from tests.support.plain_neuron import PlainNeuron, plain_neuron
from tests.support.postgres import Server, passable_folder
from tests.support.processes import FederationProcess, federation_process
from tests.support.waiting import eventually_sync

WORKERS = ("worker-1", "worker-2", "worker-3")
FILTER = 'type = "worker"'
IN_AN_HOUR = ("--not-before", "1h")


class Work:
    """What the workers' commands do, and when they may end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def flaky(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        if delivery.attempt < 3:
            raise ValueError(f"no luck in attempt {delivery.attempt}")
        return {"attempt": delivery.attempt}

    def hold(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        self.may_end.wait(60)
        return {}

    def choosy(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        raise ValueError("not on this one")


@pytest.fixture(scope="module")
def server(postgres: Server) -> Iterator[FederationProcess]:
    """A server that every test here shares, on a database of its own."""
    with (
        postgres.database() as url,
        passable_folder() as folder,
        federation_process(folder, "up", "--no-demo", DATABASE_URL=url) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def console(server: FederationProcess) -> Console:
    return Console(server)


@pytest.fixture(scope="module")
def token(console: Console) -> str:
    return console.says("token", "create", "--quiet").strip()


@pytest.fixture(scope="module", autouse=True)
def work(server: FederationProcess, console: Console, token: str) -> Iterator[Work]:
    """Three workers that are ONLINE; the third one fails where the others succeed."""
    work = Work()
    with ExitStack() as stack:
        for neuron_id in WORKERS:
            third = neuron_id == WORKERS[2]
            handlers = {
                "flaky": work.flaky,
                "hold": work.hold,
                "choosy": work.choosy if third else lambda neuron, delivery: {},
            }
            description = NeuronDescription(
                neuron_id=neuron_id,
                type="worker",
                command_types=[
                    CommandType(type=name) for name in [*handlers, *(["rare"] if third else [])]
                ],
            )
            stack.enter_context(plain_neuron(server.address, token, description, handlers))

        def online() -> bool:
            return console.says("neurons", "list", "--filter", FILTER).count("ONLINE") == 3

        eventually_sync(online, within=30, describe="the workers are online")
        yield work
        work.may_end.set()


def issued(console: Console, *order: str) -> str:
    """The id of a command that was just issued."""
    return console.says("command", "issue", *order).split()[0]


def test_exec_shows_each_attempt_and_why_the_next_one_waits(console: Console) -> None:
    terms = ["--max-attempts", "3", "--retry-backoff", "20ms"]
    output = console.says("command", "exec", "worker-1", "flaky", *terms)
    told = [line[14:] for line in output.splitlines() if line[2:3] == ":"]
    assert [words.split()[0] for words in told if not words.startswith("progress")] == [
        "QUEUED",
        *["SENT", "ACCEPTED", "RUNNING", "QUEUED", "waits"] * 2,
        "SENT",
        "ACCEPTED",
        "RUNNING",
        "SUCCEEDED",
    ]
    first, second = [words.split(maxsplit=1)[1] for words in told if "ended as" in words]
    assert first == "attempt 1 of 3 ended as FAILED: HANDLER_RAISED: no luck in attempt 1"
    assert second.endswith("no luck in attempt 2")
    waits = [words.split(maxsplit=1)[1] for words in told if words.startswith("waits")]
    assert waits == [
        "attempt 2 of 3 follows after 20 ms",
        "attempt 3 of 3 follows after 40 ms",
    ]
    command_id = output.splitlines()[-5].split()[0]
    assert f"{command_id}  SUCCEEDED after 1.5 s in attempt 3 of 3" in output
    assert re.search(r"attempt +3 of 3", console.says("command", "show", command_id))
    explained = console.says("command", "explain", command_id).splitlines()
    assert "it ended as SUCCEEDED" in explained[1]
    assert "no luck in attempt 2" in explained[2]
    assert "no luck in attempt 1" in explained[3]


def test_terms_that_contradict_are_refused_by_the_fields_name(console: Console) -> None:
    terms = ["--at-most-once", "--max-attempts", "2"]
    code, _, errors = console.run("command", "issue", "worker-1", "flaky", *terms)
    assert code == 1
    assert "command.max_attempts" in errors


def test_a_command_that_waits_is_explained_cancelled_and_retried(console: Console) -> None:
    command_id = issued(console, "worker-1", "hold", *IN_AN_HOUR)
    document = console.json("command", "explain", command_id)
    assert document["facts"][0]["code"] == "WAITS_FOR_TIME"
    assert "  1. it is to be sent later" in console.says("command", "explain", command_id)
    code, _, errors = console.run("command", "retry", command_id)
    assert (code, "COMMAND_NOT_ENDED" in errors) == (1, True)
    said = console.says("command", "cancel", command_id, "--reason", "not needed", "--follow")
    assert said == f"{command_id}  CANCELLED  hold for worker-1\n"
    again = console.json("command", "retry", command_id)
    assert again["retry_of_command_id"] == command_id
    shown = console.says("command", "show", again["command_id"])
    assert re.search(rf"retry of +{command_id}", shown)
    ids = [again["command_id"], "nonsense", command_id]
    code, output, errors = console.run("command", "cancel", *ids)
    assert code == 1
    # One of them has perhaps been sent, and one was cancelled before.
    assert len(re.findall(r"^\S+  CANCELL(?:ED|ING) ", output, re.MULTILINE)) == 2
    assert "COMMAND_NOT_FOUND" in errors


def test_a_command_is_followed_over_a_server_that_is_killed_without_a_gap(
    server: FederationProcess, console: Console, work: Work
) -> None:
    work.may_end.clear()
    command_id = issued(console, "worker-1", "hold")
    with console.start("command", "follow", command_id) as child:
        try:
            told = lines_until(child, lambda line: "RUNNING" in line)
            server.kill()
            server.start()
            work.may_end.set()
            output, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    assert errors.count("asking again") == 1
    states = re.findall(r"^\d\d:\S+  ([A-Z_]+)", "".join(told) + output, re.MULTILINE)
    assert states == ["QUEUED", "SENT", "ACCEPTED", "RUNNING", "SUCCEEDED"]


def test_a_running_command_is_cancelled_and_followed_until_its_neuron_has_given_it_up(
    server: FederationProcess, console: Console, token: str, tmp_path: Path
) -> None:
    script = ("-m", "tests.support.neuron_service")
    settings = {"NEURON_ID": "service", "ENROLLMENT_TOKEN": token, "SERVICE_FOLDER": str(tmp_path)}
    with neuron_process(tmp_path / "neuron", server.address, *script, **settings):

        def online() -> bool:
            return "ONLINE" in console.says("neurons", "list", "--filter", 'neuron_id = "service"')

        eventually_sync(online, within=30, describe="the service is online")
        command_id = issued(console, "service", "hold")
        with console.start("command", "follow", command_id) as child:
            try:
                lines_until(child, lambda line: "RUNNING" in line)
            finally:
                child.kill()
        said = console.says("command", "cancel", command_id, "--reason", "enough", "--follow")
    first, *rest = said.splitlines()
    assert first == f"{command_id}  CANCELLING  hold for service"
    states = re.findall(r"^\d\d:\S+  ([A-Z_]+)", "\n".join(rest), re.MULTILINE)
    assert states == ["CANCELLED"]
    assert rest[1].startswith(f"{command_id}  CANCELLED")


def test_a_batch_reaches_whom_its_preview_named_and_says_who_failed(console: Console) -> None:
    order = ["command", "batch", "choosy", "--filter", FILTER]
    code, preview, errors = console.run(*order)
    assert code == 2
    assert "choosy for 3 neurons" in preview
    assert ", ".join(WORKERS) in preview
    assert "--yes" in errors
    assert console.json("batches", "list")["batches"] == []
    code, output, errors = console.run(*order, "--max-in-flight", "1", "--yes")
    assert code == 1
    [batch_id] = re.findall(r"^(\S+)  3 commands: 2 SUCCEEDED, 1 FAILED$", output, re.MULTILINE)
    assert re.search(r"worker-3 +FAILED +HANDLER_RAISED: not on this one", output)
    [found] = re.findall(r"their ids: federation command list --filter '(.+)'", errors)
    [failed] = console.json("command", "list", "--filter", found)["commands"]
    assert (failed["neuron_id"], failed["batch_id"]) == ("worker-3", batch_id)
    assert batch_id in console.says("command", "show", failed["command_id"])
    assert re.search(rf"{batch_id} +choosy .*3/3", console.says("batches", "list"))
    assert "worker-3" in console.says("batches", "show", batch_id)


def test_a_batch_says_who_would_get_none_and_why(console: Console) -> None:
    preview = console.says("command", "batch", "rare", "--filter", FILTER, "--dry-run")
    assert "rare for 1 neuron\n" in preview
    assert re.search(r"worker-1, worker-2 +does not advertise the command type rare", preview)
    code, _, errors = console.run("command", "batch", "dance", "--filter", FILTER, "--dry-run")
    assert code == 1
    assert "NO_NEURON_MATCHES" in errors


def test_a_batch_is_cancelled_at_once_where_it_waits(console: Console, work: Work) -> None:
    work.may_end.clear()
    order = ["command", "batch", "hold", "--filter", FILTER, "--max-in-flight", "1", "--yes"]
    with console.start(*order) as child:
        try:
            [*_, line] = lines_until(child, lambda line: "1 RUNNING" in line)
            assert "2 QUEUED" in line
            [found] = console.json("batches", "list", "--limit", "1")["batches"]
            said = console.says("batches", "cancel", found["batch_id"], "--reason", "wrong")
            assert "3 commands: 1 CANCELLING, 2 CANCELLED" in said
            work.may_end.set()
            output, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 1, errors
    assert "1 SUCCEEDED, 2 CANCELLED" in output.splitlines()[-1]
    shown = console.says("batches", "show", found["batch_id"])
    assert re.search(r"cancelled .*wrong", shown)
