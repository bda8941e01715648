"""Ends an admin's stream soon after the API key that opened it has ended.

A call is let in by a key that is good at that moment; one that goes on for hours is asked for it
again, as often as any call with that key would be. While the database cannot say, it goes on.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from federation_server.rpc.error_mapping import refusal
from federation_server.rpc.interruption import Interruptible
from federation_server.rpc.wrapping import Handler, WrappedOnce

RETRY_S = 1.0
"""When a key is asked for again that could not be."""

FIRST_LOOK_S = 1.0
"""When a stream's key is asked for first. Most streams have ended by then."""

PAUSE_S = 0.1
"""The least time between two times that it is asked for."""


class KeyWatch:
    """Stands over the handlers of streams. A method's handler is wrapped once and kept."""

    def __init__(self, still_good: Callable[[], Awaitable[float]]) -> None:
        """`still_good` tells for how many seconds the key of the call in whose context it runs is
        good, or raises why it is not.
        """
        self._still_good = still_good
        self._wrapped = WrappedOnce(self._wrap)

    def over(self, handler: Handler, method: str) -> Handler:
        """The handler, under watch. It takes one request and yields its responses."""
        return self._wrapped.of(handler, method)

    def _wrap(self, handler: Handler, method: str) -> Handler:
        behavior = handler.unary_stream
        if not inspect.isasyncgenfunction(behavior):
            raise TypeError(f"{method} is no generator, and cannot be ended with its key")
        return grpc.unary_stream_rpc_method_handler(
            self._watched(behavior, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _watched(
        self, behavior: Callable[..., Any], method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            stream = Interruptible()
            watches: list[asyncio.Task[None]] = []

            def begin() -> None:
                watches.append(asyncio.create_task(self._watch(stream, method)))

            timer = asyncio.get_running_loop().call_later(FIRST_LOOK_S, begin)
            try:
                async with aclosing(behavior(request, context)) as responses:
                    while True:
                        try:
                            response = await stream.wait(responses.__anext__)
                        except StopAsyncIteration:
                            return
                        yield response
            finally:
                timer.cancel()
                for watch in watches:
                    watch.cancel()

        return handle

    async def _watch(self, stream: Interruptible, method: str) -> None:
        while True:
            try:
                good_s = await self._still_good()
            except Exception as error:  # noqa: BLE001 - mapped and logged as a handler's would be
                refused = refusal(error, method)
                if refused.code is grpc.StatusCode.UNAUTHENTICATED:
                    stream.end(refused)
                    return
                good_s = RETRY_S
            await asyncio.sleep(max(good_s, PAUSE_S))
