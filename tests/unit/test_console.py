"""The console against a server whose answers are written beforehand: what is asked, what is
printed, how it ends. What the real server makes of it is in tests/e2e/test_console.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from federation.v1 import access_service_pb2 as access
from federation.v1 import analytics_service_pb2 as analytics
from federation.v1 import command_service_pb2 as commands
from federation.v1 import fleet_service_pb2 as fleet
from federation.v1.command_pb2 import Execution
from tests.support.console import KEY, command, executed, federation, neuron, run, watched
from tests.support.scripted_federation import Refusal, ScriptedFederation

__all__ = ["federation"]  # a fixture

LEAVES = [
    "overview",
    "neurons list",
    "neurons show",
    "neurons watch",
    "neurons update",
    "neurons deactivate",
    "neurons activate",
    "neurons delete",
    "neurons heartbeats",
    "command issue",
    "command exec",
    "command follow",
    "command cancel",
    "command retry",
    "command explain",
    "command batch",
    "command list",
    "command show",
    "batches list",
    "batches show",
    "batches follow",
    "batches cancel",
    "metrics show",
    "metrics names",
    "events",
    "token create",
    "token list",
    "token revoke",
    "api-key create",
    "api-key list",
    "api-key rotate",
    "api-key expire",
    "api-key revoke",
    "keys list",
    "keys rotate",
    "audit list",
    "audit export",
]


# --- help and options


@pytest.mark.parametrize("leaf", LEAVES)
def test_help_shows_a_worked_example_and_the_exit_codes(leaf: str) -> None:
    result = run(*leaf.split(), "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert f"Example: federation {leaf.replace('metrics show', 'metrics')}" in text
    assert "Exit codes: 0 done" in text
    for option in ("--json", "--server", "--key", "--timeout"):
        assert option in text


def test_the_roots_help_names_every_noun_and_loads_none() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from federation_server import cli\n"
        "print(CliRunner().invoke(cli.app, ['--help']).output)\n"
        "assert not {'grpc', 'google.protobuf', 'federation.v1'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for noun in (
        "overview",
        "neurons",
        "command",
        "batches",
        "metrics",
        "events",
        "token",
        "audit",
    ):
        assert re.search(rf"\b{noun}\b", done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        "neurons list --json --timeout 5",
        "neurons --json list --timeout=5",
        "--json --timeout 5 neurons list",
        "--timeout=5 neurons --json list",
    ],
)
def test_shared_options_stand_before_or_after_the_command(
    federation: ScriptedFederation, arguments: str
) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("a")])
    result = run(*arguments.split())
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["neurons"][0]["neuron_id"] == "a"


def test_a_wrong_option_and_a_wrong_command_are_usage_errors() -> None:
    assert run("neurons", "list", "--nonsense").exit_code == 2
    assert run("neurons", "nonsense").exit_code == 2
    assert run("nonsense").exit_code == 2


# --- the key and the server


def test_the_key_goes_along_and_is_never_printed(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse()
    assert run("neurons", "list").exit_code == 0
    assert federation.metadata["x-admin-key"] == KEY


def test_without_a_key_one_line_says_how_to_give_one(
    federation: ScriptedFederation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDERATION_ADMIN_KEY")
    monkeypatch.delenv("ADMIN_API_KEY", raising=False)
    result = run("neurons", "list")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    for way in ("--key", "FEDERATION_ADMIN_KEY", "ADMIN_API_KEY", str(tmp_path / "admin.key")):
        assert way in result.stderr
    (tmp_path / "admin.key").write_text(KEY + "\n")
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse()
    assert run("neurons", "list").exit_code == 0


def test_a_server_that_is_not_there_is_one_line_and_exit_code_3(
    federation: ScriptedFederation,
) -> None:
    result = run("neurons", "list", "--server", "127.0.0.1:1")
    assert result.exit_code == 3
    assert result.stderr == (
        "federation: no federation answers at 127.0.0.1:1: start one with `federation up`,"
        " or name it with --server\n"
    )


def test_a_server_that_does_not_answer_in_time_is_one_line(federation: ScriptedFederation) -> None:
    over = threading.Event()

    def hang(request: object, context: object) -> Any:
        over.wait(20)
        return fleet.ListNeuronsResponse()

    federation.answers["ListNeurons"] = hang
    federation.answers["ExecuteCommand"] = hang
    try:
        for order in (["neurons", "list"], ["command", "exec", "a", "b"]):
            result = run(*order, "--timeout", "0.3")
            assert result.exit_code == 3
            assert "did not answer within 0.3 s" in result.stderr
    finally:
        over.set()


def test_something_else_that_listens_is_named_as_such(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = Refusal(grpc.StatusCode.UNIMPLEMENTED, "no such method")
    result = run("neurons", "list")
    assert result.exit_code == 1
    assert "is no federation" in result.stderr


# --- errors


def test_a_refusal_shows_reason_and_every_violation(federation: ScriptedFederation) -> None:
    federation.answers["IssueCommand"] = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "the request is not valid",
        [
            ErrorInfo(reason="INVALID_FIELD", domain="federation"),
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field="command.type", description="is malformed"),
                    BadRequest.FieldViolation(field="command.data", description="\x1b[31mred"),
                ]
            ),
        ],
    )
    result = run("command", "issue", "a", "B")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "federation: the request is not valid (INVALID_FIELD)",
        "  command.type: is malformed",
        "  command.data: red",
    ]


def test_a_single_violation_that_the_reason_tells_is_not_said_twice(
    federation: ScriptedFederation,
) -> None:
    federation.answers["IssueCommand"] = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "command.data.upto must be of type integer",
        [
            ErrorInfo(reason="INVALID_FIELD", domain="federation"),
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(
                        field="command.data.upto", description="must be of type integer"
                    )
                ]
            ),
        ],
    )
    result = run("command", "issue", "a", "count")
    assert result.stderr.splitlines() == [
        "federation: command.data.upto must be of type integer (INVALID_FIELD)"
    ]


def test_a_server_whose_name_is_unknown_was_never_reached(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "errors resolving nowhere.invalid:50051: [address lookup failed: Domain name not found]",
    )
    result = run("neurons", "list")
    assert result.exit_code == 3
    assert "there is no host of that name" in result.stderr


def test_a_type_that_is_not_advertised_is_explained_as_this_command_line_has_it(
    federation: ScriptedFederation,
) -> None:
    info = ErrorInfo(reason="COMMAND_TYPE_NOT_ADVERTISED", metadata={"neuron_id": "n-1"})
    federation.answers["ExecuteCommand"] = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "the neuron does not advertise it", [info]
    )
    said = run("command", "exec", "n-1", "nonsense").stderr
    assert "`federation neurons show n-1` lists its types; --allow-unadvertised" in said


def test_an_incident_and_a_wait_are_shown(federation: ScriptedFederation) -> None:
    federation.answers["GetFleetOverview"] = Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "the database does not answer",
        [
            ErrorInfo(reason="DATABASE_UNAVAILABLE", metadata={"incident_id": "i-42"}),
            RetryInfo(retry_delay=Duration(seconds=2)),
        ],
    )
    result = run("overview")
    assert result.exit_code == 3
    assert "(DATABASE_UNAVAILABLE)" in result.stderr
    assert "i-42" in result.stderr
    assert "try again in 2 s" in result.stderr


def test_the_overview_says_whose_neurons_are_not_marked_down_and_why(
    federation: ScriptedFederation,
) -> None:
    def doubt(*causes: fleet.DoubtCause.ValueType, sweeping: bool) -> fleet.ServerDoubt:
        return fleet.ServerDoubt(server_id="abc", causes=causes, sweeping=sweeping)

    federation.answers["GetFleetOverview"] = fleet.GetFleetOverviewResponse(
        doubts=[
            doubt(fleet.DOUBT_CAUSE_LOOP_LAG, fleet.DOUBT_CAUSE_MASS_DISCONNECT, sweeping=True),
            doubt(fleet.DOUBT_CAUSE_MASS_DISCONNECT, sweeping=True),
            doubt(fleet.DOUBT_CAUSE_FLUSH_LAG, sweeping=False),
        ]
    )
    _, *lines = run("overview").stdout.splitlines()
    later = "neurons that were lost all at once are not marked down yet"
    assert lines[:3] == [
        "Presence frozen (LOOP_LAG, MASS_DISCONNECT): no neuron is marked down, since -",
        f"Presence frozen (MASS_DISCONNECT): {later}, since -",
        "Presence frozen (FLUSH_LAG): the neurons of server abc are not marked down, since -",
    ]


def test_a_refused_key_is_named_by_its_source(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = Refusal(
        grpc.StatusCode.UNAUTHENTICATED,
        "the credential is not valid",
        [ErrorInfo(reason="CREDENTIAL_INVALID")],
    )
    result = run("neurons", "list")
    assert result.exit_code == 1
    assert "the key came from FEDERATION_ADMIN_KEY" in result.stderr


# --- lists


def test_a_list_follows_its_pages_up_to_the_limit(federation: ScriptedFederation) -> None:
    def page(request: fleet.ListNeuronsRequest, context: object) -> fleet.ListNeuronsResponse:
        start = int(request.page_token or 0)
        end = min(start + min(request.page_size, 2), 5)
        return fleet.ListNeuronsResponse(
            neurons=[neuron(f"n-{number}") for number in range(start, end)],
            next_page_token=str(end) if end < 5 else "",
        )

    federation.answers["ListNeurons"] = page
    arguments = ["neurons", "list", "--filter", "type = x", "--order-by", "name desc"]
    whole = run(*arguments)
    assert [line.split()[0] for line in whole.stdout.splitlines()[1:]] == [
        f"n-{number}" for number in range(5)
    ]
    assert {request.filter for request in federation.requests["ListNeurons"]} == {"type = x"}
    assert {request.order_by for request in federation.requests["ListNeurons"]} == {"name desc"}
    cut = run(*arguments, "--limit", "3")
    assert len(cut.stdout.splitlines()) == 4
    assert "there are more" in cut.stderr
    assert len(json.loads(run(*arguments, "--limit", "3", "--json").stdout)["neurons"]) == 3


def test_an_empty_list_prints_nothing_but_a_note(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse()
    result = run("neurons", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no neuron has registered yet" in result.stderr
    assert json.loads(run("neurons", "list", "--json").stdout)["neurons"] == []


def test_data_is_printed_as_text_and_nothing_else(federation: ScriptedFederation) -> None:
    shown = neuron(
        "a",
        presence_reason="[bold]loud[/bold] [/nonsense] :smile: \x1b[31mred\x1b]0;title\x07",
        description={"neuron_id": "a", "type": "x", "metadata": {"key": "\x9b31m [b]"}},
    )
    federation.answers["GetNeuron"] = fleet.GetNeuronResponse(neuron=shown)
    text = run("neurons", "show", "a").stdout
    assert "[bold]loud[/bold] [/nonsense] :smile: red" in text
    assert "\x1b" not in text
    assert "\x9b" not in text
    document = run("neurons", "show", "a", "--json").stdout
    assert "\x1b" not in document
    assert "\x9b" not in document
    assert json.loads(document)["description"]["metadata"]["key"] == "\x9b31m [b]"


def test_a_row_in_a_pipe_is_one_line_however_long(federation: ScriptedFederation) -> None:
    federation.answers["ListNeurons"] = fleet.ListNeuronsResponse(neurons=[neuron("n" * 128)])
    lines = run("neurons", "list").stdout.splitlines()
    assert len(lines) == 2
    assert "n" * 128 in lines[1]


def test_numbers_are_whole_where_they_are(federation: ScriptedFederation) -> None:
    shown = neuron("a", health_score=92, description={"metadata": {"n": 3, "x": 0.5}})
    federation.answers["GetNeuron"] = fleet.GetNeuronResponse(neuron=shown)
    document = run("neurons", "show", "a", "--json").stdout
    assert '"n": 3,' in document or '"n": 3\n' in document
    assert json.loads(document)["health_score"] == 92


# --- neurons


def test_a_neuron_that_pulls_shows_its_lease_and_no_stream(federation: ScriptedFederation) -> None:
    lease = {"epoch": 7, "instance_id": "p-1", "lease_expire_time": "2026-11-21T08:00:00Z"}
    federation.answers["GetNeuron"] = fleet.GetNeuronResponse(neuron=neuron("a", session=lease))
    text = run("neurons", "show", "a").stdout
    for part in (
        r"stream +none: it pulls its commands",
        r"lease +until 2026-11-21.+ \(\d+ \w+ ago\)",
        r"id +epoch 7\n",
        r"process +p-1",
    ):
        assert re.search(part, text), part
    assert "SDK" not in text


def test_an_update_names_the_fields_that_it_sets(federation: ScriptedFederation) -> None:
    federation.answers["UpdateNeuron"] = fleet.UpdateNeuronResponse(neuron=neuron("a"))
    arguments = ["--set", 'labels={"zone": "eu"}', "--set", "name=Seven", "--release", "metadata"]
    assert run("neurons", "update", "a", *arguments).exit_code == 0
    [request] = federation.requests["UpdateNeuron"]
    assert list(request.update_mask.paths) == ["labels", "name"]
    assert list(request.release_mask.paths) == ["metadata"]
    assert dict(request.description.labels) == {"zone": "eu"}
    assert request.description.name == "Seven"
    assert run("neurons", "update", "a", "--set", "nonsense=1").exit_code == 2
    assert run("neurons", "update", "a").exit_code == 2


def test_nothing_is_deleted_without_a_yes(federation: ScriptedFederation) -> None:
    federation.answers["DeleteNeuron"] = fleet.DeleteNeuronResponse()
    assert run("neurons", "delete", "a").exit_code == 1
    assert not federation.requests["DeleteNeuron"]
    assert run("neurons", "delete", "a", "--yes", "--force").exit_code == 0
    assert federation.requests["DeleteNeuron"][0].force


# --- commands


def test_an_order_says_what_was_typed(federation: ScriptedFederation) -> None:
    federation.answers["IssueCommand"] = commands.IssueCommandResponse(command=command("QUEUED"))
    result = run(
        *("command", "issue", "scraper-1", "run_task", "limit=10", "retry.max=2", "name=x"),
        *("--priority", "9", "--run-timeout", "30s", "--expire", "2h", "--request-id", "r-1"),
        *("--not-before", "2026-11-21T12:00:00Z", "--allow-unadvertised"),
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("c-1  QUEUED")
    [request] = federation.requests["IssueCommand"]
    spec = request.command
    assert (spec.neuron_id, spec.type, spec.priority) == ("scraper-1", "run_task", 9)
    assert spec.data["limit"] == 10
    assert spec.data["retry"]["max"] == 2
    assert spec.data["name"] == "x"
    assert spec.run_timeout.ToTimedelta().total_seconds() == 30
    in_s = spec.expire_time.ToDatetime(tzinfo=UTC).timestamp() - datetime.now(UTC).timestamp()
    assert 7100 < in_s <= 7200
    assert spec.not_before_time.ToJsonString() == "2026-11-21T12:00:00Z"
    assert spec.allow_unadvertised
    assert request.request_id == "r-1"
    assert not request.dry_run


def test_what_is_not_said_stays_absent(federation: ScriptedFederation) -> None:
    federation.answers["IssueCommand"] = commands.IssueCommandResponse(command=command("QUEUED"))
    assert run("command", "issue", "a", "stop", "--dry-run").exit_code == 0
    [request] = federation.requests["IssueCommand"]
    assert {field.name for field, _ in request.command.ListFields()} == {"neuron_id", "type"}
    assert request.dry_run
    assert request.request_id


def test_exec_tells_the_story_once_and_ends_with_the_response(
    federation: ScriptedFederation,
) -> None:
    progress = {"fraction": 0.5, "message": "5 rows", "update_time": "2026-11-21T12:00:01Z"}
    federation.answers["ExecuteCommand"] = [
        executed("QUEUED", "QUEUED"),
        executed("RUNNING", "SENT", "ACCEPTED", "RUNNING"),
        executed("RUNNING", progress=progress),
        executed("SUCCEEDED", "SUCCEEDED", response={"rows": 10}, run_duration="1.5s"),
    ]
    result = run("command", "exec", "scraper-1", "run_task")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    words = [line.split()[1] for line in lines[:7]]
    assert words[:6] == ["QUEUED", "SENT", "ACCEPTED", "RUNNING", "progress", "SUCCEEDED"]
    assert "50 % · 5 rows" in lines[4]
    assert lines[6] == "c-1  SUCCEEDED after 1.5 s"
    assert json.loads("".join(lines[8:])) == {"rows": 10}


def test_exec_of_a_command_that_fails_shows_why_and_exits_1(federation: ScriptedFederation) -> None:
    error = {"code": "HANDLER_RAISED", "message": "no such table", "details": {"table": "rows"}}
    federation.answers["ExecuteCommand"] = [
        executed("QUEUED", "QUEUED"),
        executed("FAILED", "FAILED", error=error, log_tail="before it broke\n"),
    ]
    result = run("command", "exec", "scraper-1", "run_task")
    assert result.exit_code == 1
    for part in ("FAILED", "HANDLER_RAISED", "no such table", '"table": "rows"', "before it broke"):
        assert part in result.stdout


def test_exec_in_json_is_a_line_a_message(federation: ScriptedFederation) -> None:
    federation.answers["ExecuteCommand"] = [
        executed("QUEUED", "QUEUED"),
        executed("SUCCEEDED", "SUCCEEDED", response={"rows": 10}),
    ]
    result = run("command", "exec", "scraper-1", "run_task", "--json")
    states = [json.loads(line)["command"]["state"] for line in result.stdout.splitlines()]
    assert states == ["COMMAND_STATE_QUEUED", "COMMAND_STATE_SUCCEEDED"]


def test_exec_goes_on_after_a_broken_stream_where_that_ended(
    federation: ScriptedFederation,
) -> None:
    lost = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    queued, running = executed("QUEUED", "QUEUED"), executed("RUNNING", "SENT", "RUNNING")
    federation.answers["ExecuteCommand"] = [queued, running, lost]

    def watch(request: commands.WatchCommandRequest, context: object) -> list[Any]:
        assert request.command_id == "c-1"
        if len(federation.requests["WatchCommand"]) == 1:
            return [watched("CANCELLING", "CANCELLING"), lost]
        same = watched("CANCELLING", revision=request.after_revision)
        return [same, watched("CANCELLED", "CANCELLED", state_reason="too late")]

    federation.answers["WatchCommand"] = watch
    result = run("command", "exec", "scraper-1", "run_task")
    assert result.exit_code == 1
    words = [line.split()[1] for line in result.stdout.splitlines()]
    assert words == ["QUEUED", "SENT", "RUNNING", "CANCELLING", "CANCELLED", "CANCELLED:"]
    assert result.stderr.count("asking again") == 2
    assert len(federation.requests["ExecuteCommand"]) == 1
    first, second = federation.requests["WatchCommand"]
    assert first.after_revision == running.command.revision
    assert second.after_revision == running.command.revision + 1


def test_exec_that_is_refused_does_not_try_again(federation: ScriptedFederation) -> None:
    reason = [ErrorInfo(reason="NEURON_NOT_FOUND")]
    federation.answers["ExecuteCommand"] = Refusal(grpc.StatusCode.NOT_FOUND, "no neuron", reason)
    result = run("command", "exec", "nobody", "run_task")
    assert result.exit_code == 1
    assert result.stderr == "federation: no neuron (NEURON_NOT_FOUND)\n"
    assert len(federation.requests["ExecuteCommand"]) == 1


def test_an_order_whose_answer_was_lost_says_how_to_find_out(
    federation: ScriptedFederation,
) -> None:
    lost = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    federation.answers["IssueCommand"] = lost
    result = run("command", "issue", "a", "b")
    [request] = federation.requests["IssueCommand"]
    assert result.exit_code == 3
    assert f"--request-id {request.request_id}" in result.stderr


def test_terms_become_the_spec_of_issue_and_of_exec(federation: ScriptedFederation) -> None:
    federation.answers["IssueCommand"] = commands.IssueCommandResponse(command=command("QUEUED"))
    federation.answers["ExecuteCommand"] = [executed("SUCCEEDED", "SUCCEEDED")]
    terms = "--max-attempts 3 --retry-backoff 2s --accept-timeout 10s --run-timeout 5m"
    for name in ("issue", "exec"):
        order = ["command", name, "a", "b", *terms.split(), "--progress-timeout", "1m"]
        assert run(*order).exit_code == 0
    [issued], [executing] = (
        federation.requests["IssueCommand"],
        federation.requests["ExecuteCommand"],
    )
    assert issued.command == executing.command
    spec = issued.command
    assert spec.max_attempts == 3
    assert spec.retry_backoff.seconds == 2
    assert spec.accept_timeout.seconds == 10
    assert spec.run_timeout.seconds == 300
    assert spec.progress_timeout.seconds == 60
    assert spec.execution == Execution.EXECUTION_UNSPECIFIED
    assert run("command", "issue", "a", "b", "--at-most-once").exit_code == 0
    once = federation.requests["IssueCommand"][-1].command
    assert once.execution == Execution.EXECUTION_AT_MOST_ONCE


def test_exec_that_does_not_follow_is_issue(federation: ScriptedFederation) -> None:
    federation.answers["IssueCommand"] = commands.IssueCommandResponse(command=command("QUEUED"))
    result = run("command", "exec", "scraper-1", "run_task", "--no-follow")
    assert (result.exit_code, result.stdout) == (0, "c-1  QUEUED  run_task for scraper-1\n")
    assert not federation.requests["ExecuteCommand"]


def test_a_retry_says_which_attempt_failed_why_and_when_the_next_one_follows(
    federation: ScriptedFederation,
) -> None:
    waits = executed("QUEUED", "QUEUED", attempt=1, max_attempts=3)
    waits.command.transitions[0].reason = "attempt 1 of 3 ended as FAILED: OOPS: no table\nTrace"
    waits.command.transitions[0].attempt = 1
    waits.command.next_attempt_time.FromJsonString("2026-11-21T12:00:04Z")
    sent = executed("SENT", "SENT", attempt=2, max_attempts=3)
    sent.command.transitions[0].attempt = 2
    done = executed("SUCCEEDED", "SUCCEEDED", attempt=2, max_attempts=3)
    federation.answers["ExecuteCommand"] = [waits, sent, done]
    lines = run("command", "exec", "scraper-1", "run_task").stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "QUEUED       attempt 1 of 3 ended as FAILED: OOPS: no table…",
        "waits        attempt 2 of 3 follows after 4 s",
        "SENT         attempt 2 of 3",
        "SUCCEEDED",
        "SUCCEEDED in attempt 2 of 3",
    ]


def test_a_command_that_stands_still_is_explained_once(
    federation: ScriptedFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation_server.console.streams.FIRST_SILENCE_S", 0.02)
    queued = watched("QUEUED", "QUEUED")
    asked = threading.Event()

    def explain(request: object, context: object) -> commands.ExplainCommandResponse:
        if len(federation.requests["ExplainCommand"]) > 2:
            asked.set()
        fact = commands.CommandFact(
            code="WAITS_FOR_NEURON", message="its neuron is \x1b[31mOFFLINE"
        )
        return commands.ExplainCommandResponse(command=queued.command, facts=[fact])

    federation.answers["ExplainCommand"] = explain
    federation.answers["WatchCommand"] = [
        queued,
        lambda: asked.wait(20),
        watched("EXPIRED", "EXPIRED"),
    ]
    result = run("command", "follow", "c-1")
    assert result.exit_code == 1
    words = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]
    assert words == ["QUEUED", "waits        its neuron is OFFLINE", "EXPIRED", "EXPIRED"]


def test_follow_of_a_command_that_is_not_there_is_one_line(federation: ScriptedFederation) -> None:
    reason = [ErrorInfo(reason="COMMAND_NOT_FOUND")]
    federation.answers["WatchCommand"] = Refusal(grpc.StatusCode.NOT_FOUND, "no command", reason)
    result = run("command", "follow", "c-1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "federation: no command (COMMAND_NOT_FOUND)\n"


def test_follow_in_json_is_a_line_a_message(federation: ScriptedFederation) -> None:
    federation.answers["WatchCommand"] = [watched("QUEUED"), watched("SUCCEEDED")]
    result = run("command", "follow", "c-1", "--json")
    assert result.exit_code == 0
    states = [json.loads(line)["command"]["state"] for line in result.stdout.splitlines()]
    assert states == ["COMMAND_STATE_QUEUED", "COMMAND_STATE_SUCCEEDED"]


def test_cancel_asks_for_each_command_and_exits_with_the_worst(
    federation: ScriptedFederation,
) -> None:
    def cancel(request: commands.CancelCommandRequest, context: object) -> Any:
        if request.command_id == "c-2":
            ended = [ErrorInfo(reason="COMMAND_ENDED")]
            return Refusal(grpc.StatusCode.FAILED_PRECONDITION, "c-2 has ended", ended)
        found = command("CANCELLED", command_id=request.command_id)
        return commands.CancelCommandResponse(command=found)

    federation.answers["CancelCommand"] = cancel
    result = run("command", "cancel", "c-1", "c-2", "c-3", "--reason", "not needed")
    assert result.exit_code == 1
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["c-1", "CANCELLED"],
        ["c-3", "CANCELLED"],
    ]
    assert result.stderr == "federation: c-2 has ended (COMMAND_ENDED)\n"
    assert {each.reason for each in federation.requests["CancelCommand"]} == {"not needed"}
    assert run("command", "cancel", "c-1").exit_code == 0


@pytest.mark.parametrize(("state", "code"), [("CANCELLED", 0), ("SUCCEEDED", 1)])
def test_cancel_that_follows_succeeds_if_the_command_is_cancelled(
    federation: ScriptedFederation, state: str, code: int
) -> None:
    cancelling = command("CANCELLING")
    federation.answers["CancelCommand"] = commands.CancelCommandResponse(command=cancelling)
    federation.answers["WatchCommand"] = [watched(state, state)]
    result = run("command", "cancel", "c-1", "--follow")
    assert result.exit_code == code
    words = [line.split()[1] for line in result.stdout.splitlines()]
    assert words == ["CANCELLING", state, state]
    [request] = federation.requests["WatchCommand"]
    assert request.after_revision == cancelling.revision


def test_retry_names_the_new_command_and_follows_it(federation: ScriptedFederation) -> None:
    again = command("QUEUED", command_id="c-2", retry_of_command_id="c-1")
    federation.answers["RetryCommand"] = commands.RetryCommandResponse(command=again)
    result = run("command", "retry", "c-1", "--request-id", "r-1")
    assert result.exit_code == 0
    assert result.stdout == "c-2  QUEUED  run_task for scraper-1, retry of c-1\n"
    [request] = federation.requests["RetryCommand"]
    assert (request.command_id, request.request_id) == ("c-1", "r-1")
    federation.answers["WatchCommand"] = [watched("FAILED", "FAILED", command_id="c-2")]
    assert run("command", "retry", "c-1", "--follow").exit_code == 1
    assert federation.requests["WatchCommand"][0].command_id == "c-2"


def test_a_retry_whose_answer_was_lost_says_how_to_find_out(federation: ScriptedFederation) -> None:
    federation.answers["RetryCommand"] = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    result = run("command", "retry", "c-1")
    assert result.exit_code == 3
    [request] = federation.requests["RetryCommand"]
    assert f"--request-id {request.request_id}" in result.stderr


def test_explain_is_a_chain_with_the_nearest_cause_first(federation: ScriptedFederation) -> None:
    since = Timestamp()
    since.FromJsonString("2026-11-21T12:00:00Z")
    federation.answers["ExplainCommand"] = commands.ExplainCommandResponse(
        command=command("QUEUED"),
        facts=[
            commands.CommandFact(
                code="WAITS_FOR_NEURON", message="its neuron is OFFLINE", time=since
            ),
            commands.CommandFact(code="NEURON_PAUSED", message="\x1b[31mit is paused\nand so on"),
        ],
    )
    first, *facts = run("command", "explain", "c-1").stdout.splitlines()
    assert first == "c-1  QUEUED  run_task for scraper-1"
    assert re.fullmatch(
        r"  1\. its neuron is OFFLINE · 2026-11-21 \S+ \S+ \((.+ ago|in .+|now)\)", facts[0]
    )
    assert facts[1:] == ["  2. it is paused…"]
    document = json.loads(run("command", "explain", "c-1", "--json").stdout)
    assert [fact["code"] for fact in document["facts"]] == ["WAITS_FOR_NEURON", "NEURON_PAUSED"]


def test_show_and_list_tell_attempts_and_terms(federation: ScriptedFederation) -> None:
    shown = command(
        "QUEUED",
        attempt=1,
        max_attempts=3,
        retry_backoff="2s",
        next_attempt_time="2026-11-21T12:00:02Z",
        accept_timeout="30s",
        progress_timeout="60s",
        checkpoint={"row": 7},
        retry_of_command_id="c-0",
        error={"code": "OOPS", "message": "no table"},
    )
    federation.answers["GetCommand"] = commands.GetCommandResponse(command=shown)
    text = run("command", "show", "c-1").stdout
    for part in (
        r"attempt +1 of 3",
        r"attempts +at most 3 · 2 s after the first",
        r"next attempt +2026-11-21",
        r"accept timeout +30 s",
        r"progress timeout +1 min",
        r"retry of +c-0",
        r'Checkpoint\n  \{\n    "row": 7',
        r"Error OOPS of attempt 1 of 3",
    ):
        assert re.search(part, text), part
    assert "execution" not in text
    shown.execution = Execution.EXECUTION_AT_MOST_ONCE
    federation.answers["GetCommand"] = commands.GetCommandResponse(command=shown)
    assert "at most once" in run("command", "show", "c-1").stdout
    federation.answers["ListCommands"] = commands.ListCommandsResponse(commands=[shown])
    assert "1 of 3, next" in run("command", "list").stdout


# --- metrics, tokens


@pytest.mark.parametrize("words", [["rows"], ["show", "rows"], ["--json", "rows"]])
def test_a_metric_is_named_with_or_without_show(
    federation: ScriptedFederation, words: list[str]
) -> None:
    federation.answers["QueryMetrics"] = analytics.QueryMetricsResponse()
    options = ["--since", "1h", "--bucket", "1m", "--label", "a=b", "--group-by", "neuron_id"]
    assert run("metrics", *words, *options).exit_code == 0
    [request] = federation.requests["QueryMetrics"]
    assert request.name == "rows"
    assert request.bucket_width.seconds == 60
    assert dict(request.labels) == {"a": "b"}
    assert list(request.group_by) == ["neuron_id"]


def test_a_gap_is_shown_as_a_gap_and_not_as_a_zero(federation: ScriptedFederation) -> None:
    def bucket(minute: int, total: float) -> dict[str, Any]:
        return {"start_time": f"2026-11-21T12:{minute:02}:00Z", "count": "1", "sum": total}

    series = {
        "kind": "METRIC_KIND_COUNTER",
        "buckets": [bucket(0, 5), bucket(1, 0), bucket(5, 7)],
    }
    federation.answers["QueryMetrics"] = ParseDict(
        {"bucket_width": "60s", "series": [series]}, analytics.QueryMetricsResponse()
    )
    _, header, *rows = run("metrics", "rows").stdout.splitlines()
    assert header.split() == ["FROM", "SUM", "RATE/S", "POINTS"]
    assert [row.split()[3] for row in rows] == ["5", "0", "points", "7"]
    assert "3 without points" in rows[2]


def test_a_bucket_that_has_not_ended_is_marked(federation: ScriptedFederation) -> None:
    start = Timestamp(seconds=int(time.time()) - 90)
    series = analytics.MetricSeries(kind=analytics.MetricKind.METRIC_KIND_COUNTER)
    for age_s in (0, 60):
        begin = Timestamp(seconds=start.seconds + age_s)
        series.buckets.add(start_time=begin, count=1, sum=1.0)
    answer = analytics.QueryMetricsResponse(series=[series])
    answer.bucket_width.FromSeconds(60)
    federation.answers["QueryMetrics"] = answer
    _, _, ended, running = run("metrics", "rows").stdout.splitlines()
    assert "so far" not in ended
    assert " so far " in running


def _histogram_series(minutes: list[int]) -> dict[str, Any]:
    return {
        "kind": "METRIC_KIND_HISTOGRAM",
        "group": {"neuron_id": "evil\x1b[31m"},
        "buckets": [
            {"start_time": f"2026-11-21T12:{m:02}:00Z", "count": "1", "p50": m, "p90": 2 * m}
            for m in minutes
        ],
    }


def _draw(federation: ScriptedFederation, series: list[dict[str, Any]], *options: str) -> str:
    federation.answers["QueryMetrics"] = ParseDict(
        {"bucket_width": "60s", "series": series}, analytics.QueryMetricsResponse()
    )
    span = ("--since", "2026-11-21T12:00:00Z", "--until", "2026-11-21T13:00:00Z")
    result = run("metrics", "ms", "--plot", *span, *options)
    assert result.exit_code == 0
    return str(result.stdout)


def test_a_plot_has_a_line_for_each_figure_and_no_colours_in_a_pipe(
    federation: ScriptedFederation,
) -> None:
    drawn = _draw(federation, [_histogram_series(list(range(60)))])
    assert "p50" in drawn
    assert "p90" in drawn
    assert "p99" not in drawn  # nobody reported it
    assert "\x1b" not in drawn


def test_a_plot_draws_nothing_where_there_are_no_points(federation: ScriptedFederation) -> None:
    whole = _draw(federation, [_histogram_series(list(range(60)))]).splitlines()
    parts = _draw(federation, [_histogram_series([*range(10), *range(50, 60)])]).splitlines()
    gap = slice(len(whole[5]) // 2 - 8, len(whole[5]) // 2 + 8)
    assert any(line[gap].strip() for line in whole[2:-2])
    assert not any(line[gap].strip() for line in parts[2:-3])


def test_a_metric_without_points_is_said_and_not_drawn(federation: ScriptedFederation) -> None:
    assert _draw(federation, []) == ""


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_tokens_secret_is_all_that_goes_to_stdout(
    federation: ScriptedFederation, quiet: list[str]
) -> None:
    federation.answers["CreateEnrollmentToken"] = access.CreateEnrollmentTokenResponse(
        enrollment_token=access.EnrollmentToken(enrollment_token_id="t-1"), secret="fet_secret"
    )
    options = ["--ttl", "2h", "--max-uses", "3", "--type", "scraper", "--id-pattern", "scraper-*"]
    result = run("token", "create", *options, "--label", "zone=eu", "--allow-reenrollment", *quiet)
    assert result.stdout == "fet_secret\n"
    assert ("t-1" in result.stderr) is not bool(quiet)
    [request] = federation.requests["CreateEnrollmentToken"]
    assert request.ttl.seconds == 7200
    assert (request.max_uses, request.neuron_type) == (3, "scraper")
    assert request.neuron_id_pattern == "scraper-*"
    assert dict(request.labels) == {"zone": "eu"}
    assert request.allow_reenrollment
