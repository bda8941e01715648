"""From whatever a handler raises to what its client is told: the one table, and the interceptor
that applies it to every RPC, also of grpc's own services: these are open to strangers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc.aio
import psycopg
import structlog
from google.protobuf.message import DecodeError
from sqlalchemy import exc as sql

from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.filter import FilterError
from federation_server.rpc import errors
from federation_server.rpc.errors import Refused
from federation_server.rpc.wrapping import Handler, WrappedOnce
from federation_server.store.database import first_line
from federation_server.store.paging import PageTokenInvalid

log = structlog.get_logger(__name__)

LAST_WORDS_S = 5.0
"""How long the end of an RPC waits for its client to take it."""

GONE_S = 0.002
"""How long an RPC that is to end with an error waits to hear whether its client has gone, for which
grpc cancels its task. grpc never frees what is sent on a call that is over
(https://github.com/grpc/grpc/issues/43360): whoever reset each call right after it began made the
server grow without end.
"""


def _database_fails(error: Exception) -> Refused:
    if isinstance(getattr(error, "orig", error), psycopg.errors.DiskFull):
        return errors.database_full()
    return errors.database_unavailable()


_TABLE: tuple[tuple[tuple[type[Exception], ...], Callable[[Exception], Refused], int], ...] = (
    # What is raised, what the client is told, and how loud the log is about it.
    (
        (DecodeError,),
        lambda _: errors.invalid_field(
            "", "cannot be decoded: see that it is of the right type, and nested 100 deep at most"
        ),
        logging.INFO,
    ),
    ((FilterError,), lambda error: errors.invalid_field("filter", str(error)), logging.INFO),
    ((PageTokenInvalid,), lambda _: errors.page_token_invalid(), logging.INFO),
    (
        # A driver's OperationalError is also a pool that is exhausted, a statement that took too
        # long, a deadlock: each is over, and the same call may succeed.
        (
            psycopg.OperationalError,
            psycopg.InterfaceError,
            sql.OperationalError,
            sql.InterfaceError,
            sql.TimeoutError,
        ),
        _database_fails,
        logging.WARNING,
    ),
)

_LEVELS = {
    grpc.StatusCode.INTERNAL: logging.ERROR,
    grpc.StatusCode.UNAVAILABLE: logging.WARNING,
}
"""How loud the log is about a Refused; INFO for the codes that are not here."""

_QUIET = frozenset(
    {
        ErrorReason.ERROR_REASON_SERVER_BUSY,
        ErrorReason.ERROR_REASON_RATE_LIMITED,
        ErrorReason.ERROR_REASON_CREDENTIAL_MISSING,
    }
)
"""Thousands may be refused like that in a second; `live/admission.py`, `live/rates.py` and the
audit log sum them up."""


def refusal(error: Exception, method: str = "") -> Refused:
    """What the client is told of an error; the log is told here."""
    if isinstance(error, ExceptionGroup):
        error = _gist(error)
    if isinstance(error, Refused):
        level = _LEVELS.get(error.code, logging.INFO)
        _log(error, error, logging.DEBUG if error.reason in _QUIET else level, method)
        return error
    for kinds, make, level in _TABLE:
        if isinstance(error, kinds):
            refused = make(error)
            _log(refused, error, level, method)
            return refused
    if isinstance(error, sql.DBAPIError) and error.connection_invalidated:
        refused = errors.database_unavailable()
        _log(refused, error, logging.WARNING, method)
        return refused
    incident_id = str(uuid.uuid4())
    log.error(
        "RPC failed",
        action="rpc_failed",
        method=method,
        incident_id=incident_id,
        exc_info=error,
    )
    return errors.internal(incident_id)


def _gist(group: ExceptionGroup[Exception]) -> Exception:
    """The error that a task group's errors come down to: what a handler raised on purpose, else
    the only one, else the group.
    """
    leaves = list(_leaves(group))
    for leaf in leaves:
        if isinstance(leaf, Refused):
            return leaf
    return leaves[0] if len(leaves) == 1 else group


def _leaves(group: ExceptionGroup[Exception]) -> list[Exception]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, ExceptionGroup) else [error])
    ]


def _log(refused: Refused, error: Exception, level: int, method: str) -> None:
    cause: dict[str, str] = {}
    if error is not refused:
        cause = {"cause": type(error).__name__, "detail": first_line(error)}
    elif error.__cause__ is not None:
        cause = {"cause": type(error.__cause__).__name__}
    log.log(
        level,
        "RPC refused",
        action="rpc_refused",
        method=method,
        code=refused.code.name,
        reason=refused.reason_name,
        message=refused.message,
        **refused.metadata,
        **cause,
    )


async def abort(context: grpc.aio.ServicerContext[Any, Any], refused: Refused) -> None:
    """Ends the RPC with that error. Never returns: grpc raises its AbortError."""
    await asyncio.sleep(GONE_S)
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await context.abort(refused.code, refused.message, errors.trailers(refused))
    except TimeoutError:
        # It stands behind what its client does not read, and comes when that is read.
        raise asyncio.CancelledError from None
    except (grpc.aio.InternalError, grpc.aio.UsageError):
        # The connection broke before this could be said: the caller has gone, which is what grpc
        # cancels a handler for. It keeps no second status in any case.
        raise asyncio.CancelledError from None


class Witness(Protocol):
    """Who is told of the calls (`rpc/audit.py`)."""

    def begins(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """A handler begins, in this task."""

    def refused(
        self,
        method: str,
        context: grpc.aio.ServicerContext[Any, Any],
        refused: Refused,
        request: object = None,
    ) -> None:
        """A call ends with that error."""


class Nobody:
    """A witness who looks away."""

    def begins(self, *_: object) -> None:
        """Nothing."""

    def refused(self, *_: object) -> None:
        """Nothing."""


class ErrorMapping(grpc.aio.ServerInterceptor):
    """Stands before all other interceptors, and ends each RPC as its handler, or an interceptor
    behind this one, said by an exception.

    A method's handler is wrapped once and kept. On a stream nothing is added to a message that a
    handler reads or writes itself, and one resumed generator to each that it yields.
    """

    def __init__(self, witness: Witness | None = None) -> None:
        """Nothing is wrapped yet; the witness is told of each call."""
        seen_by = witness or Nobody()
        self._wrapped = WrappedOnce(lambda handler, method: _wrap(handler, method, seen_by))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler, wrapped."""
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except Exception as error:  # noqa: BLE001 - mapped, and logged, as a handler's would be
            refused = refusal(error, method)
            return refusing(lambda _: refused)
        if handler is None:  # no such RPC: grpc answers UNIMPLEMENTED
            return None
        return self._wrapped.of(handler, method)


def refusing(
    answer: Callable[[grpc.aio.ServicerContext[Any, Any]], Refused], *, heard_s: float = 0.0
) -> Handler:
    """A handler that ends an RPC of any kind with the error that a function of its context gives,
    and decodes nothing of it.

    It waits up to `heard_s` for the first message: a client of grpc.aio that is still writing one
    when its call ends says INTERNAL and loses the error, and with it RetryInfo.
    """

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        refused = answer(context)
        if heard_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(heard_s):
                    await context.read()
        await abort(context, refused)

    return grpc.stream_stream_rpc_method_handler(refuse)


class _Undecodable:
    """In the place of a request that could not be decoded."""

    __slots__ = ("error",)

    def __init__(self, error: DecodeError) -> None:
        self.error = error


def _wrap(handler: Handler, method: str, witness: Witness) -> Handler:
    kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
        "stream" if handler.response_streaming else "unary"
    )
    behavior = getattr(handler, kind)
    wrap: Callable[[Any, str, Witness], Callable[..., Any]]
    if inspect.isasyncgenfunction(behavior):
        wrap = _wrap_generator
    else:
        wrap = _wrap_coroutine if inspect.iscoroutinefunction(behavior) else _wrap_function
    decode = handler.request_deserializer
    if not handler.request_streaming and decode is not None:
        # grpc would answer UNKNOWN with the exception's text. A stream's handler gets the
        # exception out of read(), as any other.
        decode = _decoding(decode)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    wrapped: Handler = make(
        wrap(behavior, method, witness),
        request_deserializer=decode,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _decoding(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decoding(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Undecodable(error)

    return decoding


def _wrap_function(behavior: Callable[..., Any], method: str, _: Witness) -> Callable[..., Any]:
    """For a handler that grpc runs in a thread, as those of channelz: they change nothing."""

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            if isinstance(request, _Undecodable):
                raise request.error
            return behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except NotImplementedError:  # Health.List
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "not implemented")
        except Exception as error:  # noqa: BLE001 - as below
            refused = refusal(error, method)
            context.set_trailing_metadata(errors.trailers(refused))
            context.abort(refused.code, refused.message)

    return handle


def _wrap_coroutine(
    behavior: Callable[..., Awaitable[Any]], method: str, witness: Witness
) -> Callable[..., Any]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        witness.begins(method, context)
        try:
            if isinstance(request, _Undecodable):
                raise request.error
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise  # the handler has ended the RPC itself
        except Exception as error:  # noqa: BLE001 - CancelledError is none, and passes
            refused = refusal(error, method)
            witness.refused(method, context, refused, request)
            await abort(context, refused)

    return handle


def _wrap_generator(
    behavior: Callable[..., AsyncIterator[Any]], method: str, witness: Witness
) -> Callable[..., AsyncIterator[Any]]:
    async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        witness.begins(method, context)
        try:
            if isinstance(request, _Undecodable):
                raise request.error
            async for response in behavior(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            refused = refusal(error, method)
            witness.refused(method, context, refused, request)
            await abort(context, refused)

    return handle
