"""What people type: spans, moments, KEY=VALUE pairs and JSON, read or refused with a reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import typer

from federation_server.domain import span as domain_span

_MAX_SPAN = timedelta(days=36600)
_MAX_EXACT = 2**53


def span(text: str) -> timedelta:
    """A length of time: 500ms, 30s, 5m, 2h, 1d, 1h30m.

    Raises:
        typer.BadParameter: it is none.
    """
    length = domain_span.read(text)
    if length is None:
        raise typer.BadParameter(f"{text!r} is not a length of time: write 30s, 5m, 2h or 1d")
    if not timedelta() < length <= _MAX_SPAN:
        raise typer.BadParameter(f"{text!r} must be more than nothing and at most 100 years")
    return length


def overlap(text: str) -> timedelta:
    """How long what is replaced stays good: a length of time, or 0 for not at all.

    Raises:
        typer.BadParameter: it is neither.
    """
    return timedelta() if text in {"0", "0s"} else span(text)


def past(text: str) -> datetime:
    """A moment, or how long ago it was.

    Raises:
        typer.BadParameter: it is neither.
    """
    return datetime.now(UTC) - span(text) if domain_span.read(text) is not None else _moment(text)


def future(text: str) -> datetime:
    """A moment, or how far ahead it is.

    Raises:
        typer.BadParameter: it is neither.
    """
    return datetime.now(UTC) + span(text) if domain_span.read(text) is not None else _moment(text)


def _moment(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a length of time (30s, 5m, 2h, 1d)"
            " nor a time like 2026-01-31T12:00:00Z"
        ) from None
    if at.tzinfo is None:
        raise typer.BadParameter(
            f"{text!r} names no zone: write {at.isoformat()}Z, or +01:00 in place of the Z"
        )
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is out of range") from None


def labels(texts: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE pairs, as text.

    Raises:
        typer.BadParameter: one has no "=", or a key comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, value = _pair(text)
        if key in found:
            raise typer.BadParameter(f"{key} is given twice")
        found[key] = value
    return found


def fields(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE pairs, where a value is JSON if it can be read as such, else text.

    Raises:
        typer.BadParameter: one has no "=", or a key comes twice.
    """
    return {key: _value(key, value) for key, value in labels(texts).items()}


def parameters(texts: Iterable[str], source: str | None) -> dict[str, Any]:
    """A command's parameters: the JSON object of `source` with KEY=VALUE pairs laid over it.

    A dotted key nests: `retry.limit=3` is {"retry": {"limit": 3}}.

    Args:
        texts: the pairs; a value is JSON if it can be read as such, else text. A whole number of
            which digits would be lost is neither.
        source: JSON, "@" and a file's name, or "-" for stdin.

    Raises:
        typer.BadParameter: something of it cannot be read.
    """
    data = _document(source) if source is not None else {}
    given: set[str] = set()
    for text in texts:
        key, value = _pair(text)
        if key in given:
            raise typer.BadParameter(f"{key} is given twice")
        given.add(key)
        _set(data, key, _value(key, value))
    return data


def _pair(text: str) -> tuple[str, str]:
    key, assigned, value = text.partition("=")
    if not assigned or not key:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
    return key, value


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    if not all([*path, last]):
        raise typer.BadParameter(f"{key!r} has an empty part")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise typer.BadParameter(f"{key}: {part} already has a value of its own")
    if isinstance(data.get(last), dict) and not isinstance(value, dict):
        raise typer.BadParameter(f"{key}: it already has parts of its own")
    data[last] = value


def _value(key: str, text: str) -> Any:
    try:
        return _loads(text)
    except _BeyondExact as error:
        hint = f"; in a shell {key}='\"{text}\"'" if text == error.text else ""
        raise typer.BadParameter(f"{key}: {error}{hint}") from None
    except (ValueError, RecursionError):
        return text


def _document(source: str) -> dict[str, Any]:
    text = _read(source)
    try:
        data = _loads(text)
    except RecursionError:
        raise typer.BadParameter("--data is nested too deeply") from None
    except ValueError as error:
        raise typer.BadParameter(f"--data is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise typer.BadParameter("--data must be a JSON object, like '{\"limit\": 10}'")
    return data


def _read(source: str) -> str:
    try:
        if source == "-":
            return sys.stdin.read()
        if source.startswith("@"):
            return Path(source[1:]).read_text("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"--data: {error.strerror}: {source[1:]}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter("--data is not UTF-8 text") from None
    return source


def _loads(text: str) -> Any:
    """JSON without what a Struct cannot hold.

    Raises:
        ValueError: it is not JSON, or a number of it is no finite double or would be rounded.
    """
    return json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=_real)


class _BeyondExact(ValueError):
    """A whole number of which a Struct would lose digits."""

    def __init__(self, text: str) -> None:
        super().__init__(f'{text[:40]} is beyond 2^53: write it as a string, "{text[:40]}"')
        self.text = text


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > _MAX_EXACT:
        raise _BeyondExact(text)
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is not a finite number")
    return value
