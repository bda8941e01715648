"""How long a client may take: to send the request that it has announced, to read an answer.

grpc waits for either for as long as the connection lives, and a client that answers pings keeps it
alive for ever. Each such call holds memory, and anybody can make it, since a call is begun before
it is known who calls. So here every call is read and written as a stream, which it is on the wire:
that way what is waited for can be given up. `live/silence.py` does the same for neurons' streams.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from federation_server.live.metrics import Metrics
from federation_server.rpc import errors
from federation_server.rpc.error_mapping import abort, refusal
from federation_server.rpc.interruption import Interruptible
from federation_server.rpc.wrapping import Handler, WrappedOnce

REQUEST_TIMEOUT_S = 10.0
"""How long the one message of a call may take to come."""

READ_TIMEOUT_S = 60.0
"""How long a client may take to read one message of an answer."""

LOOK_INTERVAL_S = 1.0
"""How often it is looked who takes too long."""

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Deadlines(grpc.aio.ServerInterceptor):
    """Stands before all other interceptors. A method's handler is wrapped once and kept."""

    def __init__(self, metrics: Metrics) -> None:
        """Nothing is wrapped yet."""
        self._wrapped = WrappedOnce(self._wrap)
        self._unsent = metrics.streams_given_up.labels(cause="unsent")
        self._unread = metrics.streams_given_up.labels(cause="unread")
        self._calls: set[_Call] = set()
        self._looking = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler, wrapped, unless its client streams: such a one reads by itself."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        return self._wrapped.of(handler, method)

    def _wrap(self, handler: Handler, method: str) -> Handler:
        behavior: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        decode: Any = handler.request_deserializer
        if decode is None:
            return handler
        if inspect.isasyncgenfunction(behavior):
            answers: Callable[..., AsyncGenerator[Any, None]] = behavior
        elif inspect.iscoroutinefunction(behavior) and not handler.response_streaming:
            answers = _one(behavior)
        else:
            return handler  # not of this server's making: channelz, Health.Watch

        async def handle(_: object, context: Context) -> None:
            call = self._begin()
            try:
                request = decode(await self._request(call, context))
                async with aclosing(answers(request, context)) as all_answers:
                    async for answer in all_answers:
                        await self._write(call, context, answer)
            except errors.Refused as refused:
                await abort(context, refusal(refused, method))
            finally:
                self._calls.discard(call)

        return grpc.stream_stream_rpc_method_handler(
            handle, response_serializer=handler.response_serializer
        )

    def _begin(self) -> _Call:
        call = _Call()
        self._calls.add(call)
        if not self._looking:
            self._look_again()
        return call

    def _look_again(self) -> None:
        self._looking = True
        asyncio.get_running_loop().call_later(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        """Ends the calls whose client takes too long; again and again, while there are any."""
        self._looking = False
        for call in [call for call in self._calls if call.deadline <= call.loop.time()]:
            call.end(TimeoutError())
        if self._calls:
            self._look_again()

    async def _request(self, call: _Call, context: Context) -> bytes:
        message: object = None
        with suppress(TimeoutError):
            message = await call.within(REQUEST_TIMEOUT_S, context.read)
        if isinstance(message, bytes):
            return message
        self._unsent.inc()
        raise errors.protocol_violation(f"no request came within {REQUEST_TIMEOUT_S:g} s")

    async def _write(self, call: _Call, context: Context, answer: Any) -> None:
        try:
            await call.within(READ_TIMEOUT_S, lambda: context.write(answer))
        except TimeoutError:
            self._unread.inc()
            words = f"the answer was not read for {READ_TIMEOUT_S:g} s"
            raise errors.protocol_violation(words) from None


class _Call(Interruptible):
    """A call that is being served."""

    __slots__ = ("deadline", "loop")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.deadline = math.inf
        """By the loop's clock: until when the client must have done what is waited for."""

    async def within(self, limit_s: float, begin: Callable[[], Awaitable[T]]) -> T:
        """Waits for what `begin` gives, which takes the client's help.

        Raises:
            TimeoutError: it took longer, by up to LOOK_INTERVAL_S more.
        """
        self.deadline = self.loop.time() + limit_s
        try:
            return await self.wait(begin)
        finally:
            self.deadline = math.inf


def _one(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., AsyncGenerator[Any, None]]:
    async def answers(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        answer = await behavior(request, context)
        if answer is not None:  # as from channelz, which then has set a code
            yield answer

    return answers
