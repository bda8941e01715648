"""The examples do what their READMEs say: operations, HTTP answers, commands."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from examples import ten_lines
from examples.python_processor import service, web
from examples.python_processor.cache import Cache
from examples.python_processor.processing import (
    Aggregate,
    Filter,
    Normalize,
    Operator,
    ProcessingError,
    Record,
    Request,
    Scalar,
    process,
)
from examples.python_processor.processor import Processor
from examples.python_processor.web import MAX_BODY_BYTES, Answer, WebServer
from neuron_sdk import CommandContext, CommandFailed, Neuron
from neuron_sdk.context import Progress
from tests.support.waiting import eventually_sync

SALES: list[Record] = [
    {"city": "Lima", "price": 3, "sold": True},
    {"city": "Lima", "price": 5, "sold": False},
    {"city": "Oslo", "price": 0, "sold": True},
    {"city": "Oslo", "price": None, "sold": True},
]


# ---- operations


def test_normalizing_scales_numbers_between_the_smallest_and_the_largest() -> None:
    records = process(Normalize(records=SALES)).records
    assert [record["price"] for record in records] == [0.6, 1.0, 0.0, None]
    assert [record["city"] for record in records] == ["Lima", "Lima", "Oslo", "Oslo"]
    assert [record["sold"] for record in records if record["sold"] is True] == [True] * 3


def test_normalizing_leaves_fields_alone_that_were_not_named() -> None:
    records: list[Record] = [{"a": 1, "b": 1}, {"a": 3, "b": 3}]
    assert process(Normalize(records=records, fields=["a"])).records == [
        {"a": 0.0, "b": 1},
        {"a": 1.0, "b": 3},
    ]


def test_normalizing_equal_or_huge_numbers_needs_no_division_by_zero_or_infinity() -> None:
    assert process(Normalize(records=[{"a": 7}, {"a": 7}])).records == [{"a": 0.0}, {"a": 0.0}]
    huge: list[Record] = [{"a": -1.7e308}, {"a": 1.7e308}]
    assert process(Normalize(records=huge)).records == [{"a": 0.0}, {"a": 1.0}]


def test_aggregating_counts_numbers_alone_and_zero_is_one() -> None:
    result = process(Aggregate(records=SALES, field="price", group_by="city"))
    assert (result.input_records, result.output_records) == (4, 2)
    assert result.records == [
        {"group": "Lima", "count": 2, "sum": 8.0, "mean": 4.0, "min": 3.0, "max": 5.0},
        {"group": "Oslo", "count": 1, "sum": 0.0, "mean": 0.0, "min": 0.0, "max": 0.0},
    ]
    (row,) = process(Aggregate(records=SALES, field="price")).records
    assert (row["group"], row["count"], row["sum"]) == (None, 3, 8.0)


@pytest.mark.parametrize(
    ("operator", "value", "kept"),
    [("eq", 5, 1), ("ne", 5, 3), ("lt", 3, 1), ("le", 3, 2), ("gt", 3, 1), ("ge", 3, 2)],
)
def test_filtering_compares_a_field_with_a_value(
    operator: Operator, value: Scalar, kept: int
) -> None:
    request = Filter(records=SALES, field="price", operator=operator, value=value)
    assert process(request).output_records == kept


def test_filtering_a_string_or_what_cannot_be_compared() -> None:
    contains = Filter(records=SALES, field="city", operator="contains", value="im")
    assert process(contains).output_records == 2
    assert process(Filter(SALES, "city", "lt", 5)).output_records == 0
    assert process(Filter(SALES, "missing", "ne", 5)).output_records == 0


@pytest.mark.parametrize(
    "request_",
    [
        Normalize(records=SALES, fields=["city"]),
        Aggregate(records=SALES, field="city"),
        Aggregate(records=[{"a": 10**400}], field="a"),
        Aggregate(records=[{"a": 1.7e308}, {"a": 1.7e308}], field="a"),
        Filter(records=SALES, field="city", operator="contains", value=1),
    ],
)
def test_what_cannot_be_carried_out_is_an_error_in_words(
    request_: Request,
) -> None:
    with pytest.raises(ProcessingError, match=r"holds no number|too large|needs a string"):
        process(request_)


# ---- the cache


def test_the_cache_forgets_the_least_used_result_first() -> None:
    cache = Cache(max_entries=2)
    cache.put(b"a", b"1")
    cache.put(b"b", b"2")
    assert cache.get(b"a") == b"1"
    cache.put(b"c", b"3")
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c")) == (b"1", None, b"3")
    assert cache.clear() == 2
    assert len(cache) == 0


def test_the_cache_is_bounded_by_its_bytes() -> None:
    cache = Cache(max_bytes=10)
    cache.put(b"a", b"x" * 6)
    cache.put(b"a", b"x" * 8)
    assert cache.get(b"a") == b"x" * 8
    cache.put(b"b", b"x" * 3)
    assert (cache.get(b"a"), cache.get(b"b")) == (None, b"x" * 3)
    cache.put(b"c", b"x" * 11)
    assert len(cache) == 0


# ---- HTTP


@pytest.fixture
def processor() -> Processor:
    return Processor(Neuron("example", type="example"))


class Client:
    """Asks a web server; each request on a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(
        self, body: Any, path: str = web.PATH, content_type: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, {"Content-Type": content_type})

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def raw(self, request: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile().read()


@contextlib.contextmanager
def serving(server: WebServer) -> Iterator[Client]:
    server.start()
    try:
        yield Client(server.port)
    finally:
        server.stop()


@pytest.fixture
def client(processor: Processor) -> Iterator[Client]:
    with serving(WebServer("127.0.0.1", 0, processor.answer)) as client:
        yield client


def test_a_request_is_processed_and_the_same_one_comes_from_the_cache(
    client: Client, processor: Processor
) -> None:
    body = {"operation": "filter", "records": SALES, "field": "sold", "operator": "eq",
            "value": False}  # fmt: skip
    expected = {"operation": "filter", "input_records": 4, "output_records": 1,
                "records": [SALES[1]]}  # fmt: skip
    assert client.post(body) == (200, expected)
    assert client.post(body) == (200, expected)
    statistics = processor.statistics()
    assert (statistics.requests, statistics.cache_hits, statistics.cache_entries) == (2, 1, 1)
    assert (statistics.records_processed, statistics.by_operation) == (4, {"filter": 1})
    assert processor.clear_cache() == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", "body does not fit"),
        (b"\xff", "body does not fit"),
        (b'{"records":' + b"[" * 100_000, "body does not fit"),
        ({"records": SALES}, "operation"),
        ({"operation": "sort", "records": SALES}, "'sort'"),
        ({"operation": "normalize"}, "missing required field `records`"),
        ({"operation": "normalize", "records": []}, "length >= 1"),
        ({"operation": "normalize", "records": [{}] * 10_001}, "length <= 10000"),
        ({"operation": "normalize", "records": [{"a": [1]}]}, "$.records"),
        ({"operation": "normalize", "records": SALES, "feilds": []}, "unknown field `feilds`"),
        ({"operation": "filter", "records": SALES, "field": "a", "operator": "~", "value": 1},
         "$.operator"),
    ],
)  # fmt: skip
def test_a_body_that_does_not_fit_is_a_400_that_says_where(
    client: Client, body: object, problem: str
) -> None:
    status, answer = client.post(body)
    assert status == 400
    assert problem in answer["error"]


def test_a_request_that_cannot_be_carried_out_is_a_422(client: Client) -> None:
    status, answer = client.post({"operation": "aggregate", "records": SALES, "field": "city"})
    assert (status, answer["error"]) == (422, "field 'city' holds no number in any record")


def test_other_paths_methods_and_types_are_refused_by_their_own_status(client: Client) -> None:
    assert client.post({}, path="/data")[0] == 404
    assert client.ask("GET", web.PATH)[0] == 405
    assert client.post({}, content_type="text/plain")[0] == 415
    assert client.post(b"")[0] == 411


def test_a_body_too_large_is_refused_although_it_is_sent_whole(client: Client) -> None:
    size = 4 * MAX_BODY_BYTES
    status, answer = client.post(b" " * size)
    assert status == 413
    assert answer["error"] == f"the body has {size} bytes; send at most {MAX_BODY_BYTES}"


def test_a_body_that_ends_early_is_a_400(client: Client) -> None:
    head = (
        f"POST {web.PATH} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    )
    assert "ended early" in client.raw(head.encode() + b"{")


def test_a_failure_of_the_service_itself_is_a_500_without_its_reason() -> None:
    def fail(_body: bytes) -> Answer:
        raise RuntimeError("hunter2")

    with serving(WebServer("127.0.0.1", 0, fail)) as client:
        status, answer = client.post({})
    assert status == 500
    assert "hunter2" not in answer["error"]


def test_requests_beyond_the_bound_are_turned_away_and_the_place_is_free_again(
    monkeypatch: pytest.MonkeyPatch, processor: Processor
) -> None:
    monkeypatch.setattr(web, "MAX_REQUESTS", 1)
    started, released = threading.Event(), threading.Event()

    def wait(body: bytes) -> Answer:
        started.set()
        released.wait(10)
        return processor.answer(body)

    body = {"operation": "normalize", "records": SALES}
    with serving(WebServer("127.0.0.1", 0, wait)) as client:
        first = threading.Thread(target=client.post, args=(body,))
        first.start()
        assert started.wait(10)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            client.post(body)
        released.set()
        first.join()

        def answered() -> bool:
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
                return client.post(body)[0] == 200
            return False

        eventually_sync(answered)


# ---- commands


def context(seen: list[Progress]) -> CommandContext:
    return CommandContext(command_id="c1", attempt=1, type="test", report=seen.append)


async def test_run_task_processes_as_many_records_as_it_was_told_and_says_how_far_it_is() -> None:
    seen: list[Progress] = []
    answer = await service.run_task(context(seen), "orders", limit=50)
    assert answer == {"input_source": "orders", "processed_records": 50}
    assert [progress.fraction for progress in seen] == [0.4, 0.8, 1.0]


def test_process_batch_carries_out_each_request_and_leaves_records_out_unless_asked() -> None:
    seen: list[Progress] = []
    requests: list[Request] = [Normalize(records=SALES), Aggregate(records=SALES, field="price")]
    answer = service.process_batch(context(seen), requests)
    assert answer is not None
    assert answer["results"] == [
        {"operation": "normalize", "input_records": 4, "output_records": 4},
        {"operation": "aggregate", "input_records": 4, "output_records": 1},
    ]
    assert seen[-1].fraction == 1.0
    answer = service.process_batch(context([]), requests, include_records=True)
    assert answer is not None
    assert len(answer["results"][0]["records"]) == 4


def test_process_batch_names_the_request_that_cannot_be_carried_out() -> None:
    requests: list[Request] = [Normalize(records=SALES), Aggregate(records=SALES, field="city")]
    with pytest.raises(CommandFailed) as failure:
        service.process_batch(context([]), requests)
    assert (failure.value.code, failure.value.details) == ("CANNOT_PROCESS", {"index": 1})


def test_process_batch_ends_between_two_requests_when_it_is_cancelled() -> None:
    ctx = context([])
    ctx.cancel("enough")
    assert service.process_batch(ctx, [Normalize(records=SALES)]) is None


async def test_statistics_and_the_cache_can_be_asked_for_and_cleared() -> None:
    service.processor.answer(msgspec.json.encode(Normalize(records=SALES)))
    assert (await service.get_statistics())["cache_entries"] == 1
    assert await service.clear_cache() == {"removed": 1}
    assert (await service.get_statistics())["cache_entries"] == 0


def test_the_processor_advertises_its_commands_with_the_schema_of_their_data() -> None:
    commands = {command.type: command.info() for command in service.neuron.commands}
    assert {"run_task", "process_batch", "get_statistics", "clear_cache"} <= commands.keys()
    schema = commands["run_task"].data_schema
    assert schema is not None
    assert schema["required"] == ["input_source"]
    assert schema["properties"]["limit"]["default"] == 100


def test_the_processor_needs_disk_space_and_only_watches_the_federation() -> None:
    results = {result.name: result for result in service.neuron.checks.status()}
    assert results["disk_space"].required
    assert not results["federation"].required


async def test_the_ten_lines_are_a_neuron() -> None:
    seen: list[Progress] = []
    assert await ten_lines.run_task(context(seen), "orders", limit=2) == {"processed_records": 2}
    assert [progress.message for progress in seen] == ["0 rows", "1 rows"]
    assert ten_lines.neuron.commands.get("run_task") is not None
