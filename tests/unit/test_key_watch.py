"""A stream under watch: it ends with its key, and with nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from federation_server.rpc import errors, key_watch
from federation_server.rpc.key_watch import KeyWatch
from tests.support.waiting import eventually

METHOD = "/federation.v1.CommandService/WatchCommand"


class Key:
    """What is known of the key; looked at in no time, as long as it is good."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.looks = 0

    async def still_good(self) -> float:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        return 0.001


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Key:
    monkeypatch.setattr(key_watch, "RETRY_S", 0.001)
    monkeypatch.setattr(key_watch, "PAUSE_S", 0.001)
    monkeypatch.setattr(key_watch, "FIRST_LOOK_S", 0.0)
    return Key()


def watched(key: Key, behavior: Callable[..., AsyncIterator[Any]]) -> AsyncIterator[Any]:
    handler: Any = grpc.unary_stream_rpc_method_handler(behavior)
    wrapped: Any = KeyWatch(key.still_good).over(handler, METHOD)
    stream: AsyncIterator[Any] = wrapped.unary_stream(None, None)
    return stream


async def test_a_stream_that_waits_is_ended_with_its_key_and_its_handler_cleans_up(
    key: Key,
) -> None:
    cleaned = asyncio.Event()

    async def behavior(request: Any, context: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    stream = watched(key, behavior)
    assert await anext(stream) == 1
    key.fault = errors.credential_invalid()
    with pytest.raises(errors.Refused) as caught:
        async with asyncio.timeout(10):
            await anext(stream)
    assert caught.value.reason_name == "CREDENTIAL_INVALID"
    assert cleaned.is_set()


async def test_a_key_that_ends_while_a_response_is_written_ends_the_stream_after_it(
    key: Key,
) -> None:
    async def behavior(request: Any, context: Any) -> AsyncIterator[int]:
        while True:
            yield 1

    stream = watched(key, behavior)
    assert await anext(stream) == 1
    key.fault = errors.credential_expired()
    looks = key.looks
    await eventually(lambda: key.looks > looks)
    with pytest.raises(errors.Refused) as caught:
        await anext(stream)
    assert caught.value.reason_name == "CREDENTIAL_EXPIRED"


async def test_a_stream_outlives_looks_and_a_database_that_is_away(key: Key) -> None:
    go_on = asyncio.Event()

    async def behavior(request: Any, context: Any) -> AsyncIterator[int]:
        yield 1
        await go_on.wait()
        yield 2

    stream = watched(key, behavior)
    assert await anext(stream) == 1
    key.fault = errors.database_unavailable()
    after = key.looks + 3
    await eventually(lambda: key.looks >= after)
    go_on.set()
    assert [response async for response in stream] == [2]


async def test_nobody_looks_after_a_stream_that_is_over(key: Key) -> None:
    async def behavior(request: Any, context: Any) -> AsyncIterator[int]:
        yield 1

    assert [response async for response in watched(key, behavior)] == [1]
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.wait(tasks, timeout=10) if tasks else None
    assert len(asyncio.all_tasks()) == 1


async def test_a_handlers_own_timeout_is_not_taken_for_the_keys_end(key: Key) -> None:
    async def behavior(request: Any, context: Any) -> AsyncIterator[int]:
        yield 1
        raise TimeoutError("of its own")

    stream = watched(key, behavior)
    await anext(stream)
    with pytest.raises(TimeoutError, match="of its own"):
        await anext(stream)


def test_a_handler_that_could_not_be_ended_is_refused(key: Key) -> None:
    async def behavior(request: Any, context: Any) -> None:
        await context.write(1)

    with pytest.raises(TypeError, match="WatchCommand"):
        KeyWatch(key.still_good).over(grpc.unary_stream_rpc_method_handler(behavior), METHOD)
