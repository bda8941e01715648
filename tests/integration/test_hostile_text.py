"""Texts in a neuron's and an admin's messages are data: stored and found as they are, and inert."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from federation.v1 import analytics_service_pb2 as analytics
from federation.v1 import command_service_pb2, fleet_service_pb2, neuron_pb2, report_pb2
from tests.support.calls import shown
from tests.support.federation import Federation, connected, running
from tests.support.plain_neuron import now

TEXTS = {
    "SQL": "'; DROP TABLE neurons; --",
    "SQL in quotes": '" OR ""="\' UNION SELECT secret_hash FROM api_keys --',
    "dollar quotes": "$$; DELETE FROM commands; $$ $1 :name %(name)s",
    "COPY's syntax": "a\tb\\N\n\\.\nc",
    "an array's syntax": '{"a",NULL,b}',
    "a pattern": "%_*?[a-z]\\%",
    "a format": "%s %n {0} {x.__class__} ${HOME} {{7*7}}",
    "a path": "../../../../etc/passwd\\..\\x",
    "a shell's": "$(touch /tmp/x) `id` | cat; &",
    "a terminal's": "\x1b[2J\x1b]52;c;Zm9v\x07\x9b1m\u202e",
    "JSON's": '{"a": "\\u0000"} \\u0000 \u2028',
    "far planes": "\U0001f600\U0010ffff\ufffe",
}


def anything(text: str) -> dict[str, Any]:
    """A free-form payload with the text as key and as value, at any depth."""
    return {text: text, "deep": [{"in": [text, {text: None}]}]}


def struct(text: str) -> Struct:
    return ParseDict(anything(text), Struct())


async def listed(federation: Federation, text: str, field: str) -> list[str]:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("*", "\\*")
    answer = await federation.fleet.ListNeurons(
        fleet_service_pb2.ListNeuronsRequest(filter=f'{field} = "{quoted}"'),
        metadata=federation.admin,
    )
    return [neuron.neuron_id for neuron in answer.neurons]


async def test_a_hostile_text_comes_back_as_it_was_and_nothing_else_changes(
    database_url: str,
) -> None:
    async with running(database_url) as federation:
        for number, text in enumerate(TEXTS.values()):
            await _comes_back(federation, f"n{number}", text)
        everything = await federation.fleet.ListNeurons(
            fleet_service_pb2.ListNeuronsRequest(page_size=100), metadata=federation.admin
        )
        assert len(everything.neurons) == len(TEXTS)


async def _comes_back(federation: Federation, neuron_id: str, text: str) -> None:
    description = {
        "name": text,
        "labels": {"zone": text},
        "capabilities": [text],
        "metadata": struct(text),
        "command_types": [neuron_pb2.CommandType(type="run", description=text)],
    }
    async with connected(federation, neuron_id, **description) as neuron:
        stored = (await shown(federation, neuron_id)).description
        assert stored.name == text
        assert dict(stored.labels) == {"zone": text}
        assert list(stored.capabilities) == [text]
        assert stored.command_types[0].description == text
        assert MessageToDict(stored.metadata) == anything(text)
        assert await listed(federation, text, "name") == [neuron_id]
        issued = await federation.command.IssueCommand(
            command_service_pb2.IssueCommandRequest(
                command=command_service_pb2.CommandSpec(
                    neuron_id=neuron_id, type="run", data=struct(text)
                )
            ),
            metadata=federation.admin,
        )
        delivery = await neuron.command()
        assert MessageToDict(delivery.data) == anything(text)
        event = report_pb2.ReportedEvent(
            event_time=now(),
            severity=report_pb2.SEVERITY_INFO,
            type="said",
            message=text,
            attributes=struct(text),
        )
        neuron.sequence = 1
        await neuron.send(
            sequence=1,
            send_time=now(),
            analytics_report=report_pb2.AnalyticsReport(
                start_time=now(), end_time=now(), events=[event]
            ),
        )
        await neuron.acked(await neuron.finish(delivery, "FAILED", code="C"))
        events = await federation.analytics.ListReportedEvents(
            analytics.ListReportedEventsRequest(filter=f'neuron_id = "{neuron_id}"'),
            metadata=federation.admin,
        )
        assert [each.event.message for each in events.events] == [text]
        assert MessageToDict(events.events[0].event.attributes) == anything(text)
        later = await _issue_later(federation, neuron_id)
        await federation.command.CancelCommand(
            command_service_pb2.CancelCommandRequest(command_id=later, reason=text),
            metadata=federation.admin,
        )
        found = await federation.command.GetCommand(
            command_service_pb2.GetCommandRequest(command_id=later), metadata=federation.admin
        )
        assert found.command.transitions[-1].reason == text
        assert issued.command.command_id == delivery.command_id


async def _issue_later(federation: Federation, neuron_id: str) -> str:
    later = now()
    later.seconds += 3600
    issued = await federation.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(
            command=command_service_pb2.CommandSpec(
                neuron_id=neuron_id, type="run", not_before_time=later
            )
        ),
        metadata=federation.admin,
    )
    return issued.command.command_id
