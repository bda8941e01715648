"""What the service does with records: normalize, aggregate, filter.

Pure functions over plain data: no HTTP, no neuron. The types are the validation: msgspec reads
JSON into them, and says what does not fit and where. The HTTP API and the process_batch command
share them, so both accept the same and the federation knows its JSON Schema.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeGuard

import msgspec

MAX_RECORDS = 10_000

Scalar = str | int | float | bool | None
Record = dict[str, Scalar]
Records = Annotated[list[Record], msgspec.Meta(min_length=1, max_length=MAX_RECORDS)]
FieldName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Operator = Literal["eq", "ne", "lt", "le", "gt", "ge", "contains"]


class ProcessingError(ValueError):
    """The request is well formed, but cannot be carried out on these records."""


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="operation"):
    records: Records


class Normalize(_Request, frozen=True, tag="normalize"):
    """Scale numbers to 0 to 1, between the smallest and the largest of their field."""

    fields: list[FieldName] = []
    """Which fields; empty: every field that holds a number."""


class Aggregate(_Request, frozen=True, tag="aggregate"):
    """Count, sum, mean, minimum and maximum of a field."""

    field: FieldName
    group_by: FieldName | None = None
    """One result for each value of this field; None: one over all."""


class Filter(_Request, frozen=True, tag="filter"):
    """Keep the records whose field compares so with a value; others fall out."""

    field: FieldName
    operator: Operator
    value: Scalar


Request = Normalize | Aggregate | Filter


class Result(msgspec.Struct, frozen=True):
    """What came out."""

    operation: str
    input_records: int
    output_records: int
    records: list[Record]


def process(request: Request) -> Result:
    """Carry out one request.

    Raises:
        ProcessingError: a field is missing or holds no number, or numbers are too large.
    """
    try:
        match request:
            case Normalize():
                return _result("normalize", request, _normalize(request))
            case Aggregate():
                return _result("aggregate", request, _aggregate(request))
            case Filter():
                return _result("filter", request, _filter(request))
    except OverflowError:
        raise ProcessingError("the numbers are too large to calculate with") from None


def _result(operation: str, request: Request, records: list[Record]) -> Result:
    return Result(operation, len(request.records), len(records), records)


def _normalize(request: Normalize) -> list[Record]:
    names = request.fields or {name for record in request.records for name in record}
    ranges: dict[str, tuple[float, float]] = {}
    for name in names:
        numbers = _numbers(name, request.records)
        if numbers:
            ranges[name] = min(numbers), max(numbers)
        elif request.fields:
            raise ProcessingError(f"field {name!r} holds no number in any record")
    return [
        {name: _scaled(value, ranges.get(name)) for name, value in record.items()}
        for record in request.records
    ]


def _scaled(value: Scalar, between: tuple[float, float] | None) -> Scalar:
    if between is None or not _is_number(value):
        return value
    low, high = between
    if low == high:
        return 0.0
    # Halved first: the span between two finite numbers may be too large for a float.
    return (float(value) / 2 - low / 2) / (high / 2 - low / 2)


def _aggregate(request: Aggregate) -> list[Record]:
    groups: dict[Scalar, list[Record]] = {}
    for record in request.records:
        group = None if request.group_by is None else record.get(request.group_by)
        groups.setdefault(group, []).append(record)
    rows = [_summary(request.field, group, records) for group, records in groups.items()]
    if not any(row["count"] for row in rows):
        raise ProcessingError(f"field {request.field!r} holds no number in any record")
    return rows


def _summary(name: str, group: Scalar, records: list[Record]) -> Record:
    numbers = _numbers(name, records)
    total = math.fsum(numbers)
    return {
        "group": group,
        "count": len(numbers),
        "sum": total,
        "mean": total / len(numbers) if numbers else None,
        "min": min(numbers, default=None),
        "max": max(numbers, default=None),
    }


_COMPARE: dict[Operator, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "contains": operator.contains,
}


def _filter(request: Filter) -> list[Record]:
    compare = _COMPARE[request.operator]
    if request.operator == "contains" and not isinstance(request.value, str):
        raise ProcessingError("operator 'contains' needs a string as its value")

    def fits(record: Record) -> bool:
        value = record.get(request.field)
        try:
            return request.field in record and compare(value, request.value)
        except TypeError:  # a string is neither below nor above a number
            return False

    return [record for record in request.records if fits(record)]


def _numbers(name: str, records: Iterable[Record]) -> list[float]:
    values = (record.get(name) for record in records)
    return [float(value) for value in values if _is_number(value)]


def _is_number(value: Scalar) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
