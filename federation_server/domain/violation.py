"""What is wrong with one field of a request: the one shape in which every check says it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_LONGEST_KEY = 64
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that breaks a limit."""

    field: str
    """Where it is, as the contract writes it: `description.labels["zone"]`, `points[3].name`."""
    description: str
    """What would be right, and what it is instead; without the field's name."""
    too_large: bool = False
    """It is about size (bytes, or how many): the same thing in smaller parts may be taken."""


def subscript(key: str) -> str:
    """A map's key as it stands in a path: `["zone"]`. A long key is cut."""
    shown = key if len(key) <= _LONGEST_KEY else key[: _LONGEST_KEY - 1] + "…"
    return f"[{json.dumps(shown, ensure_ascii=False)}]"


def member(key: str) -> str:
    """A JSON object's member as it goes on after its object's path: `.limit`, or `["a b"]`."""
    return f".{key}" if _PLAIN_KEY.fullmatch(key) else subscript(key)
