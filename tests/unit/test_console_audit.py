"""`federation audit …`: the table, the export, and what of an entry reaches a terminal."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from federation.v1 import access_service_pb2 as pb
from tests.support.console import federation, run
from tests.support.scripted_federation import Refusal, ScriptedFederation

__all__ = ["federation"]


def entry(**fields: Any) -> pb.AuditEntry:
    said = {
        "entry_time": "2026-11-21T12:00:00Z",
        "actor": "admin:ops",
        "peer": "10.0.0.7",
        "method": "/federation.v1.FleetService/DeactivateNeuron",
        "object_type": "neuron",
        "object_id": "scraper-1",
        "outcome": "OK",
        "count": 1,
        **fields,
    }
    return ParseDict(said, pb.AuditEntry())


def answer(federation: ScriptedFederation, *entries: pb.AuditEntry) -> None:
    federation.answers["ListAuditEntries"] = pb.ListAuditEntriesResponse(entries=entries)


def test_the_table_says_who_did_what_and_how_it_ended(federation: ScriptedFederation) -> None:
    changed = entry(
        before={"lifecycle": "ACTIVE"},
        after={"lifecycle": "DEACTIVATED", "lifecycle_reason": "\x1b[31mit leaks " + "s" * 90},
    )
    refused = entry(
        actor="stranger",
        method="",
        object_type="",
        object_id="",
        outcome="UNAUTHENTICATED",
        reason="CREDENTIAL_INVALID",
        count=4711,
    )
    answer(federation, changed, refused)
    header, first, second = run("audit", "list").stdout.splitlines()
    columns = "TIME ACTOR PEER METHOD OBJECT OUTCOME REASON CHANGE"
    assert header.split() == columns.split()
    assert "admin:ops  10.0.0.7  DeactivateNeuron  neuron scraper-1  OK" in first
    assert "lifecycle ACTIVE → DEACTIVATED, lifecycle_reason it leaks sss" in first
    assert first.endswith("s…")
    assert "\x1b" not in first
    assert "UNAUTHENTICATED, 4711 times  CREDENTIAL_INVALID" in second


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], ""),
        (["actor = x"], "actor = x"),
        (["--since", "2026-11-01T00:00:00Z"], 'entry_time >= "2026-11-01T00:00:00+00:00"'),
        (
            ["actor = x OR actor = y", "--since", "2026-11-01T00:00:00Z"],
            'actor = x OR actor = y AND entry_time >= "2026-11-01T00:00:00+00:00"',
        ),
    ],
)
@pytest.mark.parametrize("command", ["list", "export"])
def test_the_filter_and_the_time_are_asked_for(
    federation: ScriptedFederation, command: str, arguments: list[str], asked: str
) -> None:
    answer(federation)
    assert run("audit", command, *arguments).exit_code == 0
    [request] = federation.requests["ListAuditEntries"]
    assert request.filter == asked
    assert request.order_by == ("entry_time" if command == "export" else "")


def test_an_export_is_one_line_of_json_for_each_entry_of_all_pages(
    federation: ScriptedFederation,
) -> None:
    def page(request: pb.ListAuditEntriesRequest, _: object) -> pb.ListAuditEntriesResponse:
        first = int(request.page_token or 0)
        return pb.ListAuditEntriesResponse(
            entries=[
                entry(entry_id=str(first + number), after={"name": "a\x9b\nb\u202e"})
                for number in range(3)
            ],
            next_page_token="" if first == 6 else str(first + 3),
        )

    federation.answers["ListAuditEntries"] = page
    lines = run("audit", "export").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["entry_id"] for each in found] == [str(number) for number in range(9)]
    assert {each["after"]["name"] for each in found} == {"a\x9b\nb\u202e"}
    assert not {"\x9b", "\u202e"} & set("".join(lines))
    assert {request.page_size for request in federation.requests["ListAuditEntries"]} == {1000}


def test_an_export_that_breaks_off_says_so_by_its_exit_code(
    federation: ScriptedFederation,
) -> None:
    def page(request: pb.ListAuditEntriesRequest, _: object) -> Any:
        if request.page_token:
            return Refusal(grpc.StatusCode.UNAVAILABLE, "the database does not answer")
        return pb.ListAuditEntriesResponse(entries=[entry()], next_page_token="more")

    federation.answers["ListAuditEntries"] = page
    result = run("audit", "export")
    assert result.exit_code != 0
    assert len(result.stdout.splitlines()) == 1
