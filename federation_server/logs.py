"""How the server logs: one event a line, fields beside it, no secret among them.

Fields and errors hold text that neurons and admins chose. No secret that such a text quotes is
written, and nothing in it begins a line of its own or acts on the terminal that shows it. What
anybody can have written by calling is written so often and no more: a flood fills no disk.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

import orjson
import structlog

from federation_server.domain.text import REDACTED, escape_json, escape_line, without_secrets

Event = MutableMapping[str, Any]

_SECRET_FIELDS = frozenset(
    {"token", "secret", "password", "authorization", "key", "api_key", "enrollment_token"}
)

_ANYBODYS = frozenset({"rpc_refused"})
"""The actions that a stranger can repeat at will."""

MOST_ALIKE = 100
ALIKE_S = 10.0
"""Of those that are alike so many lines are written in so many seconds."""


def configure(level: str, *, json: bool) -> None:
    """Sets up structlog for this process, on standard error.

    level: the least that is logged, as `logging` names it. json: one JSON object a line, else
    lines for people.
    """
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        Alike(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json:
        # Without the frames' variables, which hold requests and secrets.
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        processors += [
            structlog.processors.ExceptionRenderer(transformer),
            _redact,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ]
    else:
        colors = sys.stderr.isatty()
        processors += [
            _exception_for_people,
            _redact,
            _escape_for_people,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_no_exception),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries that speak through `logging` are heard from WARNING on, in the same way.
    logging.basicConfig(level=logging.WARNING, handlers=[_Libraries()], force=True)


class Alike:
    """Drops what is said too often: of RPCs that are refused, by method and reason. The next line
    that is written says how many were left out.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has been said yet; `clock` is in seconds."""
        self._clock = clock
        self._said: dict[tuple[str, ...], tuple[float, int]] = {}
        """When the time began in which lines are counted, and their number since."""

    def __call__(self, _logger: object, _method: str, event: Event) -> Event:
        """The event, or an end of it."""
        if event.get("action") not in _ANYBODYS:
            return event
        kind = tuple(str(event.get(name, "")) for name in ("action", "method", "reason", "level"))
        now = self._clock()
        began, count = self._said.get(kind, (now, 0))
        if now - began >= ALIKE_S:
            if count > MOST_ALIKE:
                event["left_out"] = count - MOST_ALIKE
            began, count = now, 0
        self._said[kind] = (began, count + 1)
        if count >= MOST_ALIKE:
            raise structlog.DropEvent
        return event


class _Libraries(logging.Handler):
    """Logs what a library says as everything else is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        """Passes one record on."""
        try:
            structlog.get_logger(record.name).log(
                record.levelno,
                record.getMessage(),
                action="library",
                logger=record.name,
                exc_info=record.exc_info,
            )
        except Exception:  # noqa: BLE001 - as `logging` does: a log must not end what it tells of
            self.handleError(record)


def _redact(_logger: object, _method: str, event: Event) -> Event:
    for name, value in event.items():
        event[name] = REDACTED if name in _SECRET_FIELDS else _redacted(value)
    return event


def _redacted(value: Any) -> Any:
    match value:
        case str():
            return without_secrets(value)
        case dict():
            return {key: _redacted(each) for key, each in value.items()}
        case list() | tuple():
            return [_redacted(each) for each in value]
    return value


def _exception_for_people(_logger: object, _method: str, event: Event) -> Event:
    """A traceback whose every line is indented, so that none looks like an event."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):  # a library's
        error = error[1]
    if error is not None:
        event["exception"] = "".join(traceback.format_exception(error))
    return event


def _escape_for_people(_logger: object, _method: str, event: Event) -> Event:
    exception = event.pop("exception", None)
    for name, value in event.items():
        event[name] = escape_line(value if isinstance(value, str) else str(value))
    if exception is not None:
        lines = str(exception).rstrip("\n").split("\n")
        event["exception"] = "\n".join(f"    {escape_line(line)}" for line in lines)
    return event


def _no_exception(_stream: object, _error: object) -> None:
    """In the place of a formatter: the exception is text already."""


def _dumps(event: Any, **options: Any) -> str:
    default = options.get("default", str)
    try:
        document = orjson.dumps(event, default=default)
    except orjson.JSONEncodeError:  # half a character, which JSON has no place for
        document = orjson.dumps(_encodable(event), default=default)
    return escape_json(document.decode())


def _encodable(value: Any) -> Any:
    match value:
        case str():
            return escape_line(value)
        case dict():
            return {_encodable(key): _encodable(each) for key, each in value.items()}
        case list():
            return [_encodable(each) for each in value]
    return value
