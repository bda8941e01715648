"""How the server logs: one event a line, fields beside it, no secret among them."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

_SECRET_FIELDS = frozenset(
    {"token", "secret", "password", "authorization", "key", "api_key", "enrollment_token"}
)


def configure(level: str, *, json: bool) -> None:
    """Sets up structlog for this process, on standard error.

    level: the least that is logged, as `logging` names it. json: one JSON object a line, else
    lines for people.
    """
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    if json:
        processors += [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries that speak through `logging` are heard from WARNING on, in the same place.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


def _redact(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name in _SECRET_FIELDS & event.keys():
        event[name] = "[redacted]"
    return event


def _dumps(event: Any, **options: Any) -> str:
    return orjson.dumps(event, default=options.get("default", str)).decode()
