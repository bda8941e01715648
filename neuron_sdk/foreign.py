"""Types that pydantic has to read, if the service uses it: its models, dataclasses and constraints.

The SDK does not depend on pydantic and never imports it: a type of its making is there only if the
service has. A parameter that mentions one, be it in a field of a dataclass, belongs to pydantic as
a whole. Only what stands in a msgspec.Struct, which pydantic cannot read, comes by the hooks.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

import msgspec

from neuron_sdk.payload import JsonObject

_OF_PYDANTIC = frozenset({"pydantic", "pydantic_core", "annotated_types"})


def is_foreign(hint: Any) -> bool:
    """Whether an annotation mentions something that only pydantic understands."""
    if "pydantic" not in sys.modules:
        return False
    return any(_is_pydantic(part) for part in _parts(hint))


def is_standard(hint: Any) -> bool:
    """Whether an annotation mentions nothing but types of the standard library and msgspec, which
    run no code of the service's when they are built.
    """
    return all(
        not isinstance(part, type)
        or part.__module__.partition(".")[0]
        in {"builtins", "datetime", "decimal", "msgspec", "uuid"}
        for part in _parts(hint)
    )


def has_meta(hint: Any) -> bool:
    """Whether an annotation mentions msgspec.Meta, which pydantic would pass over in silence."""
    return any(isinstance(part, msgspec.Meta) for part in _parts(hint))


def _parts(hint: Any) -> list[Any]:
    """An annotation, what it is made of, and what stands beside it in Annotated."""
    parts: list[Any] = []
    waiting = [hint]
    while waiting:
        part = waiting.pop()
        if any(part is known for known in parts):
            continue
        parts.append(part)
        waiting.extend(getattr(part, "__metadata__", ()))
        waiting.extend(typing.get_args(part))
        waiting.extend(_fields(part))
    return parts


def _fields(part: Any) -> list[Any]:
    """The annotations inside a type that pydantic can read as well as msgspec."""
    if isinstance(part, typing.NewType):
        return [part.__supertype__]
    kind = typing.get_origin(part) or part
    if not (dataclasses.is_dataclass(kind) or typing.is_typeddict(kind) or _is_named_tuple(kind)):
        return []
    try:
        return list(typing.get_type_hints(kind, include_extras=True).values())
    except (NameError, TypeError):
        return []  # whoever reads it will say what is wrong


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _is_pydantic(part: Any) -> bool:
    if hasattr(part, "__get_pydantic_core_schema__") or hasattr(part, "__pydantic_validator__"):
        return True
    return type(part).__module__.partition(".")[0] in _OF_PYDANTIC


class Adapter:
    """What pydantic knows of one annotation."""

    def __init__(self, hint: Any) -> None:
        """Raises whatever pydantic raises if it cannot read it."""
        pydantic: Any = sys.modules["pydantic"]
        self._adapter: Any = pydantic.TypeAdapter(hint)

    def schema(self, prefix: str) -> JsonObject:
        """Its JSON Schema; the definitions that it shares with nobody begin with `prefix`."""
        schema: JsonObject = self._adapter.json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
        definitions = schema.pop("$defs", {})
        if definitions:
            schema["$defs"] = {f"{prefix}.{name}": each for name, each in definitions.items()}
        return schema

    def convert(self, value: Any) -> Any:
        """Data as the annotation says. Raises ValueError: pydantic's own, with its errors."""
        # As JSON, so that strict models take a date's text for a date.
        return self._adapter.validate_json(msgspec.json.encode(value))


def describe_foreign(kind: type) -> JsonObject:
    """Msgspec's hook: the schema of a model inside one of its own types."""
    if not is_foreign(kind):
        raise TypeError(f"{kind.__qualname__} is not one of the types that are known")
    return Adapter(kind).schema(kind.__qualname__)


def decode_foreign(kind: type, value: Any) -> Any:
    """Msgspec's hook: a model inside one of its own types."""
    if not is_foreign(kind):
        raise NotImplementedError(f"{kind.__qualname__} is not supported")
    try:
        return Adapter(kind).convert(value)
    except ValueError as error:
        raise ValueError(_first_problem(error)) from None


def _first_problem(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    first = errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
