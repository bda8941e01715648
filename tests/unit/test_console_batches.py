"""Orders to many neurons at the console, against a server whose answers are written beforehand."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from federation.v1 import command_service_pb2 as pb
from federation.v1.errors_pb2 import ErrorReason
from tests.support.console import batch, command, federation, run, watched_batch
from tests.support.scripted_federation import Refusal, ScriptedFederation

__all__ = ["federation"]  # a fixture

END = "2026-11-21T12:00:09Z"
ORDER = ["command", "batch", "run_task", "limit=10", "--filter", "type = x"]


@pytest.fixture
def issued(federation: ScriptedFederation) -> ScriptedFederation:
    """A federation where 3 of 5 neurons get the command, and 1 of those fails."""

    def issue(request: pb.IssueCommandBatchRequest, context: object) -> Any:
        name = "" if request.dry_run else "b-1"
        skipped = [
            pb.SkippedNeuron(
                neuron_id=neuron_id,
                reason=ErrorReason.ERROR_REASON_COMMAND_TYPE_NOT_ADVERTISED,
                detail=f"the neuron {neuron_id} does not advertise the \x1b[31mcommand type",
            )
            for neuron_id in ("n-4", "n-5")
        ]
        return pb.IssueCommandBatchResponse(
            batch=batch(5, skipped=2, batch_id=name, max_in_flight=2),
            neuron_ids=["n-1", "n-2", "n-3"],
            skipped_neurons=skipped,
        )

    error = {"code": "OOPS", "message": "the disk is full\nTraceback"}
    failed = command("FAILED", neuron_id="n-2", error=error)
    federation.answers["IssueCommandBatch"] = issue
    federation.answers["ListCommands"] = pb.ListCommandsResponse(commands=[failed])
    federation.answers["WatchCommandBatch"] = watched_batch(
        batch(5, skipped=2, QUEUED=3),
        batch(5, skipped=2, QUEUED=1, RUNNING=2),
        batch(5, skipped=2, SUCCEEDED=2, FAILED=1, end_time=END),
    )
    return federation


def test_a_batch_is_shown_before_it_is_ordered_and_then_followed(
    issued: ScriptedFederation,
) -> None:
    result = run(*ORDER, "--max-in-flight", "2", "--max-attempts", "3", "--yes")
    assert result.exit_code == 1
    assert "run_task for 3 neurons" in result.stdout
    assert "n-1, n-2, n-3" in result.stdout
    assert "at most 2 neurons" in result.stdout
    assert "at most 3" in result.stdout
    assert "n-4, n-5  does not advertise the command type" in result.stdout
    lines = result.stdout.splitlines()
    states = [line.split("  ", 1)[1] for line in lines if line[2:3] == ":"]
    assert states == ["3 QUEUED", "1 QUEUED, 2 RUNNING", "2 SUCCEEDED, 1 FAILED"]
    assert "b-1  3 commands: 2 SUCCEEDED, 1 FAILED" in lines
    assert lines[-1].split() == ["n-2", "FAILED", "OOPS:", "the", "disk", "is", "full…"]
    trial, order = issued.requests["IssueCommandBatch"]
    assert (trial.dry_run, order.dry_run) == (True, False)
    order.dry_run = True
    assert trial == order
    assert (order.filter, order.max_in_flight) == ("type = x", 2)
    assert (order.command.type, order.command.neuron_id) == ("run_task", "")
    assert order.command.data["limit"] == 10
    assert order.command.max_attempts == 3
    assert order.request_id


def test_without_a_terminal_a_batch_needs_yes(issued: ScriptedFederation) -> None:
    result = run(*ORDER)
    assert result.exit_code == 2
    assert "run_task for 3 neurons" in result.stdout
    assert "--yes" in result.stderr
    assert [each.dry_run for each in issued.requests["IssueCommandBatch"]] == [True]


def test_a_dry_run_of_a_batch_shows_and_orders_nothing(issued: ScriptedFederation) -> None:
    result = run(*ORDER, "--dry-run")
    assert result.exit_code == 0
    assert "run_task for 3 neurons" in result.stdout
    document = json.loads(run(*ORDER, "--dry-run", "--json").stdout)
    assert document["neuron_ids"] == ["n-1", "n-2", "n-3"]
    assert all(each.dry_run for each in issued.requests["IssueCommandBatch"])


def test_a_batch_in_json_is_its_preview_and_a_line_a_message(issued: ScriptedFederation) -> None:
    result = run(*ORDER, "--yes", "--json")
    assert result.exit_code == 1
    first, *rest = map(json.loads, result.stdout.splitlines())
    assert first["preview"]["batch"]["matched_count"] == 5
    assert [len(each["batch"]["counts"]) for each in rest] == [1, 2, 2]


def test_a_batch_that_is_not_followed_is_one_line_more(issued: ScriptedFederation) -> None:
    result = run(*ORDER, "--yes", "--no-follow")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("b-1  3 commands")
    assert not issued.requests["WatchCommandBatch"]


def test_a_batch_that_was_ordered_before_is_followed_without_asking(
    issued: ScriptedFederation,
) -> None:
    issued.answers["IssueCommandBatch"] = pb.IssueCommandBatchResponse(
        batch=batch(5, skipped=2, QUEUED=3)
    )
    result = run(*ORDER, "--request-id", "r-1")
    assert result.exit_code == 1
    assert "was ordered before: batch b-1" in result.stderr
    assert len(issued.requests["IssueCommandBatch"]) == 1


def test_a_batch_whose_answer_was_lost_says_how_to_find_out(issued: ScriptedFederation) -> None:
    answer = issued.answers["IssueCommandBatch"]

    def lose(request: pb.IssueCommandBatchRequest, context: object) -> Any:
        lost = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return answer(request, context) if request.dry_run else lost

    issued.answers["IssueCommandBatch"] = lose
    result = run(*ORDER, "--yes")
    assert result.exit_code == 3
    assert f"--request-id {issued.requests['IssueCommandBatch'][1].request_id}" in result.stderr


def test_a_batch_is_followed_over_a_broken_stream_and_nothing_is_told_twice(
    federation: ScriptedFederation,
) -> None:
    def watch(request: pb.WatchCommandBatchRequest, context: object) -> list[Any]:
        running = batch(2, RUNNING=2)
        if len(federation.requests["WatchCommandBatch"]) == 1:
            lost = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            return [*watched_batch(running), lost]
        return watched_batch(running, batch(2, SUCCEEDED=2, end_time=END))

    federation.answers["WatchCommandBatch"] = watch
    result = run("batches", "follow", "b-1")
    assert result.exit_code == 0
    told = [line.split("  ", 1)[1] for line in result.stdout.splitlines()]
    assert told == ["2 RUNNING", "2 SUCCEEDED", "2 commands: 2 SUCCEEDED"]
    assert result.stderr.count("asking again") == 1


def test_batches_are_listed_shown_and_cancelled(federation: ScriptedFederation) -> None:
    running = batch(3, RUNNING=1, SUCCEEDED=2)
    federation.answers["ListCommandBatches"] = pb.ListCommandBatchesResponse(batches=[running])
    header, row = run("batches", "list").stdout.splitlines()
    assert header.split() == ["BATCH", "TYPE", "ISSUED", "ENDED", "STATES"]
    assert "2/3  1 RUNNING, 2 SUCCEEDED" in row
    assert len(json.loads(run("batches", "list", "--json").stdout)["batches"]) == 1
    federation.answers["GetCommandBatch"] = pb.GetCommandBatchResponse(batch=running)
    shown = run("batches", "show", "b-1").stdout
    for part in ("type = x", "3 neurons", "1  RUNNING", "2  SUCCEEDED"):
        assert part in shown
    cancelled = batch(3, CANCELLED=1, SUCCEEDED=2, end_time=END)
    federation.answers["CancelCommandBatch"] = pb.CancelCommandBatchResponse(batch=cancelled)
    federation.answers["WatchCommandBatch"] = watched_batch(cancelled)
    result = run("batches", "cancel", "b-1", "--reason", "wrong", "--follow")
    assert result.exit_code == 0
    assert "b-1  3 commands: 1 CANCELLED, 2 SUCCEEDED" in result.stdout
    [request] = federation.requests["CancelCommandBatch"]
    assert (request.batch_id, request.reason) == ("b-1", "wrong")


def test_an_empty_list_of_batches_and_a_batch_that_is_not_there_are_one_line(
    federation: ScriptedFederation,
) -> None:
    federation.answers["ListCommandBatches"] = pb.ListCommandBatchesResponse()
    assert run("batches", "list").stderr == "no batch has been issued yet\n"
    reason = [ErrorInfo(reason="COMMAND_BATCH_NOT_FOUND")]
    refusal = Refusal(grpc.StatusCode.NOT_FOUND, "there is no batch b-9", reason)
    for name, call in [("show", "Get"), ("follow", "Watch"), ("cancel", "Cancel")]:
        federation.answers[f"{call}CommandBatch"] = refusal
        result = run("batches", name, "b-9")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "federation: there is no batch b-9 (COMMAND_BATCH_NOT_FOUND)\n"
