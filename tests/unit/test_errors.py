"""What clients are told: the error of each reason, and what handlers' exceptions become."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import psycopg
import pytest
import sqlalchemy.exc
import structlog
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from federation.v1 import errors_pb2
from federation_server.domain.filter import FilterError
from federation_server.domain.violation import Violation
from federation_server.live.session import SessionEnd
from federation_server.rpc import error_mapping, errors
from federation_server.rpc.error_mapping import ErrorMapping
from federation_server.rpc.errors import Refused, to_status
from federation_server.store.paging import PageTokenInvalid

ERRORS_PROTO = Path(__file__).parents[2] / "proto/federation/v1/errors.proto"

ALL: list[Refused] = [
    errors.invalid_field("name", "is required"),
    errors.too_large("metadata", "must be at most 65536 bytes encoded; it has 70000"),
    errors.credential_missing(),
    errors.credential_invalid(),
    errors.credential_expired(),
    errors.role_too_low("ADMIN"),
    errors.not_this_neuron("n-1"),
    errors.enrollment_refused(),
    errors.neuron_exists("n-1"),
    errors.neuron_not_found("n-1"),
    errors.neuron_deactivated("n-1"),
    errors.neuron_not_offline("n-1"),
    errors.neuron_pending("n-1"),
    errors.neuron_not_pending("n-1", "is active: deactivate it"),
    errors.session_superseded("n-1"),
    errors.protocol_violation("the first message must be a Hello"),
    errors.server_busy(2.5),
    errors.rate_limited("ADMIN_CALL_RATE", 2.5),
    errors.command_not_found("c-1"),
    errors.command_type_not_advertised("n-1", "run"),
    errors.command_ended("c", "FAILED"),
    errors.command_not_ended("c", "QUEUED"),
    errors.command_batch_not_found("b"),
    errors.no_neuron_matches(0),
    errors.request_id_reused("r-1"),
    errors.enrollment_token_not_found("t-1"),
    errors.api_key_not_found("ci"),
    errors.last_admin_key("admin"),
    errors.api_key_name_taken("ci"),
    errors.page_token_invalid(),
    errors.database_unavailable(),
    errors.server_draining(2.5),
    errors.internal("incident-1"),
    errors.conflict("n-1 was changed by somebody else"),
]


def detail(status: status_pb2.Status, kind: Any) -> Any:
    """The one detail of that kind; None if there is none."""
    found = [any_ for any_ in status.details if any_.Is(kind.DESCRIPTOR)]
    assert len(found) <= 1
    if not found:
        return None
    message = kind()
    found[0].Unpack(message)
    return message


def codes_in_the_contract() -> Iterator[tuple[str, str]]:
    """Each reason, and the gRPC code that its comment begins with."""
    text = ERRORS_PROTO.read_text()
    for match in re.finditer(r"((?:^  //.*\n)+)^  ERROR_REASON_(\w+) = [1-9]", text, re.MULTILINE):
        code = re.match(r"\s*// ([A-Z_]+)[:,]", match[1])
        assert code is not None, match[2]
        yield match[2], code[1]


def test_every_reason_of_the_contract_has_a_function_and_its_code() -> None:
    made = {refused.reason_name: refused.code.name for refused in ALL}
    assert made == dict(codes_in_the_contract())
    assert len(made) == len(errors_pb2.ErrorReason.keys()) - 1


@pytest.mark.parametrize("refused", ALL, ids=lambda r: r.reason_name)
def test_an_error_carries_the_details_that_the_contract_promises(refused: Refused) -> None:
    status = to_status(refused)
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("federation", refused.reason_name)
    assert status.code == refused.code.value[0]
    code = refused.code.name
    reports_fields = code == "INVALID_ARGUMENT" or refused.reason_name == "TOO_LARGE"
    assert (detail(status, error_details_pb2.BadRequest) is not None) is reports_fields
    precondition = detail(status, error_details_pb2.PreconditionFailure)
    assert (precondition is not None) is (code == "FAILED_PRECONDITION")
    if code == "UNAVAILABLE":
        assert detail(status, error_details_pb2.RetryInfo) is not None


@pytest.mark.parametrize("refused", ALL, ids=lambda r: r.reason_name)
def test_a_message_is_one_sentence_that_begins_small_and_has_no_full_stop(refused: Refused) -> None:
    assert refused.message[0].islower()
    assert not refused.message.endswith(".")
    assert "\n" not in refused.message


def test_ids_are_metadata() -> None:
    info = detail(to_status(errors.neuron_not_found("n-1")), error_details_pb2.ErrorInfo)
    assert dict(info.metadata) == {"neuron_id": "n-1"}


def test_the_database_s_absence_asks_for_a_second_of_patience() -> None:
    retry = detail(to_status(errors.database_unavailable()), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1000


def test_a_superseded_stream_is_asked_to_stay_away_for_a_minute() -> None:
    retry = detail(to_status(errors.session_superseded()), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToSeconds() >= 60


@pytest.mark.parametrize("end", SessionEnd)
def test_every_end_of_a_session_has_an_error(end: SessionEnd) -> None:
    assert errors.session_ended(end, "a second Hello").reason


def test_every_violation_is_in_the_details_as_long_as_it_fits_a_trailer() -> None:
    some = [Violation(f"points[{i}].name", "is required") for i in range(50)]
    request = detail(to_status(errors.invalid_fields(some)), error_details_pb2.BadRequest)
    assert [v.field for v in request.field_violations] == [v.field for v in some]


def test_details_stay_below_what_every_client_takes_and_say_what_they_leave_out() -> None:
    many = [Violation(f"points[{i}]." + "x" * 400, "ä" * 300) for i in range(100)]
    status = to_status(errors.invalid_fields(many))
    on_the_wire = len(status.SerializeToString()) * 4 / 3 + len(status.message) * 3
    assert on_the_wire < 8 * 1024
    shown = detail(status, error_details_pb2.BadRequest).field_violations
    info = detail(status, error_details_pb2.ErrorInfo)
    assert shown
    assert int(info.metadata["omitted_violations"]) == 100 - len(shown)


@pytest.mark.parametrize(
    "make",
    [
        errors.neuron_exists,
        errors.request_id_reused,
        errors.conflict,
        errors.protocol_violation,
        lambda text: errors.command_type_not_advertised(text, text),
    ],
)
def test_a_long_id_does_not_make_a_long_error(make: Callable[[str], Refused]) -> None:
    assert to_status(make("ä" * 100_000)).ByteSize() < 4 * 1024


# -- over gRPC -----------------------------------------------------------------------------

Behavior = Callable[..., Any]


KINDS = ("UnaryUnary", "StreamUnary", "UnaryStream", "StreamStream")


def _handlers(behavior: Behavior) -> dict[str, Any]:
    """The behavior as a handler of each kind of RPC; it is a coroutine, or a generator."""
    makers = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler,
        "StreamUnary": grpc.stream_unary_rpc_method_handler,
        "UnaryStream": grpc.unary_stream_rpc_method_handler,
        "StreamStream": grpc.stream_stream_rpc_method_handler,
    }
    coders: dict[str, Any] = {
        "request_deserializer": Struct.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    return {name: make(behavior, **coders) for name, make in makers.items()}


@asynccontextmanager
async def serving(
    behavior: Behavior, *interceptors: grpc.aio.ServerInterceptor
) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ErrorMapping(), *interceptors])
    handler = grpc.method_handlers_generic_handler("federation.Test", _handlers(behavior))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


def call(channel: grpc.aio.Channel, kind: str, request: bytes = b"") -> Any:
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
    make: Any = getattr(channel, name)(f"/federation.Test/{kind}")
    # A stream's caller writes when it likes: one that is still sending when the server ends the
    # call may see an error of its own sending in place of the server's.
    return make() if kind.startswith("Stream") else make(request)


async def outcome(channel: grpc.aio.Channel, kind: str, request: bytes = b"") -> Any:
    """The rich status that a call ends with."""
    started = call(channel, kind, request)
    return await ended(started.read() if kind.endswith("Stream") else started)


async def ended(answer: Awaitable[Any]) -> Any:
    """The rich status in place of an answer."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    error = caught.value
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            return status
    raise AssertionError(f"{error.code()}: {error.details()} has no details")


def raising(error: BaseException) -> Behavior:
    async def behavior(request: object, context: object) -> StringValue:
        raise error

    return behavior


def raising_after_a_response(error: BaseException) -> Behavior:
    async def behavior(request: object, context: object) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        raise error

    return behavior


def reason(status: status_pb2.Status) -> str:
    name: str = detail(status, error_details_pb2.ErrorInfo).reason
    return name


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_of_any_kind_ends_its_rpc_by_raising(kind: str) -> None:
    async with serving(raising(errors.neuron_not_found("n-1"))) as channel:
        status = await outcome(channel, kind)
    assert (status.code, reason(status)) == (5, "NEURON_NOT_FOUND")


@pytest.mark.parametrize("kind", ["UnaryStream", "StreamStream"])
async def test_a_generator_may_raise_after_its_responses(kind: str) -> None:
    async with serving(raising_after_a_response(errors.conflict("it was changed"))) as channel:
        started = call(channel, kind)
        assert StringValue.FromString(await started.read()).value == "first"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await started.read()
    assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_grpc_s_own_reader_of_rich_statuses_understands_it() -> None:
    behavior = raising(errors.invalid_field("filter", "is not one"))
    async with serving(behavior) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "UnaryUnary")
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("filter", "is not one")


def _sql(kind: type[sqlalchemy.exc.DBAPIError], *, invalidated: bool = False) -> Exception:
    cause = psycopg.OperationalError("server closed the connection")
    return kind("SELECT secret", {}, cause, connection_invalidated=invalidated)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (psycopg.OperationalError("no"), 14, "DATABASE_UNAVAILABLE"),
        (psycopg.InterfaceError("the connection is closed"), 14, "DATABASE_UNAVAILABLE"),
        (psycopg.errors.AdminShutdown("no"), 14, "DATABASE_UNAVAILABLE"),
        (_sql(sqlalchemy.exc.OperationalError), 14, "DATABASE_UNAVAILABLE"),
        (psycopg.errors.DiskFull("no"), 14, "DATABASE_UNAVAILABLE"),
        (_sql(sqlalchemy.exc.InterfaceError), 14, "DATABASE_UNAVAILABLE"),
        (_sql(sqlalchemy.exc.DBAPIError, invalidated=True), 14, "DATABASE_UNAVAILABLE"),
        (sqlalchemy.exc.TimeoutError("pool"), 14, "DATABASE_UNAVAILABLE"),
        (_sql(sqlalchemy.exc.ProgrammingError), 13, "INTERNAL"),
        (psycopg.errors.UniqueViolation("key"), 13, "INTERNAL"),
        (FilterError("unknown field 'typ'", 1), 3, "INVALID_FIELD"),
        (PageTokenInvalid("the page_token is damaged"), 3, "PAGE_TOKEN_INVALID"),
        (KeyError("x"), 13, "INTERNAL"),
        (TimeoutError(), 13, "INTERNAL"),
        (ExceptionGroup("g", [KeyError("x"), errors.credential_invalid()]), 16,
         "CREDENTIAL_INVALID"),
        (ExceptionGroup("g", [ExceptionGroup("h", [psycopg.OperationalError("no")])]), 14,
         "DATABASE_UNAVAILABLE"),
        (ExceptionGroup("g", [KeyError("x"), psycopg.OperationalError("no")]), 13, "INTERNAL"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
async def test_what_a_handler_raises_becomes_its_reason(
    error: Exception, code: int, expected: str
) -> None:
    async with serving(raising(error)) as channel:
        status = await outcome(channel, "UnaryUnary")
    assert (status.code, reason(status)) == (code, expected)


async def test_a_bad_filter_is_a_violation_of_the_field_filter() -> None:
    async with serving(raising(FilterError("unknown field 'typ'", 1))) as channel:
        status = await outcome(channel, "UnaryUnary")
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field == "filter"
    assert "unknown field 'typ'" in violation.description


async def test_an_unknown_fault_shows_an_incident_id_and_the_log_has_its_cause() -> None:
    with capture_logs() as logs:
        async with serving(raising(RuntimeError("password=hunter2"))) as channel:
            status = await outcome(channel, "UnaryUnary")
    info = detail(status, error_details_pb2.ErrorInfo)
    incident_id = info.metadata["incident_id"]
    assert incident_id in status.message
    assert b"hunter2" not in status.SerializeToString()
    (entry,) = [entry for entry in logs if entry.get("incident_id") == incident_id]
    assert entry["log_level"] == "error"
    assert "hunter2" in str(entry["exc_info"])
    assert entry["exc_info"].__traceback__ is not None


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (errors.neuron_not_found("n"), "info"),
        (errors.server_draining(), "warning"),
        (psycopg.OperationalError("no"), "warning"),
        (errors.internal("i"), "error"),
    ],
)
def test_the_log_is_as_loud_as_the_fault_is_ours(error: Exception, level: str) -> None:
    with capture_logs() as logs:
        error_mapping.refusal(error, "/federation.Test/UnaryUnary")
    (entry,) = logs
    assert (entry["action"], entry["log_level"]) == ("rpc_refused", level)


def test_the_log_line_can_be_rendered() -> None:
    # `message` or `event` among the fields would collide with the line's own.
    logger = structlog.wrap_logger(
        structlog.PrintLogger(), processors=[structlog.processors.JSONRenderer()]
    )
    for refused in ALL:
        with capture_logs() as logs:
            error_mapping.refusal(refused)
        fields = {k: v for k, v in logs[0].items() if k != "event"}
        logger.info(logs[0]["event"], **fields)


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
async def test_a_request_that_cannot_be_decoded_is_an_invalid_argument(kind: str) -> None:
    async def behavior(request: object, context: object) -> StringValue:
        raise AssertionError("reached")

    async with serving(behavior) as channel:
        status = await outcome(channel, kind, b"\xff\xff")
    assert (status.code, reason(status)) == (3, "INVALID_FIELD")


async def test_a_struct_that_is_nested_200_deep_is_an_invalid_argument() -> None:
    value, struct = b"\x1a\x01x", b""
    for _ in range(200):
        entry = b"\x0a\x01a\x12" + _length(value) + value
        struct = b"\x0a" + _length(entry) + entry
        value = b"\x2a" + _length(struct) + struct

    async def behavior(request: object, context: object) -> StringValue:
        raise AssertionError("reached")

    async with serving(behavior) as channel:
        status = await outcome(channel, "UnaryUnary", struct)
    assert (status.code, reason(status)) == (3, "INVALID_FIELD")


def _length(data: bytes) -> bytes:
    number, encoded = len(data), b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


async def test_on_a_stream_an_undecodable_message_reaches_the_handler_and_ends_it_cleanly() -> None:
    async def behavior(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.read()

    async with serving(behavior) as channel:
        started = call(channel, "StreamStream")
        await started.write(b"\xff\xff")
        status = await ended(started.read())
    assert (status.code, reason(status)) == (3, "INVALID_FIELD")


async def test_a_handler_s_own_abort_is_left_alone() -> None:
    async def behavior(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "mine")

    async with serving(behavior) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "UnaryUnary")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "mine")


async def test_a_handler_that_answers_is_left_alone() -> None:
    async def behavior(request: Struct, context: object) -> StringValue:
        return StringValue(value="fine")

    async with serving(behavior) as channel:
        assert StringValue.FromString(await call(channel, "UnaryUnary")).value == "fine"


async def test_a_refusal_of_an_rpc_that_has_an_end_already_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when its connection breaks while the first one is sent."""

    async def behavior(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with suppress(grpc.aio.AbortError):
            await context.abort(grpc.StatusCode.DATA_LOSS, "mine")
        raise errors.credential_missing()

    async with serving(behavior) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "UnaryUnary")
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert caplog.records == []


async def test_a_caller_that_leaves_cancels_the_handler_and_is_no_fault() -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def behavior(request: object, context: object) -> StringValue:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("woken")

    with capture_logs() as logs:
        async with serving(behavior) as channel:
            started = call(channel, "UnaryUnary")
            await asyncio.wait_for(entered.wait(), 10)
            started.cancel()
            await asyncio.wait_for(cancelled.wait(), 10)
    assert logs == []


class _Unanswered:
    """A context that must not be answered."""

    def __init__(self) -> None:
        self.ends: list[grpc.StatusCode] = []

    async def abort(self, code: grpc.StatusCode, *_: object) -> None:
        self.ends.append(code)


async def test_nothing_is_sent_to_a_caller_that_left_as_soon_as_it_had_called() -> None:
    """What is sent on a call that is over is never freed by grpc."""
    context = _Unanswered()
    refused = errors.credential_missing()
    ending = asyncio.create_task(error_mapping.abort(cast("Any", context), refused))
    await asyncio.sleep(0)  # it has begun
    ending.cancel()  # as grpc does once it has seen the reset
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert context.ends == []


class _Refusing(grpc.aio.ServerInterceptor):
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        raise errors.credential_missing()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_interceptor_behind_may_refuse_a_call_of_any_kind(kind: str) -> None:
    async with serving(raising(AssertionError("reached")), _Refusing()) as channel:
        status = await outcome(channel, kind)
    assert reason(status) == "CREDENTIAL_MISSING"


class _Failing(grpc.aio.ServerInterceptor):
    """Has a fault of its own."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        raise RuntimeError("password=hunter2")


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *((kind, where) for kind in KINDS for where in ("handler", "interceptor")),
        *((kind, "generator") for kind in KINDS if kind.endswith("Stream")),
    ],
)
async def test_wherever_a_fault_is_nobody_is_told_more_than_an_incident(
    kind: str, where: str
) -> None:
    fault = RuntimeError("password=hunter2")
    behavior = raising_after_a_response(fault) if where == "generator" else raising(fault)
    async with serving(behavior, *([_Failing()] if where == "interceptor" else [])) as channel:
        started = call(channel, kind)
        if where == "generator":
            await started.read()
        status = await ended(started.read() if kind.endswith("Stream") else started)
    assert reason(status) == "INTERNAL"
    assert b"hunter2" not in status.SerializeToString()


async def test_a_handler_that_runs_in_a_thread_is_answered_for_as_well() -> None:
    def failing(request: object, context: object) -> StringValue:
        raise RuntimeError("password=hunter2")

    async with serving(failing) as channel:
        status = await outcome(channel, "UnaryUnary")
        undecodable = await outcome(channel, "UnaryUnary", b"\xff\xff")
    assert reason(status) == "INTERNAL"
    assert b"hunter2" not in status.SerializeToString()
    assert reason(undecodable) == "INVALID_FIELD"


async def test_an_unknown_method_stays_unimplemented() -> None:
    async with serving(raising(AssertionError("reached"))) as channel:
        nowhere: Any = channel.unary_unary("/federation.Test/Nowhere")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nowhere(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
