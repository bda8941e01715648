"""Free-form JSON on its way to the federation: made plain, measured, and held to the limits.

On the wire it is a google.protobuf.Struct: numbers are doubles, so integers beyond 2^53 travel as
strings; NaN and infinity cannot travel at all. `plain` does this once for handlers' answers, error
details, metadata and event attributes, and tells the encoded size without encoding anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

MAX_SAFE_INTEGER = 2**53
MAX_RESPONSE_BYTES = 2**20
MAX_RESPONSE_DEPTH = 32
MAX_DETAILS_BYTES = 64 * 2**10
MAX_DETAILS_DEPTH = 16

JsonObject = dict[str, Any]


class NotJson(ValueError):
    """The value has a part that JSON cannot say; the text says which."""


class TooLarge(ValueError):
    """The value is larger, once encoded, than the contract allows."""


def plain(value: Any, *, max_bytes: int, max_depth: int) -> Any:
    """`value` as dicts, lists, strings, numbers, booleans and None that fit on the wire.

    Dataclasses, msgspec Structs, pydantic models, enums, dates, UUIDs, sets, tuples and numpy's
    numbers and arrays become what msgspec (or pydantic, or numpy) makes of them. A NUL becomes
    U+FFFD, because databases cannot keep it.

    Raises:
        NotJson: a part has no JSON form, or is nested deeper than `max_depth`.
        TooLarge: more than `max_bytes`, encoded as a Struct.
    """
    try:
        builtins = msgspec.to_builtins(value, str_keys=True, enc_hook=_encode_foreign)
        walked, size = _walk(builtins, max_depth, "")
    except RecursionError:
        raise NotJson("it contains itself, or is nested too deep") from None
    except NotJson:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise NotJson(str(error)) from None
    if size > max_bytes:
        raise TooLarge(f"{size} bytes encoded, at most {max_bytes} can be sent")
    return walked


def plain_object(value: Mapping[str, Any], *, max_bytes: int, max_depth: int) -> JsonObject:
    """As `plain`, for what must be an object."""
    answer = plain(dict(value), max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(answer, dict):
        raise NotJson("it is no object")
    return answer


def encoded_size(value: JsonObject) -> int:
    """The bytes of what was made plain, as a Struct; a few more at the most."""
    return int(_walk(value, MAX_RESPONSE_DEPTH, "")[1])


def is_small(value: JsonObject) -> bool:
    """Whether what was made plain takes no time to encode: some hundred values, some kilobytes."""
    left = 16_384
    waiting: list[Any] = [value]
    while waiting and left > 0:
        match waiting.pop():
            case dict() as item:
                left -= sum(map(len, item)) + 64 * len(item)
                waiting.extend(item.values())
            case list() as item:
                left -= 64 * len(item)
                waiting.extend(item)
            case str() as item:
                left -= len(item)
    return left > 0


def as_response(value: Any) -> JsonObject:
    """What a handler returned, as a command's response: an object as it is, None as {}, anything
    else as {"result": …}. Raises as `plain`.
    """
    if value is None:
        return {}
    answer = plain(value, max_bytes=MAX_RESPONSE_BYTES, max_depth=MAX_RESPONSE_DEPTH)
    return answer if isinstance(answer, dict) else {"result": answer}


def clean_text(text: str, limit: int) -> str:
    """`text` as it can be sent: no NUL, no lone surrogate, at most `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def tail_bytes(text: str, limit: int) -> str:
    """The end of `text`, at most `limit` bytes of UTF-8, beginning at a whole character."""
    raw = text.replace("\0", "\ufffd").encode("utf-8", "replace")
    return raw[-limit:].decode("utf-8", "ignore") if len(raw) > limit else raw.decode("utf-8")


def _encode_foreign(value: Any) -> Any:
    for name, arguments in (("model_dump", {"mode": "json"}), ("tolist", {})):
        method: Callable[..., Any] | None = getattr(value, name, None)
        if callable(method) and not isinstance(value, type):
            return method(**arguments)
    raise NotJson(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


def _walk(value: Any, levels: int, path: str) -> tuple[Any, int]:
    """`value` made plain, and the size of its google.protobuf.Value in bytes."""
    match value:
        case None | bool():
            return value, 2
        case int() if abs(value) > MAX_SAFE_INTEGER:
            return _walk(str(value), levels, path)
        case float() if not math.isfinite(value):
            raise NotJson(f"{path or 'it'} is {value}, which JSON cannot say")
        case int() | float():
            return value, 9
        case str():
            text = value.replace("\0", "\ufffd")
            return text, _field(len(_utf8(text, path)))
        case dict():
            return _walk_object(value, levels - 1, path)
        case _:
            return _walk_list(value, levels - 1, path)


def _walk_object(value: dict[str, Any], levels: int, path: str) -> tuple[Any, int]:
    _check_levels(levels, path)
    answer, total = {}, 0
    for key, item in value.items():
        name = str(key).replace("\0", "\ufffd")
        answer[name], size = _walk(item, levels, f"{path}.{name}" if path else name)
        total += _field(_field(len(_utf8(name, path))) + _field(size))
    return answer, _field(total)


def _walk_list(value: list[Any], levels: int, path: str) -> tuple[Any, int]:
    _check_levels(levels, path)
    answer, total = [], 0
    for index, item in enumerate(value):
        walked, size = _walk(item, levels, f"{path}[{index}]")
        answer.append(walked)
        total += _field(size)
    return answer, _field(total)


def _check_levels(levels: int, path: str) -> None:
    if levels < 0:
        raise NotJson(f"{path} is nested too deep")


def _utf8(text: str, path: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NotJson(f"{path or 'it'} holds a lone surrogate, which is no text") from None


def _field(size: int) -> int:
    """The bytes of a length-delimited field with that many bytes in it: tag, length, content."""
    return 1 + max(1, (size.bit_length() + 6) // 7) + size
