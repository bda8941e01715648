"""FleetService over real gRPC and PostgreSQL: what admins see of the fleet."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import func, insert, null, select

from federation.v1 import fleet_service_pb2 as pb
from federation.v1 import neuron_pb2
from federation_server.domain.doubt import Cause
from federation_server.domain.neuron import Lifecycle, Presence
from federation_server.live.session import Sessions
from federation_server.rpc.convert import from_timestamp, to_timestamp
from federation_server.rpc.convert_heartbeat import heartbeat_to_proto
from federation_server.store import neuron_list, partitions, servers
from federation_server.store.database import Connection, Database
from federation_server.store.schema import (
    heartbeats,
)
from tests.support.fleet import HERE, Fleet, beat, get, live, migrated, put, serving_fleet
from tests.support.neurons import heartbeat
from tests.support.servers import refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with migrated(database_url) as database:
        yield database


@pytest_asyncio.fixture
async def writer(database: Database) -> AsyncIterator[Connection]:
    async with await database.connect("test-writer") as connection:
        yield connection


@pytest_asyncio.fixture
async def fleet(database: Database) -> AsyncIterator[Fleet]:
    async with serving_fleet(database, Sessions()) as fleet:
        yield fleet


async def listed(fleet: Fleet, filter: str = "", order_by: str = "") -> list[str]:  # noqa: A002
    """The ids of the neurons in a list, which is read in pages of two."""
    found: list[str] = []
    token = ""
    while True:
        page = await fleet.ListNeurons(
            pb.ListNeuronsRequest(page_size=2, page_token=token, filter=filter, order_by=order_by)
        )
        found += [neuron.neuron_id for neuron in page.neurons]
        token = page.next_page_token
        if not token:
            return found


# --- GetNeuron ---


async def test_a_neuron_is_shown_with_its_last_heartbeat_as_it_came(
    fleet: Fleet, database: Database, writer: Connection
) -> None:
    await put(database, "n1")
    await beat(writer, "n1", health_score=12.0)
    await beat(writer, "n1", health_score=88.0)
    shown = await get(fleet, "n1")
    assert shown.last_heartbeat == heartbeat_to_proto(heartbeat(health_score=88.0))
    assert shown.health_score == 88.0
    assert shown.presence == neuron_pb2.PRESENCE_ONLINE
    assert shown.HasField("last_heartbeat_time")


async def test_a_neuron_that_never_came_is_shown_without_a_heartbeat(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    shown = await get(fleet, "n1")
    assert not shown.HasField("last_heartbeat")
    assert not shown.HasField("health_score")
    assert not shown.HasField("session")
    assert shown.description.command_types[0].type == "run"


async def test_the_last_heartbeat_is_absent_once_retention_has_passed_over_it(
    fleet: Fleet, database: Database, writer: Connection
) -> None:
    await put(database, "n1")
    await beat(writer, "n1")
    await partitions.drop_before(writer, "heartbeats", date(2100, 1, 1))
    shown = await get(fleet, "n1")
    assert not shown.HasField("last_heartbeat")
    assert shown.health_score == 90.0


async def test_a_neurons_session_is_shown_with_its_epoch_and_its_server(
    fleet: Fleet, database: Database
) -> None:
    await put(database, "n1")
    await live(database, None, "n1")
    session = (await get(fleet, "n1")).session
    assert (session.open, session.epoch, session.server_id) == (True, 1, HERE)


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("GetNeuron", pb.GetNeuronRequest),
        ("DeactivateNeuron", pb.DeactivateNeuronRequest),
        ("ActivateNeuron", pb.ActivateNeuronRequest),
        ("DeleteNeuron", pb.DeleteNeuronRequest),
        ("ListHeartbeats", pb.ListHeartbeatsRequest),
    ],
)
async def test_a_neuron_that_is_not_there_is_not_found(
    fleet: Fleet, method: str, request_type: Any
) -> None:
    code, reason, _ = await refusal(getattr(fleet, method)(request_type(neuron_id="nobody")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "NEURON_NOT_FOUND")


async def test_updating_a_neuron_that_is_not_there_is_not_found(fleet: Fleet) -> None:
    request = pb.UpdateNeuronRequest(neuron_id="nobody", update_mask=FieldMask(paths=["name"]))
    code, reason, _ = await refusal(fleet.UpdateNeuron(request))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "NEURON_NOT_FOUND")


async def test_a_request_without_a_neuron_id_is_refused_by_field(fleet: Fleet) -> None:
    code, reason, violations = await refusal(fleet.GetNeuron(pb.GetNeuronRequest()))
    assert (code, reason, set(violations)) == (INVALID, "INVALID_FIELD", {"neuron_id"})


# --- ListNeurons ---

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest_asyncio.fixture
async def three(database: Database) -> None:
    """Three neurons that differ in everything that a filter or an order can ask for."""
    await put(
        database,
        "a",
        type="scraper",
        name="Zoe",
        language="python",
        version="1.0",
        presence=Presence.ONLINE,
        health_score=90.0,
        cpu_percent=10.0,
        memory_percent=20.0,
        error_rate_percent=1.0,
        mean_response_ms=100.0,
        last_heartbeat_time=LONG_AGO,
        create_time=LONG_AGO + timedelta(days=3),
        update_time=LONG_AGO,
        labels={"zone": "eu", "team": "x"},
        capabilities=["scrape", "store"],
        dependencies=["redis"],
    )
    await put(
        database,
        "b",
        type="scraper",
        name="Yan",
        language="go",
        version="2.0",
        presence=Presence.SUSPECT,
        health_score=30.0,
        cpu_percent=95.0,
        memory_percent=90.0,
        error_rate_percent=50.0,
        mean_response_ms=9000.0,
        last_heartbeat_time=LONG_AGO + timedelta(days=1),
        create_time=LONG_AGO + timedelta(days=2),
        labels={"zone": "us"},
        capabilities=["scrape"],
        dependencies=["postgresql"],
    )
    await put(
        database,
        "c",
        type="batch",
        name="Xu",
        lifecycle=Lifecycle.DEACTIVATED,
        create_time=LONG_AGO,
    )


# Each stands for the neurons that it finds.
FILTERS = {
    "": "abc",
    "neuron_id = a": "a",
    'name = "Y*"': "b",
    "type = scraper": "ab",
    "language = go": "b",
    'version = "1.0"': "a",
    "lifecycle = DEACTIVATED": "c",
    "presence = ONLINE": "a",
    "NOT presence = ONLINE": "bc",
    "health_score < 50": "b",
    "NOT health_score < 50": "ac",
    "cpu_percent > 80": "b",
    "memory_percent >= 90": "b",
    "error_rate_percent <= 1": "a",
    "mean_response_ms > 5000": "b",
    'last_heartbeat_time > "2020-01-01T12:00:00Z"': "b",
    'create_time < "2020-01-02T00:00:00Z"': "c",
    'update_time < "2021-01-01T00:00:00Z"': "a",
    'labels.zone = "eu"': "a",
    "labels:zone": "ab",
    "labels.zone != eu": "bc",
    "capabilities:store": "a",
    "dependencies:redis OR dependencies:postgresql": "ab",
    'type = "scraper" AND labels.zone = "eu" AND NOT presence = OFFLINE': "a",
    "-(type = scraper)": "c",
}

# Each stands for the order that it puts the neurons in.
ORDERS = {
    "": "abc",
    "neuron_id": "abc",
    "neuron_id desc": "cba",
    "name": "cba",
    "type": "cab",
    "type desc": "abc",
    "presence": "abc",
    "presence desc": "cba",
    "health_score": "bac",
    "health_score desc": "abc",
    "last_heartbeat_time": "abc",
    "last_heartbeat_time  desc": "bac",
    "create_time": "cba",
    "create_time desc": "abc",
}


@pytest.mark.usefixtures("three")
async def test_each_field_can_be_asked_for_in_a_filter(fleet: Fleet) -> None:
    assert {text: "".join(await listed(fleet, text)) for text in FILTERS} == FILTERS
    assert set(neuron_list.FIELDS) <= set(re.findall("[a-z_]+", " ".join(FILTERS)))


@pytest.mark.usefixtures("three")
async def test_each_order_holds_over_pages(fleet: Fleet) -> None:
    assert {text: "".join(await listed(fleet, order_by=text)) for text in ORDERS} == ORDERS
    assert {text.split()[0] for text in ORDERS if text} == {
        text.split()[0] for text in neuron_list.ORDERS
    }


async def test_pages_show_each_neuron_once_where_most_have_no_value_to_sort_by(
    fleet: Fleet, database: Database
) -> None:
    for number in range(7):
        await put(database, f"n{number}", health_score=50.0 if number in {2, 4} else None)
    assert await listed(fleet, order_by="health_score") == [
        f"n{number}" for number in (2, 4, 0, 1, 3, 5, 6)
    ]


@pytest.mark.usefixtures("three")
async def test_a_page_token_of_another_filter_is_refused(fleet: Fleet) -> None:
    first = await fleet.ListNeurons(pb.ListNeuronsRequest(page_size=1))
    call = fleet.ListNeurons(
        pb.ListNeuronsRequest(page_token=first.next_page_token, filter="type = scraper")
    )
    code, reason, _ = await refusal(call)
    assert (code, reason) == (INVALID, "PAGE_TOKEN_INVALID")


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("filter", {"filter": "colour = red"}),
        ("filter", {"filter": "presence = AWAY"}),
        ("order_by", {"order_by": "colour"}),
        ("order_by", {"order_by": "name asc, type"}),
        ("page_size", {"page_size": 1001}),
    ],
)
async def test_a_list_that_cannot_be_is_refused_by_field(
    fleet: Fleet, field: str, request_fields: dict[str, Any]
) -> None:
    call = fleet.ListNeurons(pb.ListNeuronsRequest(**request_fields))
    code, reason, violations = await refusal(call)
    assert (code, reason, set(violations)) == (INVALID, "INVALID_FIELD", {field})


async def test_lists_leave_the_last_heartbeats_out(
    fleet: Fleet, database: Database, writer: Connection
) -> None:
    await put(database, "n1")
    await beat(writer, "n1")
    page = await fleet.ListNeurons(pb.ListNeuronsRequest())
    assert not page.neurons[0].HasField("last_heartbeat")
    assert page.neurons[0].health_score == 90.0


# --- GetFleetOverview ---


async def overview(fleet: Fleet, **request: Any) -> pb.GetFleetOverviewResponse:
    return await fleet.GetFleetOverview(pb.GetFleetOverviewRequest(**request))


async def test_an_empty_fleet_has_every_presence_and_lifecycle_named_with_zero(
    fleet: Fleet,
) -> None:
    seen = await overview(fleet)
    assert seen.total == 0
    assert [(p.presence, p.count) for p in seen.presences] == [
        (neuron_pb2.PRESENCE_ONLINE, 0),
        (neuron_pb2.PRESENCE_SUSPECT, 0),
        (neuron_pb2.PRESENCE_OFFLINE, 0),
    ]
    assert [(item.lifecycle, item.count) for item in seen.lifecycles] == [
        (neuron_pb2.LIFECYCLE_PENDING, 0),
        (neuron_pb2.LIFECYCLE_ACTIVE, 0),
        (neuron_pb2.LIFECYCLE_DEACTIVATED, 0),
    ]
    assert not seen.HasField("mean_health_score")
    assert seen.HasField("server_time")


async def test_the_overview_counts_and_names_the_slowest_and_the_worst(
    fleet: Fleet, database: Database
) -> None:
    online = {"presence": Presence.ONLINE}
    await put(database, "a", type="x", health_score=100.0, mean_response_ms=10.0, **online)
    await put(database, "b", type="x", health_score=50.0, mean_response_ms=30.0, **online)
    await put(database, "c", type="y", health_score=75.0, **online)
    await put(database, "d", type="z", mean_response_ms=20.0, **online)
    await put(database, "e", type="x", health_score=1.0, mean_response_ms=99.0)
    await put(database, "f", type="y", lifecycle=Lifecycle.DEACTIVATED)
    seen = await overview(fleet)
    assert seen.total == 6
    assert [p.count for p in seen.presences] == [4, 0, 2]
    assert [item.count for item in seen.lifecycles] == [0, 5, 1]
    assert [(t.type, t.count) for t in seen.types] == [("x", 3), ("y", 2), ("z", 1)]
    assert seen.mean_health_score == 75.0
    assert [n.neuron_id for n in seen.slowest] == ["b", "d", "a"]
    assert [n.neuron_id for n in seen.worst] == ["b", "c", "a"]
    assert not seen.worst[1].HasField("mean_response_ms")
    assert (seen.slowest[0].type, seen.slowest[0].mean_response_ms) == ("x", 30.0)


async def test_the_overview_keeps_to_its_filter(fleet: Fleet, database: Database) -> None:
    await put(database, "a", type="x", presence=Presence.ONLINE, health_score=10.0)
    await put(database, "b", type="y", presence=Presence.ONLINE, health_score=90.0)
    seen = await overview(fleet, filter="type = y AND presence = ONLINE")
    assert (seen.total, seen.mean_health_score) == (1, 90.0)
    assert [n.neuron_id for n in seen.worst] == ["b"]


async def test_the_overview_names_the_servers_in_doubt_and_who_sweeps_first(
    fleet: Fleet, writer: Connection
) -> None:
    await servers.renew(writer, "b", "0", doubt={Cause.FLUSH_LAG: 60.0})
    await servers.renew(
        writer, "a", "0", doubt={Cause.JUST_STARTED: 9.0, Cause.DATABASE_LAG: 4.0}, sweeping=True
    )
    await servers.renew(writer, "well", "0")
    await servers.renew(writer, "dead", "0", doubt={Cause.LOOP_LAG: 1.0})
    await writer.execute(
        b"UPDATE servers SET lease_expire_time = now() WHERE server_id = 'dead'",
    )
    sweeping, other = (await overview(fleet, filter="type = none")).doubts
    assert (sweeping.server_id, sweeping.sweeping) == ("a", True)
    assert list(sweeping.causes) == [
        pb.DOUBT_CAUSE_JUST_STARTED,
        pb.DOUBT_CAUSE_DATABASE_LAG,
    ]
    assert (other.server_id, other.sweeping) == ("b", False)
    assert list(other.causes) == [pb.DOUBT_CAUSE_FLUSH_LAG]
    assert other.since_time.ToSeconds() < sweeping.since_time.ToSeconds()


@pytest.mark.parametrize(("top", "named"), [(0, 5), (2, 2), (100, 7)])
async def test_the_overview_names_as_many_as_asked(
    fleet: Fleet, database: Database, top: int, named: int
) -> None:
    for number in range(7):
        await put(database, f"n{number}", presence=Presence.ONLINE, health_score=50.0)
    assert len((await overview(fleet, top=top)).worst) == named


# --- ListHeartbeats ---


@pytest_asyncio.fixture
async def beaten(database: Database) -> datetime:
    """A neuron with five heartbeats, a minute apart, the first at the time that is returned."""
    await put(database, "n1")
    await put(database, "n2")
    async with database.begin() as connection:
        start: datetime = (await connection.execute(select(func.now()))).scalar_one()
        for minute in range(5):
            values = heartbeat(requests=minute)._asdict()
            values |= dict.fromkeys(("host", "dependencies", "versions"), null())
            await connection.execute(
                insert(heartbeats).values(
                    neuron_id="n1",
                    receive_time=start + timedelta(minutes=minute),
                    epoch=3,
                    **values,
                )
            )
    return start


async def history(fleet: Fleet, **request: Any) -> list[int]:
    """A number from each heartbeat in a list that is read in pages of two."""
    found: list[int] = []
    token = ""
    while True:
        page = await fleet.ListHeartbeats(
            pb.ListHeartbeatsRequest(page_size=2, page_token=token, **request)
        )
        found += [stored.heartbeat.application.requests for stored in page.heartbeats]
        token = page.next_page_token
        if not token:
            return found


def after(start: datetime, minutes: int) -> Timestamp:
    stamp = to_timestamp(start + timedelta(minutes=minutes))
    assert stamp is not None
    return stamp


async def test_heartbeats_are_listed_newest_first(fleet: Fleet, beaten: datetime) -> None:
    assert await history(fleet, neuron_id="n1") == [4, 3, 2, 1, 0]
    assert await history(fleet, neuron_id="n2") == []


async def test_a_span_of_heartbeats_holds_its_start_and_not_its_end(
    fleet: Fleet, beaten: datetime
) -> None:
    span = {"start_time": after(beaten, 1), "end_time": after(beaten, 4)}
    assert await history(fleet, neuron_id="n1", **span) == [3, 2, 1]


async def test_a_heartbeat_in_the_history_has_its_time_and_its_session(
    fleet: Fleet, beaten: datetime
) -> None:
    page = await fleet.ListHeartbeats(pb.ListHeartbeatsRequest(neuron_id="n1"))
    assert from_timestamp(page.heartbeats[-1].receive_time) == beaten
    assert page.heartbeats[-1].epoch == 3
    assert page.heartbeats[-1].heartbeat.system.cpu_percent == 12.5


async def test_a_page_token_of_another_neurons_history_is_refused(
    fleet: Fleet, beaten: datetime
) -> None:
    first = await fleet.ListHeartbeats(pb.ListHeartbeatsRequest(neuron_id="n1", page_size=1))
    request = pb.ListHeartbeatsRequest(neuron_id="n2", page_token=first.next_page_token)
    code, reason, _ = await refusal(fleet.ListHeartbeats(request))
    assert (code, reason) == (INVALID, "PAGE_TOKEN_INVALID")
