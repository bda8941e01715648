"""AIP-160 filters as SQL: the meaning that fields and values give to a parsed filter.

Every value is a bind parameter. What a field does not say (NULL) is unlike every value: it never
equals, and NOT makes it match, as people expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, TypeAlias

from sqlalchemy import ColumnElement, Double, and_, false, func, literal, not_, or_, true
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import Text as SqlText

from federation_server.domain.filter import (
    And,
    Comparator,
    Filter,
    FilterError,
    Not,
    Or,
    Restriction,
    parse,
)

_ORDERED = frozenset(
    {Comparator.LESS, Comparator.LESS_EQUAL, Comparator.GREATER, Comparator.GREATER_EQUAL}
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text: = and != with `*` for any text at either end, and an order."""

    column: ColumnElement[Any]
    is_path: bool = False
    """Of a path a value without a slash means what is behind the last."""

    def meant(self, value: str) -> ColumnElement[Any]:
        """What is compared with that value."""
        if self.is_path and "/" not in value:
            return func.regexp_replace(self.column, "^.*/", "")
        return self.column


@dataclass(frozen=True, slots=True)
class Number:
    """A number."""

    column: ColumnElement[Any]


@dataclass(frozen=True, slots=True)
class Time:
    """A time, written as RFC 3339."""

    column: ColumnElement[Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """A value of an enum, written by its name; ordered only if its order means something."""

    column: ColumnElement[Any]
    members: type[Enum]
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class TextArray:
    """Texts: `field:value` asks for one of them."""

    column: ColumnElement[Any]


@dataclass(frozen=True, slots=True)
class TextMap:
    """Texts by key: `field.key = value`, and `field:key` asks whether there is such a key."""

    column: ColumnElement[Any]


Field: TypeAlias = Text | Number | Time | Choice | TextArray | TextMap
Fields: TypeAlias = Mapping[str, Field]


def condition(text: str, fields: Fields) -> ColumnElement[bool]:
    """The condition that a filter's text puts on rows; true for an empty one.

    Raises:
        FilterError: the text is no filter, names an unknown field, or compares it with something
            that it cannot be compared with.
    """
    tree = parse(text)
    return true() if tree is None else _expression(tree, fields)


def _expression(tree: Filter, fields: Fields) -> ColumnElement[bool]:
    match tree:
        case And(parts):
            return and_(*(_expression(part, fields) for part in parts))
        case Or(parts):
            return or_(*(_expression(part, fields) for part in parts))
        case Not(part):
            # NULL is false here, so that NOT of it is true. Elsewhere a WHERE takes it for false by
            # itself, and an index can be used.
            return not_(func.coalesce(_expression(part, fields), false()))
        case Restriction() as restriction:
            return _restriction(restriction, fields)


def _restriction(restriction: Restriction, fields: Fields) -> ColumnElement[bool]:
    name, *keys = restriction.path
    field = fields.get(name)
    if field is None:
        known = ", ".join(sorted(fields))
        raise FilterError(f"unknown field {name!r}; known: {known}", restriction.position)
    if isinstance(field, TextMap):
        return _map(field, keys, restriction)
    if keys:
        raise FilterError(f"{name} has no parts", restriction.position)
    match field:
        case Text():
            return _text(field.meant(restriction.value), restriction)
        case Number():
            # As a double, whatever the column is: PostgreSQL would round 2.5 for an integer's.
            return _compare(field.column, restriction, literal(_number(restriction), Double))
        case Time():
            return _compare(field.column, restriction, _time(restriction))
        case Choice():
            return _choice(field, restriction)
        case TextArray():
            _only(restriction, Comparator.HAS)
            if restriction.value == "*":
                return func.cardinality(field.column) > 0
            wanted: ColumnElement[bool] = field.column.contains(
                literal([restriction.value], ARRAY(SqlText))
            )
            return wanted


_COMPARISONS: Mapping[Comparator, Callable[[ColumnElement[Any], Any], ColumnElement[bool]]] = {
    Comparator.EQUAL: lambda column, value: column == value,
    Comparator.HAS: lambda column, value: column == value,
    Comparator.NOT_EQUAL: lambda column, value: column.is_distinct_from(value),
    Comparator.LESS: lambda column, value: column < value,
    Comparator.LESS_EQUAL: lambda column, value: column <= value,
    Comparator.GREATER: lambda column, value: column > value,
    Comparator.GREATER_EQUAL: lambda column, value: column >= value,
}


def _compare(
    column: ColumnElement[Any], restriction: Restriction, value: Any
) -> ColumnElement[bool]:
    return _COMPARISONS[restriction.comparator](column, value)


def _text(column: ColumnElement[Any], restriction: Restriction) -> ColumnElement[bool]:
    value = restriction.value
    if "*" not in (value[:1], value[-1:]) or restriction.comparator in _ORDERED:
        return _compare(column, restriction, value)
    pattern = value.removeprefix("*").removesuffix("*")
    escaped = pattern.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    start = "%" if value.startswith("*") else ""
    end = "%" if value.endswith("*") else ""
    alike = column.like(f"{start}{escaped}{end}", escape="\\")
    if restriction.comparator is Comparator.NOT_EQUAL:
        return not_(func.coalesce(alike, false()))
    return alike


def _map(field: TextMap, keys: list[str], restriction: Restriction) -> ColumnElement[bool]:
    name = restriction.path[0]
    column: Any = field.column  # SQLAlchemy types no operators of jsonb
    found: ColumnElement[bool]
    if not keys:
        _only(restriction, Comparator.HAS)
        if restriction.value == "*":
            return field.column != literal({}, JSONB)
        found = column.has_key(restriction.value)
        return found
    key = ".".join(keys)
    if restriction.comparator is Comparator.HAS and restriction.value == "*":
        found = column.has_key(key)
        return found
    if restriction.comparator is Comparator.EQUAL and "*" not in restriction.value:
        found = column.contains({key: restriction.value})  # the index knows this form
        return found
    if restriction.comparator in _ORDERED:
        raise FilterError(f"{name}.{key} is compared by = != or :", restriction.position)
    return _text(column[key].astext, restriction)


def _choice(field: Choice, restriction: Restriction) -> ColumnElement[bool]:
    names = list(field.members.__members__)
    if restriction.value not in names:
        raise FilterError(
            f"{restriction.path[0]} is one of {', '.join(names)}, not {restriction.value!r}",
            restriction.position,
        )
    if restriction.comparator in _ORDERED and not field.ordered:
        raise FilterError(f"{restriction.path[0]} has no order", restriction.position)
    return _compare(field.column, restriction, field.members[restriction.value])


def _only(restriction: Restriction, comparator: Comparator) -> None:
    if restriction.comparator is not comparator:
        name = ".".join(restriction.path)
        raise FilterError(f"{name} is compared by {comparator} only", restriction.position)


def _number(restriction: Restriction) -> float:
    try:
        number = float(restriction.value)
    except ValueError:
        number = float("nan")
    if restriction.quoted or number != number:  # noqa: PLR0124 - NaN alone differs from itself
        raise FilterError(
            f"{restriction.path[0]} is a number, not {restriction.value!r}", restriction.position
        )
    return number


def _time(restriction: Restriction) -> datetime:
    try:
        time = datetime.fromisoformat(restriction.value)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise FilterError(
            f"{restriction.path[0]} is a time like 2026-01-31T12:00:00Z, not {restriction.value!r}",
            restriction.position,
        )
    return time
