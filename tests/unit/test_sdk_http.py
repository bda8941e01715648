"""The neuron's local HTTP over real sockets: its pages, its bounds, its refusals."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from neuron_sdk import http as sdk_http
from neuron_sdk.dependencies import DependencyResult, DependencyState
from neuron_sdk.health import HealthReport, assess
from neuron_sdk.http import PortInUse, StatusServer
from neuron_sdk.metrics import Metrics
from neuron_sdk.prometheus import build_registry
from neuron_sdk.system import SystemProbe
from tests.support.waiting import eventually_sync


class Service:
    """What a neuron would answer; changed by the tests."""

    def __init__(self, disk_path: Path) -> None:
        self.metrics = Metrics()
        self.report = assess(90, uptime=12.5)
        self.state: Mapping[str, object] = {"neuron_id": "n1", "token": "hunter2"}
        self.health_error: Exception | None = None
        self.hold: threading.Event | None = None
        self.server = StatusServer(
            "127.0.0.1",
            0,
            health=self.health,
            status=lambda: self.state,
            registry=build_registry(
                self.metrics, SystemProbe(), disk_path=disk_path, health=lambda: self.report
            ),
        )
        self.port = 0

    def health(self) -> HealthReport:
        if self.health_error:
            raise self.health_error
        if self.hold:
            self.hold.wait(30)
        return self.report

    def ask(
        self, path: str, method: str = "GET", body: bytes = b"", accept: str = ""
    ) -> tuple[int, Mapping[str, str], str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request(method, path, body, {"Accept": accept})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()

    def series(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        _, _, text = self.ask("/metrics")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    service.port = service.server.start()
    yield service
    service.server.stop()


# ---- /health and /status


def test_health_tells_status_uptime_score_and_dependencies(service: Service) -> None:
    checked = datetime(2026, 1, 2, tzinfo=UTC)
    down = DependencyResult("cache", DependencyState.DOWN, 3.5, "refused", checked, required=False)
    service.report = assess(90, uptime=12.5, dependencies=(down,))
    status, headers, body = service.ask("/health")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {
        "status": "degraded",
        "uptime": 12.5,
        "health_score": 90.0,
        "dependencies": [
            {
                "name": "cache",
                "state": "DOWN",
                "latency_ms": 3.5,
                "message": "refused",
                "check_time": "2026-01-02T00:00:00Z",
                "required": False,
            }
        ],
        "spool_in_memory": False,
    }


def test_an_unhealthy_neuron_answers_503_with_the_same_page(service: Service) -> None:
    service.report = assess(10, uptime=1.0)
    status, _, body = service.ask("/health")
    assert (status, json.loads(body)["status"]) == (503, "unhealthy")


def test_status_answers_the_neurons_own_page_without_secrets(service: Service) -> None:
    status, _, body = service.ask("/status?verbose=1")
    assert (status, json.loads(body)) == (200, {"neuron_id": "n1", "token": "[redacted]"})


def test_head_is_answered_like_get_without_the_body(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"HEAD /health HTTP/1.0\r\n\r\n")
        head, _, body = client.makefile().read().partition("\n\n")
    assert head.startswith("HTTP/1.0 200 OK")
    assert f"Content-Length: {len(service.ask('/health')[2])}" in head
    assert body == ""


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
def test_any_other_method_is_not_allowed(service: Service, method: str) -> None:
    status, headers, body = service.ask("/health", method, b"{}")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert json.loads(body) == {"error": "use GET or HEAD"}


def test_an_unknown_page_names_the_known_ones(service: Service) -> None:
    status, _, body = service.ask("/healthz")
    assert status == 404
    assert "/health, /status, /metrics" in json.loads(body)["error"]


def test_a_page_that_fails_is_a_500_that_tells_no_reason(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.health_error = RuntimeError("hunter2")
    status, _, body = service.ask("/health")
    assert status == 500
    assert "hunter2" not in body
    assert [vars(record)["action"] for record in caplog.records] == ["http.failed"]
    service.health_error = None
    assert service.ask("/health")[0] == 200


def test_a_request_that_is_no_http_is_refused_in_json(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/one\r\n\r\n")
        answer = client.makefile().read()
    assert "400" in answer.splitlines()[0]
    assert "error" in json.loads(answer.splitlines()[-1])


# ---- bounds; the clients here have less patience than the server's own socket timeout of 5 s


def test_a_client_that_sends_too_slowly_is_cut_off(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk_http, "REQUEST_TIMEOUT", 0.1)
    with socket.create_connection(("127.0.0.1", service.port), timeout=3) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n")  # and never the empty line
        assert client.recv(1) == b""


def test_one_request_too_many_is_turned_away_until_another_has_ended(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk_http, "MAX_REQUESTS", 1)
    service.hold = threading.Event()
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as first:
        first.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as second:
            assert second.recv(100).startswith(b"HTTP/1.0 503 ")
        service.hold.set()
        assert b"200 OK" in first.recv(100)
    eventually_sync(lambda: service.ask("/status")[0] == 200)


def test_stopping_closes_the_port_and_ends_open_requests(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=3) as client:
        client.sendall(b"GET ")
        eventually_sync(lambda: service.server._server and service.server._server._deadlines)
        service.server.stop()
        assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", service.port), timeout=10)


def test_stopping_twice_or_without_a_start_is_harmless(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.server.stop()
    service.server.start()
    service.server.stop()
    service.server.stop()


def test_a_stopped_server_can_start_again_on_its_port(tmp_path: Path) -> None:
    service = Service(tmp_path)
    port = service.server.start()
    service.server.stop()
    service.server._port = port
    assert service.server.start() == port
    service.server.stop()


def test_a_taken_port_is_reported_by_the_settings_name(service: Service) -> None:
    second = StatusServer(
        "127.0.0.1",
        service.port,
        health=service.health,
        status=dict,
        registry=build_registry(
            service.metrics, SystemProbe(), disk_path=Path("/"), health=service.health
        ),
    )
    with pytest.raises(PortInUse, match=rf"METRICS_PORT {service.port} on 127.0.0.1 is in use"):
        second.start()
    second.stop()


# ---- /metrics


def test_metrics_tell_the_built_in_series(service: Service) -> None:
    service.metrics.track_request(3)
    service.metrics.track_request(70_000, ok=False)
    service.metrics.set_queue_size(4)
    service.report = assess(
        90, uptime=12.5, dependencies=(DependencyResult("db", DependencyState.UP),)
    )
    series = service.series()
    assert series["neuron_requests_total", ()] == 2
    assert series["neuron_failed_requests_total", ()] == 1
    assert series["neuron_response_ms_bucket", (("le", "5.0"),)] == 1
    assert series["neuron_response_ms_bucket", (("le", "+Inf"),)] == 2
    assert series["neuron_response_ms_count", ()] == 2
    assert series["neuron_response_ms_sum", ()] == 70_003
    assert series["neuron_queue_size", ()] == 4
    assert series["neuron_health_score", ()] == 90
    assert series["neuron_uptime_seconds", ()] == 12.5
    assert series["neuron_dependency_up", (("dependency", "db"),)] == 1
    assert series["neuron_host_memory_used_bytes", ()] > 0
    assert series["neuron_process_threads", ()] >= 1


def test_a_report_takes_nothing_away_from_metrics(service: Service) -> None:
    service.metrics.counter("rows").add(5)
    service.metrics.take_report()
    service.metrics.counter("rows").add(1)
    assert service.series()["rows_total", ()] == 6


def test_names_and_labels_are_turned_into_what_prometheus_allows(service: Service) -> None:
    service.metrics.counter("jobs.done_total", labels={"a.b": "1", "a_b": "2", "9": "x"}).add(3)
    service.metrics.histogram("sizes", bounds=(1,), labels={"le": "mine"}).observe(1)
    series = service.series()
    assert series["jobs_done_total", (("_9", "x"), ("a_b", "1"), ("a_b_2", "2"))] == 3
    assert series["sizes_bucket", (("le", "1.0"), ("le_2", "mine"))] == 1


def test_names_that_become_the_same_stay_apart(service: Service) -> None:
    service.metrics.gauge("a.b").set(1)
    service.metrics.gauge("a_b").set(2)
    service.metrics.gauge("neuron_queue_size").set(3)
    series = service.series()
    assert (series["a_b", ()], series["a_b_2", ()]) == (1, 2)
    assert (series["neuron_queue_size", ()], series["neuron_queue_size_2", ()]) == (0, 3)


def test_metrics_can_be_read_as_openmetrics(service: Service) -> None:
    service.metrics.counter("rows", unit="rows", labels={"a": 'quo"te\n'}).add(5)
    service.metrics.histogram("sizes", bounds=(1, 2)).observe(1.5)
    _, headers, text = service.ask("/metrics", accept="application/openmetrics-text")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    families = openmetrics(text)  # type: ignore[no-untyped-call]
    names = {family.name for family in families}
    assert {"rows", "sizes", "neuron_requests"} <= names
