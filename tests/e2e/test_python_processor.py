"""The complete example as a process against a whole federation: its HTTP API, commands, numbers."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest_asyncio
from google.protobuf.json_format import MessageToDict

from federation.v1 import analytics_service_pb2, command_service_pb2, heartbeat_pb2, report_pb2
from tests.support.calls import (
    FINAL,
    State,
    answer,
    counted,
    done,
    heartbeats,
    issue,
    online,
    reached,
    shown,
    spec,
)
from tests.support.federation import Federation, running
from tests.support.neuron_process import NeuronProcess, neuron_process
from tests.support.postgres import Server, passable_folder
from tests.support.processes import free_port
from tests.support.waiting import eventually

NAME = "python-processor-001"
SALES = [{"city": "Lima", "price": 3}, {"city": "Lima", "price": 5}, {"city": "Oslo", "price": 0}]
BUILT_IN = {
    "health_check",
    "config_update",
    "restart",
    "restart_worker",
    "stop",
    "pause",
    "resume",
}
OWN = {"run_task", "process_batch", "get_statistics", "clear_cache"}


@dataclass(frozen=True)
class Processor:
    """A processor that runs, and the federation that it belongs to."""

    served: Federation
    process: NeuronProcess
    port: int
    enrollment_token: str

    async def post(self, body: object) -> tuple[int, Any]:
        """What POST /data/process answers to that body, as JSON unless it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await asyncio.to_thread(self._post, content)

    def _post(self, content: bytes) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/data/process",
            data=content,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310 - as above
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    async def answer(self, kind: str, **data: Any) -> dict[str, Any]:
        """What a command answers, which must succeed."""
        return await answer(self.served, NAME, kind, **data)


@pytest_asyncio.fixture(scope="module")
async def processor(postgres: Server, template_database: str) -> AsyncIterator[Processor]:
    with postgres.database(template=template_database) as url, passable_folder() as folder:
        async with running(url) as served:
            port, token = free_port(), await served.enrollment_token()
            settings = {"PROCESSOR_PORT": str(port), "ENROLLMENT_TOKEN": token}
            arguments = ("-m", "neuron_sdk.cli", "run", "examples.python_processor:neuron")
            with neuron_process(folder, served.address, *arguments, **settings) as process:
                await online(served, NAME)
                yield Processor(served, process, port, token)


async def test_it_tells_the_federation_all_about_itself(processor: Processor) -> None:
    description = (await shown(processor.served, NAME)).description
    assert (description.type, description.version) == ("data-processor", "1.0.0")
    assert description.base_url == f"http://127.0.0.1:{processor.port}"
    assert [(each.method, each.path) for each in description.api_endpoints] == [
        ("POST", "/data/process")
    ]
    assert {each.type for each in description.command_types} == OWN | BUILT_IN
    assert set(description.dependencies) == {"federation", "disk_space"}
    assert description.labels == {"example": "python-processor"}


async def test_what_is_posted_is_processed_and_shows_in_heartbeats_totals_and_metrics(
    processor: Processor,
) -> None:
    before = (await shown(processor.served, NAME)).totals.requests
    records = await counted(processor.served, NAME, "records_processed")
    wanted = {"operation": "aggregate", "field": "price", "group_by": "city", "records": SALES}
    status, result = await processor.post(wanted)
    assert (status, result["output_records"]) == (200, 2)
    assert result["records"][0] == {
        "group": "Lima", "count": 2, "sum": 8.0, "mean": 4.0, "min": 3.0, "max": 5.0,
    }  # fmt: skip
    for number in range(9):
        assert (await processor.post({**wanted, "records": [{"price": number}] * 10}))[0] == 200

    async def totals() -> bool:
        return (await shown(processor.served, NAME)).totals.requests == before + 10

    await eventually(totals, describe="ten requests in the totals")
    sent = await heartbeats(processor.served, NAME)
    assert sum(beat.application.requests for beat in sent) == before + 10
    assert sum(beat.application.failed_requests for beat in sent) == 0
    assert sum(beat.application.response_ms_sum for beat in sent) > 0

    async def arrived() -> bool:
        return await counted(processor.served, NAME, "records_processed") == records + 93

    await eventually(arrived, describe="93 records in the metrics")


async def test_a_body_that_is_no_json_is_a_400_in_words_and_counts_as_no_failure_of_the_service(
    processor: Processor,
) -> None:
    refused = await counted(processor.served, NAME, "refused_requests")
    status, problem = await processor.post(b'{"operation": ')
    assert status == 400
    assert "the body does not fit" in problem["error"]
    assert (await processor.post({"operation": "filter", "records": SALES}))[0] == 400

    async def arrived() -> bool:
        return await counted(processor.served, NAME, "refused_requests") == refused + 2

    await eventually(arrived, describe="two refusals in the metrics")
    assert (await shown(processor.served, NAME)).totals.failed_requests == 0


async def test_run_task_and_process_batch_do_their_work_with_progress(
    processor: Processor,
) -> None:
    wanted = spec(NAME, "run_task", input_source="orders", limit=20_000)
    request = command_service_pb2.ExecuteCommandRequest(command=wanted)
    steps = [
        step.command
        async for step in processor.served.command.ExecuteCommand(
            request, metadata=processor.served.admin, timeout=60
        )
    ]
    assert steps[-1].state == State.COMMAND_STATE_SUCCEEDED
    assert MessageToDict(steps[-1].response) == {
        "input_source": "orders",
        "processed_records": 20_000,
    }
    assert any(step.progress.message.endswith("of 20000 records") for step in steps)
    assert "reading" in steps[-1].log_tail
    operation = {"operation": "filter", "field": "price", "operator": "gt", "value": 1}
    requests = [{**operation, "records": SALES}]
    batch = await processor.answer("process_batch", requests=requests, include_records=True)
    assert batch["results"][0]["records"] == SALES[:2]
    none = [{"operation": "aggregate", "field": "weight", "records": SALES}]
    failed = await done(processor.served, NAME, "process_batch", requests=requests + none)
    assert failed.state == State.COMMAND_STATE_FAILED
    assert failed.error.code == "CANNOT_PROCESS"
    assert MessageToDict(failed.error.details) == {"index": 1}


async def test_statistics_are_told_and_the_cache_is_cleared(processor: Processor) -> None:
    wanted = {"operation": "normalize", "records": [{"a": 1}, {"a": 2}]}
    before = await processor.answer("get_statistics")
    assert await processor.post(wanted) == await processor.post(wanted)
    after = await processor.answer("get_statistics")
    assert after["requests"] == before["requests"] + 2
    assert after["cache_hits"] == before["cache_hits"] + 1
    assert await processor.answer("clear_cache") == {"removed": after["cache_entries"]}
    assert (await processor.answer("get_statistics"))["cache_entries"] == 0


async def test_its_dependencies_show_in_the_federation_and_on_its_own_page(
    processor: Processor,
) -> None:
    async def up() -> bool:
        found = (await shown(processor.served, NAME)).last_heartbeat.dependencies
        states = {each.name: each.state for each in found}
        return states == dict.fromkeys(
            ["disk_space", "federation"], heartbeat_pb2.DEPENDENCY_STATE_UP
        )

    await eventually(up, describe="both are UP")
    status, health = await processor.process.health()
    assert (status, health["status"]) == (200, "healthy")
    assert {each["name"]: each["state"] for each in health["dependencies"]} == {
        "disk_space": "UP",
        "federation": "UP",
    }


async def test_its_events_are_listed(processor: Processor) -> None:
    await processor.answer("run_task", input_source="events", limit=7)
    await processor.answer("clear_cache")

    async def listed() -> list[report_pb2.ReportedEvent]:
        found = await processor.served.analytics.ListReportedEvents(
            analytics_service_pb2.ListReportedEventsRequest(
                filter=f'neuron_id = "{NAME}"', page_size=1000
            ),
            metadata=processor.served.admin,
        )
        events = [stored.event for stored in found.events]
        assert "cache_cleared" in {event.type for event in events}
        assert "7 records of events" in {event.message for event in events}
        return events

    events = await eventually(listed, describe="what has just happened")
    said = {event.message: event for event in events}
    assert said[f"POST /data/process on port {processor.port}"].type == "web_started"
    assert said["7 records of events"].type == "task_finished"
    assert MessageToDict(said["7 records of events"].attributes) == {"records": 7}


async def test_the_commands_that_every_neuron_has_work_for_it_too(processor: Processor) -> None:
    assert (await processor.answer("health_check"))["status"] == "healthy"
    assert (await processor.answer("config_update", log_level="DEBUG"))["changed"] == {
        "log_level": "DEBUG"
    }
    await processor.answer("pause")
    waiting = await issue(processor.served, NAME, "get_statistics")
    await reached(processor.served, waiting, State.COMMAND_STATE_ACCEPTED)
    assert (await processor.post({"operation": "normalize", "records": [{"a": 1}]}))[0] == 200
    await processor.answer("resume")
    assert (await reached(processor.served, waiting, *FINAL)).state == State.COMMAND_STATE_SUCCEEDED
    assert await processor.answer("restart_worker", name="web") == {"restarted": ["web"]}
    await eventually(lambda: _serves(processor), describe="the API is back")


async def test_it_restarts_and_stops_by_command_and_leaves_no_complaint_and_no_secret(
    processor: Processor,
) -> None:
    epoch = (await shown(processor.served, NAME)).session.epoch
    assert await processor.answer("restart") == {"restarted": True}
    await online(processor.served, NAME, epoch=epoch + 1)
    await eventually(lambda: _serves(processor), describe="the API is back")
    token = processor.process.token
    assert await processor.answer("stop") == {"stopping": True}
    assert await processor.process.ended() == 0
    complaints = processor.process.complaints()
    assert {line["action"] for line in complaints} <= {"command.failed"}  # the batch that must
    assert token not in processor.process.output
    assert processor.enrollment_token not in processor.process.output


async def _serves(processor: Processor) -> bool:
    try:
        return (await processor.post({"operation": "normalize", "records": [{"a": 1}]}))[0] == 200
    except OSError:
        return False
