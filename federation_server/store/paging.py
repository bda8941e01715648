"""Pages of a list, by keyset: a page begins after the last row of the page before.

A page token holds that row's sort values, and a digest of them and of what was asked: with another
filter or order, or a changed value, it is refused. It is not a secret and needs no signature,
because it can only say where to begin in a list that the caller may read anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from typing import Any

import orjson
from sqlalchemy import Column, ColumnElement, Select, and_, literal, or_
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncConnection

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

MOST_BYTES = 1024 * 1024
"""Of free-form JSON in a page. Each number in it is a message of its own in the answer, four times
as large, and takes microseconds to make."""


class PageTokenInvalid(ValueError):
    """A page token is not one of this list, or the filter or the order has changed since."""


@dataclass(frozen=True, slots=True)
class SortKey:
    """A column to sort by. Rows without a value come last, in either direction."""

    column: ColumnElement[Any]
    descending: bool = False
    also: ColumnElement[Any] | None = None
    """A column of a joined table with the same values, so that an index of it finds the page's
    first row as well. PostgreSQL concludes that by itself only from an equality."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a caller asks for: how many rows, after which, of which list."""

    size: int
    after: Sequence[Any] | None
    asked: Sequence[str]

    def apply(self, query: Select[Any], keys: Sequence[SortKey]) -> Select[Any]:
        """The query for this page and one row more, which tells whether there is a next page."""
        order: list[ColumnElement[Any]] = []
        for key in keys:
            ordered = key.column.desc() if key.descending else key.column.asc()
            # Said only where it matters: descending it would keep an index from being used.
            order.append(ordered.nulls_last() if _nullable(key.column) else ordered)
        if self.after is not None:
            query = query.where(_beyond(keys, self.after))
        return query.order_by(*order).limit(self.size + 1)

    async def read(
        self,
        connection: AsyncConnection,
        query: Select[Any],
        keys: Sequence[SortKey],
        *,
        bytes_in: str = "",
    ) -> tuple[Sequence[Any], str]:
        """The rows of this page, and the token of the next one, empty if there is none. The query
        must select the keys' columns, by their names. With `bytes_in`, a column that says how large
        the row's payload is, there are no more rows than have MOST_BYTES together, but one at
        least.

        Raises:
            PageTokenInvalid: the token was made by hand.
        """
        try:
            rows = (await connection.execute(self.apply(query, keys))).all()
        except DataError:
            if self.after is None:
                raise
            # Of the right types, and nothing that a row could hold: whoever wrote it made the
            # digest as well.
            raise PageTokenInvalid("the page_token is damaged") from None
        size = self.size
        if bytes_in:
            sums = accumulate(getattr(row, bytes_in) for row in rows)
            size = min(size, max(1, sum(total <= MOST_BYTES for total in sums)))
        shown = rows[:size]
        last = [getattr(shown[-1], key.column.name) for key in keys] if shown else []
        return shown, replace(self, size=size).next_token(rows, last)

    def next_token(self, rows: Sequence[Any], values: Sequence[Any]) -> str:
        """The token of the page after `rows`, whose last shown row has those sort values; empty
        if there is none.
        """
        if len(rows) <= self.size:
            return ""
        plain = orjson.loads(orjson.dumps(values))
        return _encode([_digest(self.asked, plain), *plain])


def page(size: int, token: str, *asked: str) -> Page:
    """The page of a list that `asked` identifies: its name, its filter, its order.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    size = min(size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    if not token:
        return Page(size, None, asked)
    found, *after = _decode(token)
    if found != _digest(asked, after):
        raise PageTokenInvalid("the page_token belongs to another list, filter or order")
    return Page(size, after, asked)


def _beyond(keys: Sequence[SortKey], after: Sequence[Any]) -> ColumnElement[bool]:
    """Rows that come after the one with those sort values: the first key that differs decides.

    A first column that is never NULL has a bound of its own, by which an index finds where the page
    begins.
    """
    if len(keys) != len(after):
        raise PageTokenInvalid("the page_token belongs to another list, filter or order")
    alternatives: list[ColumnElement[bool]] = []
    bounds: list[ColumnElement[bool]] = []
    same: list[ColumnElement[bool]] = []
    for key, raw in zip(keys, after, strict=True):
        if raw is None:  # among the rows without a value, which are last: only ties go on
            same.append(key.column.is_(None))
            continue
        value = literal(_restored(raw, key.column), key.column.type)
        further = key.column < value if key.descending else key.column > value
        if _nullable(key.column):
            further = or_(further, key.column.is_(None))
        elif not same:
            bounds = [
                column <= value if key.descending else column >= value
                for column in (key.column, key.also)
                if column is not None
            ]
        alternatives.append(and_(*same, further))
        same.append(key.column == value)
    return and_(*bounds, or_(*alternatives)) if alternatives else and_(*same)


def _nullable(column: ColumnElement[Any]) -> bool:
    return not isinstance(column, Column) or bool(column.nullable)


def _restored(raw: Any, column: ColumnElement[Any]) -> Any:
    """A sort value as the column has it; a token that was tampered with is refused here."""
    kind = column.type.python_type
    try:
        if kind is datetime:
            return datetime.fromisoformat(raw)
        if isinstance(raw, bool) or not isinstance(raw, str | int | float):
            raise TypeError(raw)
        return kind(raw)
    except (TypeError, ValueError, KeyError):
        raise PageTokenInvalid("the page_token is damaged") from None


def _digest(asked: Sequence[str], values: Sequence[Any]) -> str:
    return hashlib.sha256(orjson.dumps([asked, values])).hexdigest()[:16]


def _encode(values: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(values)).decode().rstrip("=")


def _decode(token: str) -> list[Any]:
    try:
        values = orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    except (binascii.Error, ValueError):
        raise PageTokenInvalid("the page_token is damaged") from None
    if not isinstance(values, list) or not values:
        raise PageTokenInvalid("the page_token is damaged")
    return values
