"""A handler's signature as data: the JSON Schema that is advertised, and the conversion by it.

msgspec does both from one type, so that they cannot disagree. It knows the standard types,
dataclasses, TypedDict, msgspec.Struct, enums and unions; what is pydantic's is pydantic's to
describe and to convert (foreign.py). Everything that is wrong with a signature raises HandlerError.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from neuron_sdk.context import CommandContext
from neuron_sdk.errors import HandlerError
from neuron_sdk.foreign import (
    Adapter,
    decode_foreign,
    describe_foreign,
    has_meta,
    is_foreign,
    is_standard,
)
from neuron_sdk.payload import JsonObject, NotJson, TooLarge, plain
from neuron_sdk.problems import BAD_KEY, InvalidData, Problem, from_msgspec, from_pydantic

_MAX_SCHEMA_BYTES = 64 * 2**10
_MAX_SCHEMA_DEPTH = 32

Handler = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a handler takes besides the context."""

    context_name: str | None
    """The parameter that gets the CommandContext; None if the handler takes none."""
    shape: type[msgspec.Struct]
    data_schema: JsonObject
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """The parameters that are pydantic's."""
    standard: bool = False
    """Whether the parameters are of standard types alone, so that to convert them runs nobody's
    code and takes no time."""

    def convert(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for the handler, without its context.

        Raises:
            InvalidData: a field is missing, unknown, or of another type.
        """
        try:
            values = msgspec.convert(dict(data), self.shape, str_keys=True, dec_hook=decode_foreign)
        except msgspec.ValidationError as error:
            raise InvalidData(self._problems(data) or [from_msgspec(error)]) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidData([Problem("", str(error))]) from None
        named = ((name, getattr(values, name)) for name in self.shape.__struct_fields__)
        answer = {name: value for name, value in named if value is not msgspec.UNSET}
        problems = []
        for name in answer.keys() & self.adapters.keys():
            try:
                answer[name] = self.adapters[name].convert(answer[name])
            except ValueError as error:
                problems.extend(from_pydantic(error, name))
        if problems:
            raise InvalidData(problems)
        return answer

    def _problems(self, data: Mapping[str, Any]) -> list[Problem]:
        """Every bad parameter; msgspec itself tells of the first bad field of all."""
        problems = []
        known = {each.name: each for each in msgspec.structs.fields(self.shape)}
        problems += [Problem(name, "is not a parameter") for name in data.keys() - known.keys()]
        for name, each in known.items():
            if name not in data:
                if each.required:
                    problems.append(Problem(name, "is required"))
            elif name in self.adapters:
                try:
                    self.adapters[name].convert(data[name])
                except ValueError as error:
                    problems.extend(from_pydantic(error, name))
            else:
                problems.extend(_problems_of(name, each.type, data[name]))
        return sorted(problems, key=lambda problem: problem.field)


def _problems_of(name: str, hint: Any, value: Any) -> list[Problem]:
    """What is wrong with one parameter; item by item where it is an object or a list."""
    shape = msgspec.defstruct("Parameter", [(name, hint)])

    def problem(value: Any) -> Problem | None:
        try:
            msgspec.convert({name: value}, shape, str_keys=True, dec_hook=decode_foreign)
        except msgspec.ValidationError as error:
            return from_msgspec(error)
        except (ValueError, TypeError, RecursionError) as error:
            return Problem(name, str(error))
        return None

    first = problem(value)
    if first is None:
        return []
    # msgspec names no key of an object: each entry is looked at alone.
    unnamed = f"{name}[...]"
    keyless = first.field.startswith(unnamed) or first.description.startswith(BAD_KEY)
    if not isinstance(value, dict) or not keyless:
        return [first]
    alone = ((key, problem({key: item})) for key, item in value.items())
    found = [
        Problem(
            f"{name}.{key}{each.field.removeprefix(unnamed).removeprefix(name)}", each.description
        )
        for key, each in alone
        if each is not None
    ]
    return found or [first]


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
    adapters: dict[str, Adapter] = {}
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
        if is_foreign(hint):
            adapters[name] = _adapt(name, hint, where)
            hint = Any  # msgspec leaves it as it is
        if parameter.default is inspect.Parameter.empty:
            fields.append((name, hint, msgspec.NODEFAULT))
        else:
            fields.append((name, typing.Union[hint, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007
            defaults[name] = parameter.default
    shape = _make_shape(handler, fields, where)
    schema = _make_schema(shape, adapters, defaults, where)
    standard = all(is_standard(hint) for _, hint, _ in fields) and not adapters
    return Parameters(context_name, shape, schema, adapters, standard)


def _adapt(name: str, hint: Any, where: str) -> Adapter:
    if has_meta(hint):
        raise HandlerError(
            f"{where}: parameter {name!r} has both pydantic's types and msgspec.Meta, which "
            "pydantic does not read: use pydantic.Field"
        )
    try:
        adapter = Adapter(hint)
        adapter.schema(name)
    except Exception as error:  # noqa: BLE001 - pydantic's errors have no base of their own
        reason = str(error).partition("\n")[0]
        raise HandlerError(
            f"{where}: pydantic cannot read the type of parameter {name!r} from JSON: {reason}"
        ) from None
    return adapter


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
                schema_hook=describe_foreign,
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
    shape: type[msgspec.Struct],
    adapters: Mapping[str, Adapter],
    defaults: Mapping[str, Any],
    where: str,
) -> JsonObject:
    (reference,), components = msgspec.json.schema_components(
        (shape,), ref_template="#/$defs/{name}", schema_hook=describe_foreign
    )
    root = components.pop(reference["$ref"].removeprefix("#/$defs/"))
    root.pop("title", None)
    root["properties"] |= {name: adapter.schema(name) for name, adapter in adapters.items()}
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
    _drop_foreign_patterns(root)
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


# What Python's expressions have and the federation's (RE2's) have not: look-around, atomic groups,
# conditions, back-references, possessive repeats. Inside a set of characters this finds too much.
_NOT_RE2 = re.compile(r"\(\?(?:[=!>(#]|<[=!]|P=)|\\[1-9Z]|[*+?}]\+")
_MAX_PATTERN_LENGTH = 1024


def _drop_foreign_patterns(schema: JsonObject) -> None:
    """Leave out patterns that the federation cannot check. The neuron checks them all the same."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            pattern = part.get("pattern")
            if isinstance(pattern, str) and (
                _NOT_RE2.search(pattern) or len(pattern) > _MAX_PATTERN_LENGTH
            ):
                del part["pattern"]
            values = {key: value for key, value in part.items() if key not in _VALUES}
            waiting.extend(values.values())
        elif isinstance(part, list):
            waiting.extend(part)


_VALUES = frozenset({"const", "default", "enum", "examples"})
