"""Dependency checks: what they answer, what happens when they hang, fail or block."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from neuron_sdk.dependencies import DependencyChecks, DependencyResult, DependencyState, http, tcp
from tests.support.waiting import eventually

UP, DOWN, UNKNOWN = DependencyState.UP, DependencyState.DOWN, DependencyState.UNKNOWN
QUICK = 0.005  # seconds


@contextlib.asynccontextmanager
async def running(checks: DependencyChecks) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(checks.run(stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(5):
            await task


async def first_result(checks: DependencyChecks) -> DependencyResult:
    """The first result of the only check."""

    def checked() -> DependencyResult | None:
        (result,) = checks.status()
        return result if result.check_time else None

    async with running(checks):
        return await eventually(checked)


async def result_of(check: Callable[[], object]) -> DependencyResult:
    checks = DependencyChecks()
    checks.register("it", check)  # type: ignore[arg-type]  # some tests register nonsense
    return await first_result(checks)


def answers(value: object) -> Callable[[], object]:
    return lambda: value


def raises(error: BaseException) -> Callable[[], object]:
    def check() -> None:
        raise error

    return check


# ---- answers


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (None, UP),
        (True, UP),
        (False, DOWN),
        (DependencyState.DEGRADED, DependencyState.DEGRADED),
        ("ok", UNKNOWN),
    ],
)
async def test_a_checks_answer_becomes_its_state(answer: object, state: DependencyState) -> None:
    assert (await result_of(answers(answer))).state is state

    async def check() -> object:
        return answer

    assert (await result_of(check)).state is state
    assert (await result_of(functools.partial(check))).state is state
    assert (await result_of(lambda: check())).state is state  # noqa: PLW0108 - a plain function


async def test_a_result_tells_when_and_how_long_it_was_checked() -> None:
    before = datetime.now(UTC)
    result = await result_of(answers(True))
    assert result.check_time is not None
    assert before <= result.check_time <= datetime.now(UTC)
    assert result.latency_ms > 0
    assert result.message == ""


async def test_a_check_that_raises_is_down_with_its_reason() -> None:
    result = await result_of(raises(ConnectionError("no route")))
    assert (result.state, result.message) == (DOWN, "ConnectionError: no route")


async def test_an_error_without_a_text_is_named_by_its_type() -> None:
    assert (await result_of(raises(ConnectionError()))).message == "ConnectionError"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("postgresql://app:hunter2@db:5432/x refused", "hunter2"),
        ("amqp://:p@ss@host", "p@ss"),
        ("password=hunter2 host=db", "hunter2"),
        ("enrollment token fet_abcdefghijklmnop is spent", "fet_abc"),
    ],
)
async def test_an_errors_text_never_shows_a_secret(text: str, secret: str) -> None:
    message = (await result_of(raises(RuntimeError(text)))).message
    assert secret not in message
    assert "[redacted]" in message


async def test_a_long_message_is_cut_to_the_contracts_limit() -> None:
    assert len((await result_of(raises(RuntimeError("x" * 5_000)))).message) == 1_024


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), StopIteration("x")])
async def test_a_check_cannot_end_the_program(error: BaseException) -> None:
    def check() -> None:
        raise error

    async def async_check() -> None:
        raise error

    for raising in (check, async_check):
        result = await result_of(raising)
        assert result.state is DOWN
        assert type(error).__name__ in result.message or "StopIteration" in result.message


def test_a_dependency_is_unknown_before_its_first_check() -> None:
    checks = DependencyChecks()
    checks.register("db", lambda: True, required=False)
    assert checks.names() == ("db",)
    assert checks.status() == (
        DependencyResult("db", UNKNOWN, message="not checked yet", required=False),
    )


# ---- running


async def test_a_check_runs_again_and_again_until_stopped() -> None:
    runs = 0
    enough = asyncio.Event()

    async def check() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            enough.set()

    checks = DependencyChecks()
    checks.register("db", check, interval=QUICK)
    async with running(checks), asyncio.timeout(5):
        await enough.wait()


async def test_a_dependency_that_comes_back_is_up_again() -> None:
    alive = False
    checks = DependencyChecks()
    checks.register("db", lambda: alive, interval=QUICK)
    async with running(checks):
        await eventually(lambda: checks.status()[0].state is DOWN)
        alive = True
        await eventually(lambda: checks.status()[0].state is UP)


async def test_one_hanging_check_does_not_delay_another() -> None:
    released = threading.Event()
    checks = DependencyChecks()
    checks.register("slow", lambda: not released.wait(10), timeout=10)
    checks.register("quick", lambda: True)
    async with running(checks):
        await eventually(lambda: checks.status()[1].state is UP)
        assert checks.status()[0].state is UNKNOWN
        released.set()


async def test_a_hanging_plain_check_is_down_and_never_started_twice() -> None:
    released = threading.Event()
    starts = 0

    def check() -> None:
        nonlocal starts
        starts += 1
        released.wait(30)

    checks = DependencyChecks()
    checks.register("db", check, interval=QUICK, timeout=QUICK)
    times: set[datetime | None] = set()
    async with running(checks):

        def looked_at_five_times() -> bool:
            times.add(checks.status()[0].check_time)
            return len(times) > 5

        await eventually(looked_at_five_times)
        assert starts == 1
        assert checks.status()[0].state is DOWN
        assert checks.status()[0].message.startswith("no answer for")
        released.set()
        await eventually(lambda: starts > 1, describe="the check runs again once it has returned")


async def test_a_hanging_coroutine_is_cancelled_and_down() -> None:
    cancelled = asyncio.Event()

    async def check() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    checks = DependencyChecks()
    checks.register("db", check, timeout=QUICK)
    async with running(checks):
        await eventually(lambda: checks.status()[0].state is DOWN)
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_a_coroutine_that_will_not_be_cancelled_is_not_started_twice() -> None:
    released = asyncio.Event()
    starts = 0

    async def check() -> None:
        nonlocal starts
        starts += 1
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    checks = DependencyChecks()
    checks.register("db", check, interval=QUICK, timeout=QUICK)
    times: set[datetime | None] = set()
    async with running(checks):

        def looked_at_five_times() -> bool:
            times.add(checks.status()[0].check_time)
            return len(times) > 5

        await eventually(looked_at_five_times)
        assert starts == 1
        released.set()


async def test_stopping_does_not_wait_for_a_check_that_hangs_in_a_thread() -> None:
    released = threading.Event()
    started = threading.Event()

    def check() -> None:
        started.set()
        released.wait(30)

    checks = DependencyChecks()
    checks.register("db", check, timeout=20)
    async with asyncio.timeout(3), running(checks):
        await eventually(started.is_set)
    released.set()


async def test_checks_without_any_dependency_run_until_stopped() -> None:
    async with running(DependencyChecks()):
        pass


# ---- registration


@pytest.mark.parametrize("name", ["", "x" * 129, "a\0b", "a\nb"])
def test_a_name_outside_the_contract_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use 1 to 128"):
        DependencyChecks().register(name, lambda: True)


def test_a_name_is_registered_once() -> None:
    checks = DependencyChecks()
    checks.register("db", lambda: True)
    with pytest.raises(ValueError, match="choose another name"):
        checks.register("db", lambda: True)


def test_more_dependencies_than_the_contract_allows_are_refused() -> None:
    checks = DependencyChecks()
    for number in range(128):
        checks.register(f"d{number}", lambda: True)
    with pytest.raises(ValueError, match="at most 128"):
        checks.register("one more", lambda: True)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_an_interval_or_timeout_must_be_above_zero(seconds: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        DependencyChecks().register("db", lambda: True, interval=seconds)
    with pytest.raises(ValueError, match="timeout"):
        DependencyChecks().register("db", lambda: True, timeout=seconds)


def test_a_check_that_wants_an_argument_is_refused_when_it_is_registered() -> None:
    def check(connection: object) -> bool:
        return bool(connection)

    for wrong in (check, "not a function"):
        with pytest.raises(ValueError, match="a function without parameters"):
            DependencyChecks().register("db", wrong)  # type: ignore[arg-type]


async def test_a_registration_while_the_checks_run_is_refused() -> None:
    checks = DependencyChecks()
    checks.register("db", lambda: True)
    async with running(checks):
        await eventually(lambda: checks.status()[0].state is UP)
        with pytest.raises(RuntimeError, match="too late"):
            checks.register("cache", lambda: True)
    checks.register("cache", lambda: True)


# ---- ready-made checks


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def web() -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.removeprefix("/")))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_tcp_port_that_listens_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = await result_of(tcp("127.0.0.1", server.getsockname()[1]))
    assert result.state is UP


async def test_a_tcp_port_that_nobody_listens_on_is_down(free_port: int) -> None:
    result = await result_of(tcp("127.0.0.1", free_port))
    assert result.state is DOWN
    assert str(free_port) in result.message


@pytest.mark.parametrize(("status", "state"), [(200, UP), (204, UP), (404, DOWN), (503, DOWN)])
async def test_a_url_is_up_when_its_answer_is_no_error(
    web: str, status: int, state: DependencyState
) -> None:
    result = await result_of(http(f"{web}/{status}"))
    assert result.state is state
    assert result.message == (
        "" if state is UP else f"ConnectionError: answered with HTTP {status}"
    )


async def test_a_url_that_nobody_serves_is_down(free_port: int) -> None:
    assert (await result_of(http(f"http://127.0.0.1:{free_port}"))).state is DOWN


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/", "localhost:8080", "http://"])
def test_only_http_urls_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match="use http://"):
        http(url)


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="use 1 to 65535"):
        tcp("localhost", 0)
