"""Requests that nobody should send, made from the contract's descriptors.

A request begins as one that the server would take, so that it gets past the first check, and some
of its fields are then spoiled: with extreme numbers, text that means something elsewhere, sizes
around every limit, depth, times that are none. Its bytes on the wire may be spoiled as well.
Hypothesis draws all of it, so that a failure is made small and comes again with its seed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import NULL_VALUE, Struct, Value
from hypothesis import strategies as st

Known = Mapping[str, Sequence[str]]
"""By a field's name, texts that mean something there: ids that exist, filters that parse."""

HOSTILE = (
    "",
    "\0",
    "a\0b",
    "'; DROP TABLE neurons; --",
    '" OR ""="',
    "%s %(x)s {0} {neuron_id!r} ${HOME} $(id)",
    "../../../../etc/passwd",
    "\x1b[2J\x1b]52;c;Zm9v\x07",
    "\r\nHTTP/1.1 200 OK\r\n",
    "\u202egnirts\u202c\u2066",
    "\ud7ff\ue000\uffff\U0010ffff",
    "NaN",
    "-1",
    "00000000-0000-0000-0000-000000000000",
    "*",
    "[a-z]*(?=x)",
    "(" * 2000,
    "eyJhbGciOiJub25lIn0.e30.",
)
_FILTER_WORDS = (
    *("type", "presence", "state", "neuron_id", "labels.zone", "create_time", "nothing"),
    *("=", "!=", "<", ">=", ":", "AND", "OR", "NOT", "-", "(", ")", ",", "."),
    *('"x"', "'", '"', "ONLINE", "*", "1e999", "2026-11-21T00:00:00Z", "\\", "true", "a*b"),
)
_SIZES = (1, 63, 64, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4096, 16384, 65536, 1_100_000)
_SECONDS = (-(2**63), -62_135_596_801, -1, 0, 1, 253_402_300_799, 253_402_300_800, 2**63 - 1)
_NANOS = (-(2**31), -1, 0, 1, 999_999_999, 1_000_000_000, 2**31 - 1)
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 100.1, 5e-324, 1.8e308, -1.8e308, 2.0**53 + 1, 2.0**64)
_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_SURROGATE = b"\xed\xa0\x80"
"""A lone surrogate, as no UTF-8 has it."""


def wire(base: Message, known: Known) -> st.SearchStrategy[bytes]:
    """The bytes of a request, spoiled as a message, as bytes, or both."""

    @st.composite
    def spoiled(draw: st.DrawFn) -> bytes:
        message = type(base)()
        message.CopyFrom(base)
        for _ in range(draw(st.integers(0, 3))):
            _spoil(draw, message, known)
        data = message.SerializeToString()
        for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 4)))):
            data = _mutated(draw, data)
        return data

    return spoiled()


def _spoil(draw: st.DrawFn, message: Message, known: Known) -> None:
    """Spoils one field of the message, or of one within it."""
    if not message.DESCRIPTOR.fields:
        return
    fields: list[FieldDescriptor] = [*message.DESCRIPTOR.fields]
    field = draw(st.sampled_from(fields))
    kind = field.message_type
    if kind is not None and kind.file.package != "google.protobuf" and not _is_map(field):
        held = getattr(message, field.name)
        if field.is_repeated:
            if len(held) == 0 or draw(st.booleans()):
                for _ in range(draw(st.sampled_from((1, 1, 2, 300)))):
                    held.add()
            held = held[draw(st.integers(0, len(held) - 1))]
        else:
            held.SetInParent()
        _spoil(draw, held, known)
        return
    message.ClearField(field.name)
    if draw(st.integers(0, 9)):
        _fill(draw, message, field, known)


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, known: Known) -> None:
    if _is_map(field):
        held = getattr(message, field.name)
        assert field.message_type is not None
        value = field.message_type.fields_by_name["value"]
        for number in range(draw(st.sampled_from((1, 2, 17, 2000)))):
            held[draw(_texts("", known)) if number < 3 else f"k{number}"] = _value(
                draw, value, known
            )
    elif field.is_repeated:
        several = [_value(draw, field, known) for _ in range(draw(st.integers(1, 3)))]
        getattr(message, field.name).extend(several * draw(st.sampled_from((1, 1, 100))))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(_value(draw, field, known))
    else:
        setattr(message, field.name, _value(draw, field, known))


def _value(draw: st.DrawFn, field: FieldDescriptor, known: Known) -> Any:
    if field.cpp_type in _WHOLE:
        least, most = _WHOLE[field.cpp_type]
        ends = st.sampled_from((least, least + 1, -1 % (most + 1), 0, 1, 101, most - 1, most))
        return draw(ends | st.integers(least, most))
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return draw(st.sampled_from((*_DOUBLES, math.nan, math.inf, -math.inf)) | st.floats())
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw(st.booleans())
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            named = field.enum_type.values_by_number
            return draw(st.sampled_from((*named, -1, 77, 2**31 - 1, -(2**31))))
        case FieldDescriptor.CPPTYPE_STRING:
            return draw(_texts(field.name, known))
    assert field.message_type is not None
    made: Any = GetMessageClass(field.message_type)()
    match field.message_type.full_name:
        case "google.protobuf.Struct":
            _fill_struct(draw, made)
        case "google.protobuf.FieldMask":
            made.paths.extend(draw(st.lists(_texts("paths", known), min_size=1, max_size=4)))
        case _:  # a Timestamp or a Duration
            made.seconds = draw(st.sampled_from(_SECONDS) | st.integers(-(2**40), 2**40))
            made.nanos = draw(st.sampled_from(_NANOS))
    return made


def _texts(name: str, known: Known) -> st.SearchStrategy[str]:
    some = [
        st.sampled_from(HOSTILE),
        st.text(max_size=30),
        st.builds(str.__mul__, st.sampled_from("aü\0\U0001f600 "), st.sampled_from(_SIZES)),
    ]
    if name in known:
        some += [st.sampled_from(known[name])] * 2
    if name in {"filter", "order_by"}:
        some.append(st.lists(st.sampled_from(_FILTER_WORDS), max_size=12).map(" ".join))
        some.append(st.lists(st.sampled_from(_FILTER_WORDS), max_size=2000).map(" ".join))
    return st.one_of(some)


def _fill_struct(draw: st.DrawFn, made: Struct) -> None:
    for _ in range(draw(st.integers(0, 3))):
        at: Value = made.fields[draw(_texts("", {}))]
        for _ in range(draw(st.sampled_from((0, 0, 1, 5, 20, 29, 40)))):
            if draw(st.booleans()):
                at = at.list_value.values.add()
            else:
                at = at.struct_value.fields[draw(st.sampled_from(("a", "type", "$ref", "pattern")))]
        match draw(st.integers(0, 5)):
            case 0:
                at.number_value = draw(st.sampled_from((math.nan, math.inf, *_DOUBLES)))
            case 1:
                at.string_value = draw(_texts("", {}))
            case 2:
                at.null_value = NULL_VALUE
            case 3:
                at.list_value.SetInParent()
            case 4:
                at.bool_value = True
            case _:
                pass  # a Value of no kind, which JSON does not have


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Those bytes, changed at one place."""
    start = draw(st.integers(0, 2**16)) % (len(data) + 1)
    length = draw(st.sampled_from((1, 2, 4, 16, 200)))
    match draw(st.integers(0, 6)):
        case 0:  # a byte is another
            return data[:start] + draw(st.binary(min_size=1, max_size=4)) + data[start + 1 :]
        case 1:
            return data[:start] + data[start + length :]
        case 2:
            return data[:start] + data[start : start + length] * 3 + data[start + length :]
        case 3:
            return data[:start]
        case 4:
            return data[:start] + draw(st.binary(max_size=40)) + data[start:]
        case 5:
            return data[:start] + _SURROGATE + data[start + len(_SURROGATE) :]
        case _:  # a field that the contract does not have, of any wire type
            key = draw(st.integers(1, 2**29 - 1)) << 3 | draw(st.sampled_from((0, 1, 2, 3, 5, 7)))
            return data + varint(key) + draw(st.binary(max_size=12) | _doubles())


def _doubles() -> st.SearchStrategy[bytes]:
    return st.floats().map(lambda number: struct.pack("<d", number))


def varint(number: int) -> bytes:
    """A number as it is on the wire."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
