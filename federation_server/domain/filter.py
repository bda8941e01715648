"""AIP-160 filters: the grammar, and the small tree that it makes of a text.

    type = "scraper" AND labels.zone = "eu" AND NOT presence = ONLINE

`parse` knows nothing of fields and values; `store/filter.py` gives them their meaning in SQL.
Source: https://google.aip.dev/160 and its EBNF. As there, OR binds more tightly than AND, and two
restrictions without a word between them are joined by AND. A bare word (a "global restriction")
is refused, because it would have to mean something.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedEOF, UnexpectedInput, UnexpectedToken

MAX_RESTRICTIONS = 100
MAX_DEPTH = 20

_BRACKETS = re.compile(r"""[()]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)

_GRAMMAR = r"""
expression: sequence (_AND sequence)*
sequence: factor+
factor: term (_OR term)*
term: simple | (_NOT | _MINUS) simple -> negation
simple: restriction | "(" expression ")"
restriction: path COMPARATOR (STRING | TEXT)
path: NAME ("." (KEY | STRING))*

_AND.2: /AND\b/
_OR.2: /OR\b/
_NOT.2: /NOT\b/
_MINUS: "-"
COMPARATOR: /<=|>=|!=|<|>|=|:/
NAME: /[A-Za-z_][A-Za-z0-9_]*/
KEY: /[A-Za-z0-9_][A-Za-z0-9_\/-]*/
STRING.2: /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/
TEXT: /[^\s()"'=<>!]+/
%import common.WS
%ignore WS
"""


class FilterError(ValueError):
    """A filter cannot be understood; the message says where and why."""

    def __init__(self, message: str, position: int | None = None) -> None:
        """`position` counts characters from 1."""
        super().__init__(message if position is None else f"at character {position}: {message}")
        self.position = position


class Comparator(StrEnum):
    """How a field is compared."""

    EQUAL = "="
    NOT_EQUAL = "!="
    LESS = "<"
    LESS_EQUAL = "<="
    GREATER = ">"
    GREATER_EQUAL = ">="
    HAS = ":"


@dataclass(frozen=True, slots=True)
class Restriction:
    """A field's path (`labels.zone` has two parts), a comparator, and a value as it was written."""

    path: tuple[str, ...]
    comparator: Comparator
    value: str
    quoted: bool
    position: int


@dataclass(frozen=True, slots=True)
class And:
    """All of them hold."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of them holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """It does not hold."""

    part: Filter


Filter: TypeAlias = "Restriction | And | Or | Not"


class _Builder(Transformer[Token, Any]):
    """Makes the tree while the parser runs, so that no text is deep enough to hurt."""

    def expression(self, parts: list[Filter]) -> Filter:
        return _flat(And, parts)

    def sequence(self, parts: list[Filter]) -> Filter:
        return _flat(And, parts)

    def factor(self, parts: list[Filter]) -> Filter:
        return _flat(Or, parts)

    def term(self, parts: list[Filter]) -> Filter:
        return parts[0]

    def simple(self, parts: list[Filter]) -> Filter:
        return parts[0]

    def negation(self, parts: list[Filter]) -> Filter:
        return Not(parts[0])

    def path(self, tokens: list[Token]) -> tuple[tuple[str, ...], int]:
        parts = tuple(_unquoted(t) if t.type == "STRING" else str(t) for t in tokens)
        return parts, (tokens[0].start_pos or 0) + 1

    def restriction(self, children: list[Any]) -> Restriction:
        (path, position), comparator, value = children
        quoted = value.type == "STRING"
        text = _unquoted(value) if quoted else str(value)
        return Restriction(path, Comparator(str(comparator)), text, quoted, position)


def _flat(kind: type[And] | type[Or], parts: list[Filter]) -> Filter:
    """A single part stands for itself; parts of the same kind are taken in."""
    if len(parts) == 1:
        return parts[0]
    flat: list[Filter] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, kind) else (part,))
    return kind(tuple(flat))


def _unquoted(token: Token) -> str:
    """A quoted string's text: a backslash takes the next character as it is."""
    return _ESCAPE.sub(r"\1", str(token)[1:-1])


@functools.cache
def _parser() -> Lark:
    return Lark(_GRAMMAR, start="expression", parser="lalr", transformer=_Builder())


def parse(text: str) -> Filter | None:
    """The filter's tree; None for an empty text, which every object matches.

    Raises:
        FilterError: the text is no filter, or a larger one than MAX_RESTRICTIONS and MAX_DEPTH
            allow.
    """
    if not text.strip():
        return None
    _check_depth(text)
    try:
        tree: Filter = _parser().parse(text)  # type: ignore[assignment]  # what _Builder makes
    except UnexpectedEOF:
        raise _ends_too_soon(text) from None
    except UnexpectedInput as error:
        raise _unexpected(text, error) from None
    if _count(tree) > MAX_RESTRICTIONS:
        raise FilterError(f"more than {MAX_RESTRICTIONS} comparisons")
    return tree


def _unexpected(text: str, error: UnexpectedInput) -> FilterError:
    position: int = getattr(error, "pos_in_stream", None) or 0
    if isinstance(error, UnexpectedToken) and error.token.type == "$END":
        return _ends_too_soon(text)
    rest = text[position : position + 20].split() or [""]
    remedy = "a comparison is field = value; quote a value that holds spaces"
    return FilterError(f"{rest[0]!r} is not expected here: {remedy}", position + 1)


def _ends_too_soon(text: str) -> FilterError:
    remedy = "a comparison is field = value, and each ( needs its )"
    return FilterError(f"the filter ends too soon: {remedy}", len(text.rstrip()) + 1)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            message = f"parentheses are nested deeper than {MAX_DEPTH}"
            raise FilterError(message, match.start() + 1)


def _count(tree: Filter) -> int:
    match tree:
        case Restriction():
            return 1
        case Not(part):
            return _count(part)
        case And(parts) | Or(parts):
            return sum(_count(part) for part in parts)
