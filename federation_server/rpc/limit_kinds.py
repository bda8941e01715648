"""The words in which `limit_table.py` limits what holds other things: messages, lists, maps,
Structs, field masks, oneofs; and `Fields`, which says it all of one message type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from federation_server.domain.json_schema import schema_violations
from federation_server.domain.violation import member
from federation_server.rpc.convert import from_struct
from federation_server.rpc.findings import Check, Findings, Path
from federation_server.rpc.limit_values import REQUIRED, Kind, Value, Walk


@dataclass(frozen=True)
class OneOf:
    """A oneof; the member that is set is checked by that field's own limit."""

    name: str
    required: bool = False

    def check(self, fields: Mapping[str, Check]) -> Check:
        """The check of the oneof, out of the checks of its message's fields."""
        name, required = self.name, self.required

        def check(message: Any, path: Path, found: Findings) -> None:
            chosen = message.WhichOneof(name)
            if chosen is not None:
                fields[chosen](message, path, found)
            elif required:
                found.add(path, name, "is required: set one member of it")

        return check


@dataclass(frozen=True)
class Fields:
    """The limits of a message type: a kind for every field but flags (bool)."""

    kinds: Mapping[str, Kind] = field(default_factory=dict)
    one_of: OneOf | None = None
    rules: Sequence[Check] = ()
    """What binds several fields together."""
    max_bytes: int | None = None
    """How large the message may be, encoded."""


@dataclass(frozen=True)
class Nested(Kind):
    """A message, checked by the limits of its type."""

    required: bool = False

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of a field that may be set or not."""
        get, walk, required = attrgetter(name), inner().whole, self.required

        def check(message: Any, path: Path, found: Findings) -> None:
            if message.HasField(name):
                walk(get(message), (path, name, None), found)
            elif required:
                found.add(path, name, REQUIRED)

        return check


@dataclass(frozen=True)
class Masked(Kind):
    """A message of which only the fields that a mask names count, and are checked."""

    mask: str
    known: Sequence[str]

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of those fields, by the limits of the message's type."""
        get, get_mask = attrgetter(name), attrgetter(self.mask)
        checks = {known: one for known, one in inner().fields.items() if known in self.known}

        def check(message: Any, path: Path, found: Findings) -> None:
            nested, where = get(message), (path, name, None)
            for masked in dict.fromkeys(get_mask(message).paths):
                if masked in checks:
                    checks[masked](nested, where, found)

        return check


@dataclass(frozen=True)
class Mask(Kind):
    """A FieldMask of known paths."""

    known: Sequence[str]

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of each path."""
        get, known, words = attrgetter(name), frozenset(self.known), ", ".join(self.known)

        def check(message: Any, path: Path, found: Findings) -> None:
            for index, masked in enumerate(get(message).paths):
                if masked not in known:
                    found.add(((path, name, None), "paths", index), "", f"must be one of {words}")

        return check


@dataclass(frozen=True)
class Many(Kind):
    """A list of values: how many, what each is, and whether all of them differ."""

    most: int
    item: Value
    unique: bool = False

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of the list and of each value in it."""
        get, most, unique = attrgetter(name), self.most, self.unique
        judge = self.item.judge()

        def check(message: Any, path: Path, found: Findings) -> None:
            items = get(message)
            if not items or _too_many(items, most, path, name, found):
                return
            for index, item in enumerate(items):
                fault = judge(item)
                if fault is not None:
                    found.add((path, name, index), "", fault[0], too_large=fault[1])
            if unique:
                note_repeated(items, (path, name), "must be unique", found)

        return check


@dataclass(frozen=True)
class ManyNested(Kind):
    """A list of messages: how many, each by the limits of its type, and which field is unique."""

    most: int
    unique_by: str = ""

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of the list and of each message in it."""
        get, most, walk = attrgetter(name), self.most, inner().whole
        words = f"must be unique by {self.unique_by}"
        key_of = attrgetter(self.unique_by) if self.unique_by else None

        def check(message: Any, path: Path, found: Findings) -> None:
            items = get(message)
            if not items or _too_many(items, most, path, name, found):
                return
            # Held in a list, because protobuf makes its messages anew each time they are read.
            held = list(items)
            for index, item in enumerate(held):
                walk(item, (path, name, index), found)
            if key_of is not None:
                note_repeated(list(map(key_of, held)), (path, name), words, found)

        return check


def note_repeated(
    keys: Sequence[Any], where: tuple[Path, str], words: str, found: Findings
) -> None:
    """Notes every item of a list whose key an item before it has."""
    if len(set(keys)) == len(keys):
        return
    first: dict[Any, int] = {}
    for index, key in enumerate(keys):
        if first.setdefault(key, index) != index:
            found.add((*where, index), "", f"{words}; item {first[key]} is the same")


@dataclass(frozen=True)
class Table(Kind):
    """A map with string keys: how many entries, what keys and values are."""

    most: int
    key: Value
    value: Value

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of the map, its keys and its values."""
        get, most = attrgetter(name), self.most
        judge_key, judge_value = self.key.judge(), self.value.judge()

        def check(message: Any, path: Path, found: Findings) -> None:
            entries = get(message)
            if not entries or _too_many(entries, most, path, name, found):
                return
            for key, value in entries.items():
                fault = judge_key(key)
                if fault is not None:
                    found.add((path, name, key), "", f"has a bad key: it {fault[0]}")
                fault = judge_value(value)
                if fault is not None:
                    found.add((path, name, key), "", fault[0], too_large=fault[1])

        return check


def _too_many(items: Any, most: int, path: Path, name: str, found: Findings) -> bool:
    """Notes it, and says that the items are not to be looked at: this bounds the work."""
    count = len(items)
    if count <= most:
        return False
    found.add(path, name, f"must hold at most {most}; it has {count}", too_large=True)
    return True


@dataclass(frozen=True)
class JsonObject(Kind):
    """A Struct: its size encoded, its depth (objects and lists count; an empty object is one
    level deep), finite numbers, no NUL.
    """

    max_bytes: int
    levels: int

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check of the whole Struct."""
        get, max_bytes, levels = attrgetter(name), self.max_bytes, self.levels

        def check(message: Any, path: Path, found: Findings) -> None:
            if not message.HasField(name):
                return
            struct = get(message)
            size = struct.ByteSize()
            if size > max_bytes:  # and is not walked: this bounds the work
                words = f"must be at most {max_bytes} bytes encoded; it has {size}"
                found.add(path, name, words, too_large=True)
                return
            _check_struct(struct, (path, name, None), levels, found)

        return check


@dataclass(frozen=True)
class JsonSchema(JsonObject):
    """A Struct that is a JSON Schema."""

    def check(self, name: str, inner: Callable[[], Walk]) -> Check:
        """The check as a Struct, and, of one that is in order, as a schema."""
        get, check_struct = attrgetter(name), super().check(name, inner)

        def check(message: Any, path: Path, found: Findings) -> None:
            before = len(found.violations)
            check_struct(message, path, found)
            if len(found.violations) == before and message.HasField(name):
                for fault in schema_violations(from_struct(get(message)), ""):
                    found.add((path, name, None), fault.field.removeprefix("."), fault.description)

        return check


def _check_struct(struct: Any, top: Path, levels: int, found: Findings) -> None:
    # A stack in place of recursion: how deep it is was the sender's choice.
    stack: list[tuple[Any, Path, int]] = [(struct, top, 1)]
    while stack:
        node, path, level = stack.pop()
        if level > levels:
            found.add(top, "", f"must be at most {levels} levels deep")
            return
        for where, value in _members(node, path, found):
            match value.WhichOneof("kind"):
                case "number_value":
                    if not math.isfinite(value.number_value):
                        found.add(where, "", "must be a finite number")
                case "string_value":
                    if "\0" in value.string_value:
                        found.add(where, "", "must not hold a NUL character")
                case "struct_value":
                    stack.append((value.struct_value, where, level + 1))
                case "list_value":
                    stack.append((value.list_value, where, level + 1))


def _members(node: Any, path: Path, found: Findings) -> Iterator[tuple[Path, Any]]:
    """The values in a Struct or a ListValue, each with its path."""
    if node.DESCRIPTOR.name == "ListValue":
        for index, value in enumerate(node.values):
            yield (path, "", index), value
        return
    for key, value in node.fields.items():
        where = (path, member(key).removeprefix("."), None)
        if "\0" in key:
            found.add(where, "", "must not have a NUL character in its name")
        yield where, value
