"""Texts that would act on who shows them, and messages that are full of them."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

TEXT = (
    "evil"
    "\x1b[666;31m"  # colour
    "\x1b]52;c;Zm9v\x07"  # OSC 52: the clipboard
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\"  # OSC 8: a link
    "\x1bPq#0\x1b\\"  # DCS: a picture
    "\x1bc"  # reset
    "\x9b666m\x90q\x9c"  # the same by single C1 controls
    "\x00\x07\x08\x0b\x0c\x7f"
    "\r\nforged line\u2028forged\u0085forged"
    "\u202egnol\u202c\u2066\u200b\ufeff"  # turned around, hidden
    "[bold red]markup[/] %s {0} $(id) `id`"
)

NEVER_SHOWN = (
    *("\x1b]", "\x1bP", "\x1bc", "\x1b[666", "\x9b", "\x90", "\x9c", "\x85"),
    *("\x00", "\x07", "\x08", "\x0b", "\x0c", "\x7f", "\r\n", "\u2028"),
    *("\u202e", "\u202c", "\u2066", "\u200b", "\ufeff"),
)
"""What of it no terminal may get."""

_FULLY = ("SUCCEEDED", "ONLINE", "ACTIVE")
"""The values to choose, so that what follows a command comes to its end."""


def fill(message: Message, *, deep: int = 8) -> None:
    """Sets every field of a message: each text is TEXT, each list has an item."""
    fields: list[FieldDescriptor] = [*message.DESCRIPTOR.fields]
    for field in fields:
        if field.name != "next_page_token":
            _fill(message, field, deep)


def _fill(message: Any, field: FieldDescriptor, deep: int) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        value = kind.fields_by_name["value"]
        held = getattr(message, field.name)
        if value.message_type is None:
            held[TEXT] = _scalar(value)
        elif deep:
            fill(held[TEXT], deep=deep - 1)
    elif kind is not None and kind.full_name == "google.protobuf.Value":
        message.values.add().string_value = TEXT
    elif kind is not None and kind.full_name in {
        "google.protobuf.Timestamp",
        "google.protobuf.Duration",
    }:
        held = getattr(message, field.name)
        held = held.add() if field.is_repeated else held
        held.seconds = 1_790_000_000 if kind.name == "Timestamp" else 5
    elif kind is not None:
        if deep:
            held = getattr(message, field.name)
            fill(held.add() if field.is_repeated else held, deep=deep - 1)
    elif message.DESCRIPTOR.full_name == "google.protobuf.Value":
        message.string_value = TEXT
    elif field.is_repeated:
        getattr(message, field.name).append(_scalar(field))
    else:
        setattr(message, field.name, _scalar(field))


def _scalar(field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return TEXT
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return _enum(field.enum_type)
        case FieldDescriptor.CPPTYPE_BOOL:
            return True
        case _:
            return 1


def _enum(kind: EnumDescriptor) -> int:
    for name, value in kind.values_by_name.items():
        if name.endswith(_FULLY):
            return value.number
    return max(kind.values_by_number)
