"""A handler's signature as data: the JSON Schema that is advertised, and the conversion by it.

msgspec does both from one type, so that they cannot disagree. It knows the standard types,
dataclasses, TypedDict, msgspec.Struct, enums and unions; pydantic's models are added here, if
the service uses pydantic. Everything that is wrong with a signature raises HandlerError.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from neuron_sdk.context import CommandContext
from neuron_sdk.errors import HandlerError
from neuron_sdk.payload import JsonObject, NotJson, TooLarge, plain

_MAX_SCHEMA_BYTES = 64 * 2**10
_MAX_SCHEMA_DEPTH = 32

Handler = Callable[..., Any]


class InvalidData(ValueError):
    """A command's data does not fit its handler; `field` names the part, "" for the whole."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a handler takes besides the context."""

    context_name: str | None
    """The parameter that gets the CommandContext; None if the handler takes none."""
    shape: type[msgspec.Struct]
    data_schema: JsonObject

    def convert(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for the handler, without its context.

        Raises:
            InvalidData: a field is missing, unknown, or of another type.
        """
        try:
            values = msgspec.convert(dict(data), self.shape, dec_hook=_decode_foreign)
        except msgspec.ValidationError as error:
            raise _readable(error) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidData("", str(error)) from None
        named = ((name, getattr(values, name)) for name in self.shape.__struct_fields__)
        return {name: value for name, value in named if value is not msgspec.UNSET}


def read_signature(handler: Handler) -> Parameters:
    """What `handler` takes.

    Raises:
        HandlerError: a parameter has no annotation, or one that cannot be read from JSON.
    """
    where = f"handler {getattr(handler, '__qualname__', repr(handler))}"
    try:
        signature = inspect.signature(handler)
        hints = typing.get_type_hints(_annotated(handler), include_extras=True)
    except NameError as error:
        raise HandlerError(
            f"{where}: an annotation cannot be read ({error}): define the type at module level, "
            "and import it outside of `if TYPE_CHECKING`"
        ) from None
    except (TypeError, ValueError) as error:
        raise HandlerError(f"{where}: its signature cannot be read: {error}") from None

    context_name: str | None = None
    fields: list[tuple[str, Any, Any]] = []
    defaults: dict[str, Any] = {}
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        hint = hints.get(name, inspect.Parameter.empty)
        if hint is CommandContext or (
            index == 0 and hint is inspect.Parameter.empty and name == "ctx"
        ):
            if context_name is not None:
                raise HandlerError(f"{where}: takes two contexts; keep one")
            context_name = name
            _check_kind(parameter, where)
            continue
        _check_kind(parameter, where)
        if hint is inspect.Parameter.empty:
            raise HandlerError(
                f"{where}: parameter {name!r} has no annotation: say its type, for example "
                f"`{name}: str`, so that the command's data can be described and checked"
            )
        if parameter.default is inspect.Parameter.empty:
            fields.append((name, hint, msgspec.NODEFAULT))
        else:
            fields.append((name, typing.Union[hint, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007
            defaults[name] = parameter.default
    shape = _make_shape(handler, fields, where)
    return Parameters(context_name, shape, _make_schema(shape, defaults, where))


def _annotated(handler: Handler) -> Any:
    """Where a callable keeps its annotations: a callable object keeps them in its class."""
    return handler if inspect.isroutine(handler) else type(handler).__call__


def _check_kind(parameter: inspect.Parameter, where: str) -> None:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise HandlerError(
            f"{where}: {parameter} cannot be described: name each parameter and its type, or take "
            "one `dict[str, Any]` parameter"
        )
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise HandlerError(f"{where}: parameter {name!r} is positional-only: remove the `/`")


def _make_shape(
    handler: Handler, fields: list[tuple[str, Any, Any]], where: str
) -> type[msgspec.Struct]:
    for name, hint, default in fields:
        try:
            # Alone, so that the message can name the parameter.
            msgspec.json.schema_components(
                (msgspec.defstruct("Parameter", [(name, hint, default)], kw_only=True),),
                schema_hook=_describe_foreign,
            )
        except (TypeError, ValueError, NotImplementedError, RecursionError) as error:
            reason = str(error).partition("\n")[0].rstrip(":")
            raise HandlerError(
                f"{where}: the type of parameter {name!r} cannot be read from JSON ({reason}): use "
                "str, int, float, bool, list, dict, an enum, Literal, a dataclass, a TypedDict or "
                "a msgspec.Struct"
            ) from None
    name = getattr(handler, "__name__", "handler")
    try:
        return msgspec.defstruct(
            f"{name}_data" if name.isidentifier() else "data",
            fields,
            kw_only=True,
            forbid_unknown_fields=True,
            module=getattr(handler, "__module__", None),
        )
    except (TypeError, ValueError) as error:
        raise HandlerError(f"{where}: {error}") from None


def _make_schema(
    shape: type[msgspec.Struct], defaults: Mapping[str, Any], where: str
) -> JsonObject:
    (reference,), components = msgspec.json.schema_components(
        (shape,), ref_template="#/$defs/{name}", schema_hook=_describe_foreign
    )
    root = components.pop(reference["$ref"].removeprefix("#/$defs/"))
    root.pop("title", None)
    definitions = dict(components)
    _hoist_definitions([root, *components.values()], definitions)
    for name, default in defaults.items():
        # A default that JSON cannot say is the handler's own business: it applies all the same.
        try:
            known = plain(default, max_bytes=4096, max_depth=8)
        except (NotJson, TooLarge):
            continue
        if known is not None:
            root["properties"][name]["default"] = known
    if definitions:
        root["$defs"] = definitions
    try:
        schema: JsonObject = plain(root, max_bytes=_MAX_SCHEMA_BYTES, max_depth=_MAX_SCHEMA_DEPTH)
    except (NotJson, TooLarge) as error:
        raise HandlerError(f"{where}: its JSON Schema cannot be sent: {error}") from None
    return schema


def _hoist_definitions(schemas: list[Any], into: dict[str, Any]) -> None:
    """Move the $defs of parts (pydantic writes them) to the root, where their $refs point."""
    waiting = list(schemas)
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            nested = part.pop("$defs", None)
            if isinstance(nested, dict):
                into.update(nested)
                waiting.extend(nested.values())
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _pydantic_model(kind: Any) -> Any:
    """`kind` if it is a pydantic model, else None. Never imports pydantic by itself."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return kind
    return None


def _describe_foreign(kind: type) -> JsonObject:
    model = _pydantic_model(kind)
    if model is None:
        raise TypeError(f"{kind.__qualname__} is not one of the types that are known")
    schema: JsonObject = model.model_json_schema(ref_template="#/$defs/{model}")
    return schema


def _decode_foreign(kind: type, value: Any) -> Any:
    model = _pydantic_model(kind)
    if model is None:
        raise NotImplementedError(f"{kind.__qualname__} is not supported")
    try:
        return model.model_validate(value)
    except ValueError as error:
        raise ValueError(_first_problem(error)) from None


def _first_problem(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    first = errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


_AT = re.compile(r"^(?P<problem>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<what>missing required|contains unknown) field `(?P<name>[^`]*)`$")


def _readable(error: msgspec.ValidationError) -> InvalidData:
    """Msgspec's "Expected `int`, got `str` - at `$.limit`" as "limit: expected int, got str"."""
    found = _AT.match(str(error))
    problem = found["problem"] if found else str(error)
    path = (found["path"] or "").lstrip(".") if found else ""
    field = _FIELD.match(problem)
    if field:
        path = f"{path}.{field['name']}" if path else field["name"]
        missing = field["what"] == "missing required"
        return InvalidData(path, "is required" if missing else "is not a parameter")
    return InvalidData(path, problem[:1].lower() + problem[1:].replace("`", ""))
