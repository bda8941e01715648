"""AnalyticsService over real gRPC and PostgreSQL: the events that neurons reported."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import grpc
import pytest
import pytest_asyncio
from sqlalchemy import insert

from federation.v1 import analytics_service_pb2 as pb
from federation.v1 import report_pb2
from federation_server.domain.analytics import Severity
from federation_server.rpc.convert import from_struct, from_timestamp
from federation_server.store.database import Database, current_time
from federation_server.store.schema import reported_events
from tests.support.fleet import migrated
from tests.support.metrics import Analytics, serving_analytics
from tests.support.servers import refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with migrated(database_url) as database:
        yield database


@pytest_asyncio.fixture
async def analytics(database: Database) -> AsyncIterator[Analytics]:
    async with serving_analytics(database) as analytics:
        yield analytics


@pytest_asyncio.fixture
async def start(database: Database) -> datetime:
    """The time of the first of the events 1 to 6; 2 and 3, and 4 and 5, are at the same time."""
    async with database.begin() as connection:
        start = await current_time(connection)
        for event_id, seconds, neuron_id, severity, kind in (
            (1, 0, "a", Severity.DEBUG, "disk_full"),
            (2, 1, "a", Severity.INFO, "disk_full"),
            (3, 1, "b", Severity.WARNING, "disk_empty"),
            (4, 2, "b", Severity.ERROR, "fire"),
            (5, 2, "a", Severity.CRITICAL, "fire"),
            (6, 3, "c", Severity.INFO, "quiet"),
        ):
            await connection.execute(
                insert(reported_events).values(
                    event_id=event_id,
                    event_time=start + timedelta(seconds=seconds),
                    neuron_id=neuron_id,
                    receive_time=start + timedelta(minutes=1),
                    severity=severity,
                    type=kind,
                    message=f"message {event_id}",
                    attributes={"number": event_id},
                )
            )
    return start


async def listed(analytics: Analytics, filter: str = "") -> str:  # noqa: A002 - the contract's
    """The ids of the events in a list that is read in pages of two."""
    found = ""
    token = ""
    while True:
        page = await analytics.ListReportedEvents(
            pb.ListReportedEventsRequest(page_size=2, page_token=token, filter=filter)
        )
        found += "".join(event.event_id for event in page.events)
        token = page.next_page_token
        if not token:
            return found


async def test_events_are_listed_newest_first_each_once(
    analytics: Analytics, start: datetime
) -> None:
    assert await listed(analytics) == "654321"


async def test_an_event_is_shown_with_all_that_was_said(
    analytics: Analytics, start: datetime
) -> None:
    page = await analytics.ListReportedEvents(pb.ListReportedEventsRequest(page_size=1))
    (stored,) = page.events
    assert (stored.event_id, stored.neuron_id) == ("6", "c")
    assert from_timestamp(stored.event.event_time) == start + timedelta(seconds=3)
    assert from_timestamp(stored.receive_time) == start + timedelta(minutes=1)
    assert stored.event.severity == report_pb2.SEVERITY_INFO
    assert (stored.event.type, stored.event.message) == ("quiet", "message 6")
    assert from_struct(stored.event.attributes) == {"number": 6}


async def test_each_field_can_be_asked_for_in_a_filter(
    analytics: Analytics, start: datetime
) -> None:
    second = (start + timedelta(seconds=1)).isoformat()
    expected = {
        "neuron_id = a": "521",
        "severity = INFO": "62",
        "severity >= ERROR": "54",
        "severity < WARNING": "621",
        'type = "disk_*"': "321",
        'message = "*4"': "4",
        f'event_time = "{second}"': "32",
        f'event_time > "{second}" AND NOT neuron_id = c': "54",
    }
    assert {text: await listed(analytics, text) for text in expected} == expected


async def test_events_that_come_meanwhile_do_not_shift_the_pages(
    analytics: Analytics, database: Database, start: datetime
) -> None:
    first = await analytics.ListReportedEvents(pb.ListReportedEventsRequest(page_size=2))
    async with database.begin() as connection:
        await connection.execute(
            insert(reported_events).values(
                event_id=7,
                event_time=start + timedelta(seconds=9),
                neuron_id="a",
                receive_time=start,
                severity=Severity.INFO,
                type="late",
                message="",
                attributes={},
            )
        )
    second = await analytics.ListReportedEvents(
        pb.ListReportedEventsRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [event.event_id for event in second.events] == ["4", "3"]


@pytest.mark.parametrize(
    ("filter", "word"),
    [("colour = red", "colour"), ("severity >= LOUD", "LOUD"), ("severity =", "ends")],
)
async def test_a_filter_that_means_nothing_is_refused_with_a_reason(
    analytics: Analytics,
    filter: str,  # noqa: A002 - the contract's word
    word: str,
) -> None:
    call = analytics.ListReportedEvents(pb.ListReportedEventsRequest(filter=filter))
    code, reason, violations = await refusal(call)
    assert (code, reason) == (INVALID, "INVALID_FIELD")
    assert word in violations["filter"]


async def test_a_page_token_of_another_list_is_refused(
    analytics: Analytics, start: datetime
) -> None:
    first = await analytics.ListReportedEvents(pb.ListReportedEventsRequest(page_size=1))
    call = analytics.ListMetricNames(pb.ListMetricNamesRequest(page_token=first.next_page_token))
    code, reason, _ = await refusal(call)
    assert (code, reason) == (INVALID, "PAGE_TOKEN_INVALID")


async def test_a_page_ends_before_the_events_that_are_large_fill_the_servers_memory(
    analytics: Analytics, database: Database
) -> None:
    """64 KiB of numbers, as a neuron may report them, are 350 KiB in the answer."""
    async with database.begin() as connection:
        now = await current_time(connection)
        await connection.execute(
            insert(reported_events),
            [
                {
                    "event_id": number,
                    "event_time": now,
                    "neuron_id": "a",
                    "receive_time": now,
                    "severity": Severity.INFO,
                    "type": "large",
                    "message": "",
                    "attributes": {"n": [1] * (21_000 if number % 2 else 2)},
                }
                for number in range(60)
            ],
        )
    request = pb.ListReportedEventsRequest(page_size=1000)
    found: list[list[int]] = []
    while not found or request.page_token:
        answer = await analytics.ListReportedEvents(request)
        assert answer.ByteSize() < 4 * 1024 * 1024
        found.append([int(event.event_id) for event in answer.events])
        request.page_token = answer.next_page_token
    assert len(found) == 2
    assert found[0] + found[1] == [*range(59, -1, -1)]
