"""The port of /metrics: who says nothing there keeps nothing, and keeps nobody out for long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from urllib.request import urlopen

import pytest

from federation_server.live import metrics_port
from federation_server.live.metrics import Metrics
from federation_server.live.metrics_port import MOST_REQUESTS, MetricsPort
from tests.support.waiting import eventually_sync

HOSTS = ["127.0.0.1", "::1", "localhost"]


@pytest.fixture(params=HOSTS)
def port(request: pytest.FixtureRequest) -> Iterator[MetricsPort]:
    port = MetricsPort(request.param, 0, Metrics().registry)
    try:
        yield port
    finally:
        port.close()


def url(port: MetricsPort) -> str:
    host, number = port.server_address[:2]
    return (
        f"http://[{host!s}]:{number}/metrics" if ":" in str(host) else f"http://{host!s}:{number}/"
    )


def scraped(port: MetricsPort) -> bool:
    try:
        with urlopen(url(port), timeout=5) as answer:  # noqa: S310 - ours
            return b"federation_streams" in answer.read()
    except OSError:
        return False


def test_it_is_served_on_ipv4_and_ipv6(port: MetricsPort) -> None:
    assert scraped(port)


@pytest.mark.parametrize("port", HOSTS[:1], indirect=True)
def test_who_connects_and_says_nothing_is_let_go_of_and_more_than_a_few_have_no_thread(
    port: MetricsPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_port, "REQUEST_TIMEOUT_S", 1.0)
    before = threading.active_count()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(
                closing(socket.create_connection(port.server_address[:2], timeout=10))  # type: ignore[arg-type]
            )
            for _ in range(3 * MOST_REQUESTS)
        ]
        for connection in silent[MOST_REQUESTS:]:
            assert connection.recv(1) == b"", "those beyond are closed at once"
        # A thread for each that is served, and one that looks at its clock.
        assert threading.active_count() - before <= 2 * MOST_REQUESTS
        for connection in silent:
            assert connection.recv(1) == b""
        eventually_sync(lambda: threading.active_count() <= before, describe="no thread is left")
        eventually_sync(lambda: scraped(port), describe="a scraper is served again")


@pytest.mark.parametrize("port", HOSTS[:1], indirect=True)
def test_a_request_that_comes_byte_by_byte_has_no_more_time_than_another(
    port: MetricsPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_port, "REQUEST_TIMEOUT_S", 0.5)
    address = port.server_address[:2]
    with closing(socket.create_connection(address, timeout=10)) as slow:  # type: ignore[arg-type]

        def is_cut_off() -> bool:
            try:
                slow.sendall(b"x")
            except OSError:
                return True
            return False

        eventually_sync(is_cut_off, describe="it is cut off")
