"""What is wrong with a command's data, named field by field: "point.y: expected float, got str"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad field."""

    field: str
    """Its path, for example "rows[1].name"; "" for the whole."""
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class InvalidData(ValueError):
    """A command's data does not fit its handler."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems[:MAX_PROBLEMS])
        """Every bad field that was found; at least one, at most 100."""
        super().__init__("; ".join(map(str, self.problems)))


# msgspec: "Expected `int`, got `str` - at `$.limit`", or "… - at `key` in `$.limit`".
_AT = re.compile(r"^(?P<problem>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
BAD_KEY = "has a bad key: "
_FIELD = re.compile(r"^Object (?P<what>missing required|contains unknown) field `(?P<name>[^`]*)`$")


def from_msgspec(error: msgspec.ValidationError) -> Problem:
    """Msgspec's words in ours. It tells of the first bad field only."""
    found = _AT.match(str(error))
    problem = found["problem"] if found else str(error)
    path = (found["path"] or "").lstrip(".") if found else ""
    field = _FIELD.match(problem)
    if field:
        path = f"{path}.{field['name']}" if path else field["name"]
        missing = field["what"] == "missing required"
        return Problem(path, "is required" if missing else "is not a parameter")
    text = problem[:1].lower() + problem[1:].replace("`", "")
    return Problem(path, f"{BAD_KEY}{text}" if found and found["key"] else text)


def from_pydantic(error: ValueError, field: str) -> list[Problem]:
    """Pydantic's; `field` is what it has looked at."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return [Problem(field, str(error))]
    return [
        Problem(_path(field, each["loc"]), str(each["msg"]))
        for each in errors(include_url=False, include_input=False, include_context=False)
    ]


def _path(field: str, parts: Sequence[int | str]) -> str:
    path = field
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path
