"""What a check of a message finds, and the paths by which it names the fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from federation_server.domain.violation import Violation, subscript

MAX_VIOLATIONS = 100
"""A check stops here: whoever sends worse than this learns enough from these."""

_LONGEST_PATH = 512

Path: TypeAlias = "tuple[Path, str, int | str | None] | None"
"""The way to a message: its parent's way, the field, and the index or key there. A linked tuple,
because it is made for every message inside a message and read only when something is wrong."""


class EnoughViolations(Exception):
    """The list is full."""


class Findings:
    """What a check has found so far."""

    __slots__ = ("_prefix", "violations")

    def __init__(self, prefix: str = "") -> None:
        """All paths will begin with the field `prefix`."""
        self._prefix = prefix
        self.violations: list[Violation] = []

    def add(self, path: Path, name: str, description: str, *, too_large: bool = False) -> None:
        """Notes that the field `name` of the message at `path` is wrong, or with an empty name
        what is at `path` itself.

        Raises:
            EnoughViolations: that was the last one that is of use.
        """
        where = render(path, name)
        if self._prefix:
            where = self._prefix + _joined(where)
        self.violations.append(Violation(where, description, too_large))
        if len(self.violations) >= MAX_VIOLATIONS:
            raise EnoughViolations


def render(path: Path, name: str = "") -> str:
    """A path as the contract writes it."""
    text = name
    while path is not None:
        path, field, index = path
        if index is None:
            text = field + _joined(text)
        else:
            at = f"[{index}]" if isinstance(index, int) else subscript(index)
            text = field + at + _joined(text)
    return text if len(text) <= _LONGEST_PATH else text[: _LONGEST_PATH - 1] + "…"


def _joined(rest: str) -> str:
    return f".{rest}" if rest and rest[0] != "[" else rest


class Fault(NamedTuple):
    """What is wrong with a value."""

    description: str
    too_large: bool = False


Judge: TypeAlias = Callable[[Any], Fault | None]
"""Looks at a value; None: it is in order."""

Check: TypeAlias = Callable[[Any, Path, Findings], None]
"""Looks at a field of a message, or at a whole message, and notes what is wrong."""
