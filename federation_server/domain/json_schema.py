"""JSON Schema (draft 2020-12) of a command's data: is the schema one, and does the data fit it?

Schema and data come from outside, so the work is bounded and nothing is fetched: `$ref` leads to
places in the schema itself, patterns are RE2's (linear time; no look-around, no back-references),
and a check of data ends after a number of steps. Whether a schema is one is not asked of the
metaschema, which takes milliseconds for each small schema, but of a table of keywords.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeAlias
from urllib.parse import unquote

import re2  # type: ignore[import-untyped]  # it has no stubs
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

from federation_server.domain.neuron import JsonObject
from federation_server.domain.violation import Violation, member

DIALECT = "https://json-schema.org/draft/2020-12/schema"

MAX_VIOLATIONS = 100
MAX_PATTERN_LENGTH = 1024
MAX_STEPS = 60_000
"""How many keywords one check of data may apply: half a second of work; 256 KiB of numbers fit."""

_LONGEST_MESSAGE = 300
_TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")

# -- is it a schema? ------------------------------------------------------------------------


def schema_violations(schema: JsonObject, path: str) -> list[Violation]:
    """What keeps `schema` from being a schema of data; paths begin with `path`."""
    found: list[Violation] = []
    anchors, refs, keywords = set[str](), list[tuple[str, str]](), set[str]()
    stack: list[tuple[Any, str]] = [(schema, path)]
    while stack and len(found) < MAX_VIOLATIONS:
        node, where = stack.pop()
        if not isinstance(node, dict):
            if not isinstance(node, bool):
                found.append(Violation(where, "must be a schema: an object, true or false"))
            continue
        keywords.update(node)
        for keyword, value in node.items():
            place = where + member(keyword)
            fault = _keyword_fault(keyword, value, root=node is schema)
            if fault is not None:
                found.append(Violation(place, fault))
                continue
            stack.extend(_subschemas(keyword, value, place))
            if keyword in _REFS:
                refs.append((value, place))
            elif keyword in _ANCHORS:
                anchors.add(value)
    if keywords >= {"unevaluatedProperties", "patternProperties"}:
        # The library would look at them with the patterns of Python, which may take for ever.
        found.append(Violation(path, "must not have both unevaluated- and patternProperties"))
    found.extend(
        Violation(place, "must lead to a schema inside this one, as #/$defs/name")
        for ref, place in refs
        if not _leads_inside(ref, schema, anchors)
    )
    return found[:MAX_VIOLATIONS]


_REFS = frozenset({"$ref", "$dynamicRef"})
_ANCHORS = frozenset({"$anchor", "$dynamicAnchor"})

_Shape: TypeAlias = Callable[[Any], str | None]


def _of(kind: type | tuple[type, ...], words: str) -> _Shape:
    def shape(value: Any) -> str | None:
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        return None if good else f"must be {words}"

    return shape


def _count(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if good else "must be a whole number, not below 0"


def _names(value: Any) -> str | None:
    good = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return None if good and len(set(value)) == len(value) else "must be a list of unique strings"


def _type(value: Any) -> str | None:
    names = [value] if isinstance(value, str) else value
    good = _names(names) is None and names and all(name in _TYPES for name in names)
    return None if good else f"must be one or more of {', '.join(_TYPES)}"


def _pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be a string"
    if len(value) > MAX_PATTERN_LENGTH:
        return f"must be at most {MAX_PATTERN_LENGTH} characters long"
    try:
        _compile(value)
    except re2.error:
        return "must be a regular expression of RE2: no look-around, no back-references"
    return None


def _pattern_keys(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    faults = (_pattern(key) for key in value)
    return next((f"has a bad key: it {fault}" for fault in faults if fault), None)


def _dependencies(value: Any) -> str | None:
    good = isinstance(value, dict) and all(_names(names) is None for names in value.values())
    return None if good else "must be an object of lists of unique strings"


def _positive(value: Any) -> str | None:
    return _number(value) or (None if value > 0 else "must be above 0")


def _dialect(value: Any) -> str | None:
    good = isinstance(value, str) and value.rstrip("#") == DIALECT
    return None if good else f"must be {DIALECT}"


_number = _of((int, float), "a number")
_string = _of(str, "a string")
_flag = _of(bool, "true or false")
_list = _of(list, "a list")
_object = _of(dict, "an object")


def _schemas(value: Any) -> str | None:
    return None if isinstance(value, list) and value else "must be a list of schemas, not empty"


_SUBSCHEMA = frozenset(
    {
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_SUBSCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SUBSCHEMA_MAPS = frozenset(
    {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
)

_SHAPES: Mapping[str, _Shape] = {
    **dict.fromkeys(_SUBSCHEMA_LISTS, _schemas),
    **dict.fromkeys(_SUBSCHEMA_MAPS, _object),
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"], _number),
    **dict.fromkeys(["minLength", "maxLength", "minItems", "maxItems"], _count),
    **dict.fromkeys(["minProperties", "maxProperties", "minContains", "maxContains"], _count),
    **dict.fromkeys(["uniqueItems", "deprecated", "readOnly", "writeOnly"], _flag),
    **dict.fromkeys(["title", "description", "$comment", "format", "$id"], _string),
    **dict.fromkeys(["contentEncoding", "contentMediaType"], _string),
    **dict.fromkeys(["$ref", "$dynamicRef", "$anchor", "$dynamicAnchor"], _string),
    **dict.fromkeys(["enum", "examples"], _list),
    "dependentRequired": _dependencies,
    "multipleOf": _positive,
    "pattern": _pattern,
    "patternProperties": _pattern_keys,
    "required": _names,
    "type": _type,
    "$schema": _dialect,
}


def _keyword_fault(keyword: str, value: Any, *, root: bool) -> str | None:
    if keyword == "$id" and not root:
        return "must not stand inside a schema: references lead inside it only"
    shape = _SHAPES.get(keyword)
    return None if shape is None else shape(value)


def _subschemas(keyword: str, value: Any, place: str) -> Iterator[tuple[Any, str]]:
    if keyword in _SUBSCHEMA:
        yield value, place
    elif keyword in _SUBSCHEMA_LISTS:
        yield from ((item, f"{place}[{index}]") for index, item in enumerate(value))
    elif keyword in _SUBSCHEMA_MAPS:
        yield from ((item, place + member(key)) for key, item in value.items())


def _leads_inside(ref: str, root: Any, anchors: set[str]) -> bool:
    if not ref.startswith("#"):
        return False
    fragment = unquote(ref[1:])
    if fragment and not fragment.startswith("/"):
        return fragment in anchors
    node: Any = root
    for part in fragment.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return False
    return isinstance(node, dict | bool)


# -- does the data fit? ---------------------------------------------------------------------


def violations(schema: JsonObject, data: Any, path: str) -> list[Violation]:
    """What in `data` does not fit `schema`, at most 100; paths begin with `path`.

    `schema` has passed `schema_violations`. One that cannot be applied to the data (it refers to
    itself without end, or needs too many steps) is a violation of the whole.
    """
    _steps_left.set(MAX_STEPS)
    # The registry knows no document and cannot fetch any.
    validator = _Validator(schema, registry=Registry())
    try:
        errors = list(islice(validator.iter_errors(data), MAX_VIOLATIONS))
    except (_TooManySteps, RecursionError):
        return [Violation(path, "takes too long to check against its command type's data_schema")]
    except (Unresolvable, re2.error):
        return [Violation(path, "cannot be checked: its command type's data_schema is not valid")]
    found = (violation for error in errors for violation in _explain(error, path))
    return list(dict.fromkeys(islice(found, MAX_VIOLATIONS)))


class _TooManySteps(Exception):
    """The budget of a check is spent."""


_steps_left: ContextVar[int] = ContextVar("steps_left", default=MAX_STEPS)


def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.max_mem = 1 << 20
    options.log_errors = False
    return re2.compile(pattern, options)


def _check_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, str) and not _compile(pattern).search(value):
        yield ValidationError(f"does not match {pattern}")


def _check_pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: Any, schema: Any
) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    for pattern, subschema in patterns.items():
        search = _compile(pattern).search
        for key, item in value.items():
            if search(key):
                yield from validator.descend(item, subschema, path=key, schema_path=pattern)


def _check_additional_properties(
    validator: Any, allowed: Any, value: Any, schema: Any
) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    searches = [_compile(pattern).search for pattern in schema.get("patternProperties", ())]
    for key, item in value.items():
        if key in schema.get("properties", ()) or any(search(key) for search in searches):
            continue
        if allowed is False:
            yield ValidationError("is not known", path=[key])
        elif allowed is not True:
            yield from validator.descend(item, allowed, path=key)


def _check_required(validator: Any, names: Sequence[str], value: Any, schema: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name in names:
            if name not in value:
                yield ValidationError("is required", path=[name])


def _check_unique_items(validator: Any, unique: bool, value: Any, schema: Any) -> Iterator[Any]:
    # The library compares each with each; in canonical form it takes one pass.
    if unique and isinstance(value, list):
        texts = {json.dumps(item, sort_keys=True) for item in value}
        if len(texts) < len(value):
            yield ValidationError("has items that are alike")


def _counted(keyword: str, check: Any) -> Any:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        left = _steps_left.get() - (len(value) if keyword == "enum" else 1)
        if left < 0:
            raise _TooManySteps
        _steps_left.set(left)
        result: Iterable[Any] | None = check(validator, value, instance, schema)
        return result

    return counted


_CHECKS = {
    **Draft202012Validator.VALIDATORS,
    "additionalProperties": _check_additional_properties,
    "pattern": _check_pattern,
    "patternProperties": _check_pattern_properties,
    "required": _check_required,
    "uniqueItems": _check_unique_items,
}
_Validator: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    validators={keyword: _counted(keyword, check) for keyword, check in _CHECKS.items()},
)


def _explain(error: Any, path: str) -> Iterator[Violation]:
    """What is wrong, in words. Of an anyOf or oneOf it is what its most likely branch finds."""
    likely = _most_likely(error)
    if likely:
        for cause in likely:
            yield from _explain(cause, path)
        return
    where = path
    for part in error.absolute_path:
        where += f"[{part}]" if isinstance(part, int) else member(part)
    text = _describe(error)
    if len(text) > _LONGEST_MESSAGE:
        text = text[: _LONGEST_MESSAGE - 1] + "…"
    yield Violation(where, text)


def _most_likely(error: Any) -> list[Any]:
    """The errors of the branch that the value was most likely meant for; none if this cannot be
    said. A value of a type that a branch does not take was not meant for it, and one with another
    constant (which tells alike objects apart) hardly.
    """
    taken = [branch for branch in _branches(error) if not _types_of_value(branch)]
    if not taken:
        return []
    first, *others = sorted(taken, key=_misfit)
    return [] if others and _misfit(others[0]) == _misfit(first) else first


def _branches(error: Any) -> list[list[Any]]:
    """What each branch of an anyOf or oneOf finds; nothing for any other error."""
    found: dict[Any, list[Any]] = {}
    if error.validator in {"anyOf", "oneOf"}:
        for cause in error.context:
            found.setdefault(cause.schema_path[0], []).append(cause)
    return list(found.values())


def _misfit(branch: list[Any]) -> tuple[int, int]:
    return sum(cause.validator == "const" for cause in branch), len(branch)


def _types_of_value(branch: list[Any]) -> list[str]:
    """The types that a branch takes, if the value is of none of them."""
    return [name for cause in branch if not cause.path for name in _types(cause)]


def _types(error: Any) -> list[str]:
    """The types that the value should be of, if it is of none of them."""
    if error.validator == "type":
        wanted = error.validator_value
        return [wanted] if isinstance(wanted, str) else list(wanted)
    of_branches = [_types_of_value(branch) for branch in _branches(error)]
    return [name for names in of_branches for name in names] if all(of_branches) else []


def _describe(error: Any) -> str:
    if types := _types(error):
        return f"must be of type {' or '.join(dict.fromkeys(types))}"
    match error.validator:
        case "enum":
            return f"must be one of {json.dumps(error.validator_value, ensure_ascii=False)}"
        case "const":
            return f"must be {json.dumps(error.validator_value, ensure_ascii=False)}"
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf":
            return f"breaks {error.validator} {error.validator_value}; it is {error.instance}"
        case "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties":
            return f"breaks {error.validator} {error.validator_value}; it has {len(error.instance)}"
        case _:
            return str(error.message)
