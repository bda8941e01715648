"""Between protobuf's well-known types and Python's: times, spans, Structs and enums.

One converter each way. Messages of the contract have theirs in the `convert_*` modules beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from federation_server.domain.neuron import Json, JsonObject

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SAFE_INTEGER = 2**53

MessageT = TypeVar("MessageT", bound=Message)


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """A time as a Timestamp; None stays None, which leaves a field unset."""
    if time is None:
        return None
    span = time - _EPOCH
    return Timestamp(seconds=span.days * 86_400 + span.seconds, nanos=span.microseconds * 1_000)


def from_timestamp(time: Timestamp) -> datetime:
    """A checked Timestamp as a time, to the microsecond."""
    return _EPOCH + timedelta(seconds=time.seconds, microseconds=time.nanos // 1_000)


def to_duration(span: timedelta | float | None) -> Duration | None:
    """A span (a number is seconds) as a Duration; None stays None."""
    if span is None:
        return None
    if not isinstance(span, timedelta):
        span = timedelta(seconds=span)
    return Duration(seconds=span.days * 86_400 + span.seconds, nanos=span.microseconds * 1_000)


def from_duration(span: Duration) -> timedelta:
    """A checked Duration as a span, to the microsecond."""
    return timedelta(seconds=span.seconds, microseconds=span.nanos // 1_000)


def optional_time(message: Message, field: str) -> datetime | None:
    """The Timestamp in that field as a time; None where it is not set."""
    return from_timestamp(getattr(message, field)) if message.HasField(field) else None


def optional_span(message: Message, field: str) -> timedelta | None:
    """The Duration in that field as a span; None where it is not set."""
    return from_duration(getattr(message, field)) if message.HasField(field) else None


def from_struct(struct: Struct) -> JsonObject:
    """A checked Struct as a JSON object; whole numbers up to 2^53 become int."""
    return {key: _from_value(value) for key, value in struct.fields.items()}


def _from_value(value: Value) -> Json:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if number.is_integer() and abs(number) <= _MAX_SAFE_INTEGER:
                return int(number)
            return number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
        case _:
            return None


def to_struct(value: JsonObject | None) -> Struct | None:
    """A JSON object as a Struct; None stays None. Integers that no double holds become strings."""
    if value is None:
        return None
    return Struct(fields={key: _to_value(item) for key, item in value.items()})


def _to_value(value: Json) -> Value:
    match value:
        case None:
            return Value(null_value=0)  # type: ignore[arg-type]  # the stub wants the enum's type
        case bool():
            return Value(bool_value=value)
        case int() if abs(value) > _MAX_SAFE_INTEGER and not _is_double(value):
            return Value(string_value=str(value))
        case float() if not math.isfinite(value):
            return Value(string_value=str(value))
        case int() | float():
            return Value(number_value=value)
        case str():
            return Value(string_value=value)
        case Mapping():
            return Value(struct_value=to_struct(value))
        case _:
            return Value(list_value=ListValue(values=[_to_value(item) for item in value]))


def _is_double(value: int) -> bool:
    """Whether a large integer is what JSON makes of some double: 1e18 is stored as its digits."""
    return Decimal(repr(float(value))) == value
