"""The console against a real server: what an operator does in a day."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from federation.v1 import session_service_pb2 as pb
from federation.v1.neuron_pb2 import CommandType, NeuronDescription
from federation.v1.report_pb2 import AnalyticsReport, MetricPoint, ReportedEvent, Severity
from tests.support.console import Console, lines_until
from tests.support.plain_neuron import PlainNeuron, now, plain_neuron
from tests.support.postgres import Server, passable_folder
from tests.support.processes import FederationProcess, federation_process
from tests.support.waiting import eventually_sync

NEURON = "scraper-1"


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


class Work:
    """What the neuron's commands do, and when they may end."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def greet(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        neuron.progress(delivery, 0.5, "half of the greeting")
        return {"greeting": f"Hello, {delivery.data['name']}", "times": 3}

    def fail(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        raise ValueError("there is no such table")

    def wait(self, neuron: PlainNeuron, delivery: pb.CommandDelivery) -> dict[str, Any]:
        neuron.progress(delivery, 0.25, "waiting")
        self.may_end.wait(60)
        return {"waited": True}


@pytest.fixture(scope="module")
def work() -> Work:
    return Work()


@pytest.fixture(scope="module")
def neuron(server: FederationProcess, console: Console, work: Work) -> Iterator[PlainNeuron]:
    """A neuron that is ONLINE, enrolled by a token of the console."""
    token = console.says("token", "create", "--quiet", "--type", "scraper").strip()
    handlers = {"greet": work.greet, "fail": work.fail, "wait": work.wait}
    description = NeuronDescription(
        neuron_id=NEURON,
        name="[bold]The first[/bold] \x1b[31mscraper",
        type="scraper",
        labels={"zone": "eu"},
        command_types=[CommandType(type=name) for name in handlers],
    )
    with plain_neuron(server.address, token, description, handlers) as neuron:

        def online() -> bool:
            return "ONLINE" in console.says("neurons", "list")

        eventually_sync(online, within=30, describe="the neuron is online")
        yield neuron


def test_a_neuron_is_listed_shown_and_counted(console: Console, neuron: PlainNeuron) -> None:
    def health() -> bool:
        [found] = console.json("neurons", "list", "--filter", "labels.zone = eu")["neurons"]
        return bool(found["neuron_id"] == NEURON and found.get("health_score") == 87.5)

    eventually_sync(health, within=20, describe="the first heartbeat is stored")
    header, row = console.says("neurons", "list").splitlines()
    assert header.split()[:3] == ["NEURON", "TYPE", "PRESENCE"]
    assert row.split()[:4] == [NEURON, "scraper", "ONLINE", "87.5"]
    shown = console.says("neurons", "show", NEURON)
    assert "[bold]The first[/bold] scraper" in shown
    assert "\x1b" not in shown
    for command in ("greet", "fail", "wait"):
        assert command in shown
    assert console.json("overview")["total"] == "1"
    assert re.search(r"ONLINE +1\b", console.says("overview"))
    assert len(console.json("neurons", "heartbeats", NEURON)["heartbeats"]) >= 1
    assert "87.5" in console.says("neurons", "heartbeats", NEURON)


def test_what_an_operator_did_is_in_the_audit_log_and_its_export(
    console: Console, neuron: PlainNeuron
) -> None:
    for zone in ("us\\u001b[31m", "eu"):
        console.says("neurons", "update", NEURON, "--set", f'labels={{"zone":"{zone}"}}')
    wanted = f'neuron_id = "{NEURON}" AND method = "*/UpdateNeuron"'
    _, *rows = console.says("audit", "list", wanted).splitlines()
    assert len(rows) == 2
    assert "\x1b" not in "".join(rows)
    assert "admin:admin" in rows[0]
    first, second = map(json.loads, console.says("audit", "export", wanted).splitlines())
    assert first["after"]["labels"] == second["before"]["labels"] == {"zone": "us\x1b[31m"}
    everything = [json.loads(line) for line in console.says("audit", "export").splitlines()]
    asked_for = [entry for entry in everything if entry["actor"] != "server"]
    assert [entry["method"].rpartition("/")[2] for entry in asked_for[:2]] == [
        "CreateEnrollmentToken",
        "Register",
    ]


def test_a_filter_that_is_wrong_is_explained(console: Console, neuron: PlainNeuron) -> None:
    code, output, errors = console.run("neurons", "list", "--filter", "type = = x")
    assert (code, output) == (1, "")
    assert "INVALID_FIELD" in errors
    assert "filter at character 8" in errors


def test_a_neuron_that_is_not_there_is_one_line(console: Console) -> None:
    code, _, errors = console.run("neurons", "show", "nobody")
    assert code == 1
    assert errors.count("\n") == 1
    assert "NEURON_NOT_FOUND" in errors


def test_exec_shows_the_way_of_a_command_to_its_response(
    console: Console, neuron: PlainNeuron
) -> None:
    output = console.says("command", "exec", NEURON, "greet", "name=World")
    states = re.findall(r"^\d\d:\S+  (\w+)", output, re.MULTILINE)
    assert [state for state in states if state != "progress"] == [
        "QUEUED",
        "SENT",
        "ACCEPTED",
        "RUNNING",
        "SUCCEEDED",
    ]
    assert "SUCCEEDED after 1.5 s" in output
    assert '"greeting": "Hello, World"' in output
    assert '"times": 3' in output


def test_exec_of_what_fails_says_why_and_exits_1(console: Console, neuron: PlainNeuron) -> None:
    code, output, _ = console.run("command", "exec", NEURON, "fail")
    assert code == 1
    assert "FAILED" in output
    assert "there is no such table" in output
    assert "the last words" in output


def test_a_command_is_issued_once_however_often_it_is_said(
    console: Console, neuron: PlainNeuron
) -> None:
    order = ["command", "issue", NEURON, "greet", "name=Again", "--request-id", "request-1"]
    first, second = console.json(*order), console.json(*order)
    assert first["command_id"] == second["command_id"]

    def done() -> bool:
        found = console.json("command", "show", first["command_id"])
        return bool(found["state"] == "COMMAND_STATE_SUCCEEDED")

    eventually_sync(done, within=20, describe="the command succeeds")
    listed = console.json("command", "list", "--filter", "type = greet")["commands"]
    assert [each["command_id"] for each in listed].count(first["command_id"]) == 1
    assert first["command_id"] in console.says("command", "list")
    shown = console.says("command", "show", first["command_id"])
    assert "SUCCEEDED" in shown
    assert "Hello, Again" in shown


def test_a_command_that_nobody_knows_is_refused_and_a_dry_run_orders_nothing(
    console: Console, neuron: PlainNeuron
) -> None:
    code, _, errors = console.run("command", "issue", NEURON, "dance")
    assert code == 1
    assert "COMMAND_TYPE_NOT_ADVERTISED" in errors
    dry = console.json("command", "issue", NEURON, "greet", "name=Dry", "--dry-run")
    assert dry["command_id"] == ""


def test_metrics_and_events_come_as_reported(console: Console, neuron: PlainNeuron) -> None:
    report = AnalyticsReport(
        start_time=now(),
        end_time=now(),
        points=[MetricPoint(name="rows_done", unit="rows", counter=12.5)],
        events=[
            ReportedEvent(
                event_time=now(),
                severity=Severity.SEVERITY_ERROR,
                type="disk_full",
                message="no [red]space[/red]\x1b]0;left\x07",
            )
        ],
    )
    neuron.report(analytics_report=report)

    def named() -> bool:
        return "rows_done" in console.says("metrics", "names")

    eventually_sync(named, within=20, describe="the metric is stored")
    answer = console.json("metrics", "rows_done", "--since", "1h", "--group-by", "neuron_id")
    [series] = answer["series"]
    assert series["group"] == {"neuron_id": NEURON}
    assert sum(bucket["sum"] for bucket in series["buckets"]) == 12.5
    assert "12.5" in console.says("metrics", "rows_done")
    events = console.says("events", "--filter", "severity >= ERROR")
    assert "no [red]space[/red]" in events
    assert "\x1b" not in events


def test_an_api_key_lives_from_its_creation_to_its_end(
    console: Console, server: FederationProcess
) -> None:
    secret = console.says("api-key", "create", "ci", "--role", "viewer", "--quiet").strip()
    assert console.says("neurons", "list", "--key", secret) is not None
    new = console.says("api-key", "rotate", "ci", "--overlap", "1h", "--quiet").strip()
    [row] = [line for line in console.says("api-key", "list").splitlines() if " ci " in f" {line} "]
    assert "VIEWER" in row
    assert "two secrets" in row
    assert "expires" in console.says("api-key", "expire", "ci", "7d")
    assert "ci is revoked" in console.says("api-key", "revoke", "ci")
    assert not {secret, new} & set(console.says("api-key", "list", "--json").split('"'))


def test_signing_keys_rotate_under_a_neuron(console: Console, neuron: PlainNeuron) -> None:
    before = console.json("keys", "list")["signing_keys"]
    kid = console.says("keys", "rotate").split()[0]
    rows = console.says("keys", "list").splitlines()[1:]
    assert len(rows) == len(before) + 1
    assert rows[0].split()[:2] == [kid, "signs"]
    assert rows[1].split()[:2] == [before[0]["kid"], "verifies"]


def test_a_token_is_listed_and_revoked(console: Console) -> None:
    made = console.json("token", "create", "--description", "to be revoked", "--ttl", "1h")
    token_id = made["enrollment_token"]["enrollment_token_id"]
    assert made["secret"].startswith("fet_")
    assert made["secret"] not in console.says("token", "list", "--json")
    console.says("token", "revoke", token_id)
    [row] = [line for line in console.says("token", "list").splitlines() if token_id in line]
    assert "revoked" in row


def test_a_neuron_is_updated_deactivated_and_activated(
    console: Console, neuron: PlainNeuron
) -> None:
    updated = console.json("neurons", "update", NEURON, "--set", 'labels={"zone": "us"}')
    assert updated["description"]["labels"] == {"zone": "us"}
    console.says("neurons", "update", NEURON, "--set", 'labels={"zone": "eu"}')
    console.says("neurons", "deactivate", NEURON, "--reason", "a test")
    assert "DEACTIVATED" in console.says("neurons", "list")
    console.says("neurons", "activate", NEURON)

    def online() -> bool:
        return "ONLINE" in console.says("neurons", "list")

    eventually_sync(online, within=30, describe="the neuron is back")
    code, _, errors = console.run("neurons", "delete", NEURON, "--yes")
    assert code == 1
    assert "NEURON_NOT_OFFLINE" in errors


def test_a_wrong_key_is_refused_without_being_shown(console: Console) -> None:
    code, output, errors = console.run("overview", "--key", "fak_wrong-and-secret")
    assert (code, output) == (1, "")
    assert "CREDENTIAL_INVALID" in errors
    assert "the key came from --key" in errors
    assert "fak_wrong" not in errors


def test_exec_and_watch_go_on_over_a_server_that_is_killed(
    server: FederationProcess, console: Console, neuron: PlainNeuron, work: Work
) -> None:
    work.may_end.clear()
    with (
        console.start("neurons", "watch", "--interval", "100ms") as watch,
        console.start("command", "exec", NEURON, "wait") as child,
    ):
        try:
            lines_until(watch, lambda line: json.loads(line)["change"] == "added")
            told = lines_until(child, lambda line: "waiting" in line)
            server.kill()
            server.start()
            work.may_end.set()
            output, errors = child.communicate(timeout=60)
            assert child.returncode == 0, errors
            assert "asking again" in errors
            states = re.findall(r"^\d\d:\S+  ([A-Z_]+)", "".join(told) + output, re.MULTILINE)
            assert len(states) == len(set(states))
            assert states[-1] == "SUCCEEDED"
            assert '"waited": true' in output
            lines_until(watch, lambda line: json.loads(line)["change"] == "changed")
            watch.send_signal(signal.SIGINT)
            _, errors = watch.communicate(timeout=20)
            assert watch.returncode == 130
            assert "the federation is back" in errors
        finally:
            watch.kill()
            child.kill()
