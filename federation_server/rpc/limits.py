"""The check that a message keeps the limits of the contract.

`limit_table.LIMITS` says what they are. The walk over a message type is put together at its first
use, from closures; a full heartbeat then costs some ten microseconds. Servicers call `check`, the
stream calls `violations` and answers with a Refusal.

Limits that depend on the clock or on what is stored ("at most 366 days ahead", "after now") are
the servicers' own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from federation_server.domain.violation import Violation
from federation_server.rpc import errors
from federation_server.rpc.findings import Check, EnoughViolations, Findings, Path
from federation_server.rpc.limit_table import LIMITS
from federation_server.rpc.limit_values import Kind, Numeric, Text, Walk, plain_texts, same_bounds

_MAX_UINT32 = 2**32 - 1


def check(message: Message, prefix: str = "") -> None:
    """Lets a message pass that keeps all limits. Paths begin with the field `prefix`.

    Raises:
        errors.Refused: INVALID_FIELD, or TOO_LARGE if all that is wrong is about size; with a
            violation for every bad field.
    """
    found = violations(message, prefix)
    if found:
        raise errors.invalid_fields(found)


def order(order_by: str, orders: Collection[str]) -> str:
    """What a list is to be ordered by: one of `orders`, or empty for its own order.

    Raises:
        errors.Refused: INVALID_FIELD.
    """
    asked = " ".join(order_by.split())
    if asked and asked not in orders:
        words = f"must be one of {', '.join(orders)}"
        raise errors.invalid_fields([Violation("order_by", words)])
    return asked


def violations(message: Message, prefix: str = "") -> list[Violation]:
    """What is wrong with a message, at most 100 violations; empty if nothing is."""
    found = Findings(prefix)
    try:  # not suppress(): it costs more than some messages
        _WALKS[type(message)].whole(message, None, found)
    except EnoughViolations:
        return found.violations
    return found.violations


class _Walks(dict[type[Message], Walk]):
    """How each message type is checked, put together when it is first asked for."""

    def __missing__(self, message_type: type[Message]) -> Walk:
        walk = self[message_type] = _walk_over(message_type)
        return walk


_WALKS = _Walks()


def _walk_over(message_type: type[Message]) -> Walk:
    """Raises KeyError for a message type that the table does not name."""
    limits, descriptor = LIMITS[message_type], message_type.DESCRIPTOR
    fields = {
        name: kind.check(name, partial(_walk_inside, descriptor.fields_by_name[name]))
        for name, kind in limits.kinds.items()
    }
    alone, checks = dict(limits.kinds), list(limits.rules)
    if limits.one_of is not None:
        checks.insert(0, limits.one_of.check(fields))
        for member in descriptor.oneofs_by_name[limits.one_of.name].fields:
            del alone[member.name]
    whole = _in_turn([*_checks(alone, fields, descriptor), *checks], limits.max_bytes)
    return Walk(whole, fields)


def _walk_inside(field: Any) -> Walk:
    return _WALKS[GetMessageClass(field.message_type)]


def _checks(
    kinds: Mapping[str, Kind], fields: Mapping[str, Check], descriptor: Any
) -> Iterator[Check]:
    """What a whole message is checked by: numbers with the same bounds together, plain texts
    together, then all else.
    """
    numbers: dict[Numeric, list[str]] = {}
    texts: dict[str, Text] = {}
    others: list[Check] = []
    for name, kind in kinds.items():
        if isinstance(kind, Numeric):
            if not _always_fits(kind, descriptor.fields_by_name[name]):
                numbers.setdefault(kind, []).append(name)
        elif isinstance(kind, Text) and kind.plain:
            texts[name] = kind
        else:
            others.append(fields[name])
    for kind, names in numbers.items():
        yield same_bounds(kind, names) if len(names) > 1 else fields[names[0]]
    if texts:
        yield plain_texts(texts)
    yield from others


def _always_fits(kind: Numeric, field: Any) -> bool:
    unsigned = field.cpp_type == FieldDescriptor.CPPTYPE_UINT32
    return unsigned and kind.low <= 0 and kind.high >= _MAX_UINT32


def _in_turn(checks: Iterable[Check], max_bytes: int | None) -> Check:
    each = tuple(checks)

    def walk(message: Message, path: Path, found: Findings) -> None:
        for one in each:
            one(message, path, found)

    def walk_unless_too_large(message: Message, path: Path, found: Findings) -> None:
        size = message.ByteSize()
        if max_bytes is not None and size > max_bytes:
            words = f"must be at most {max_bytes} bytes encoded; it has {size}"
            found.add(path, "", words, too_large=True)
        else:
            walk(message, path, found)

    return walk if max_bytes is None else walk_unless_too_large
