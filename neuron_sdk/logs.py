"""Structured logs: JSON lines with an `action` and fields, and never a secret in them.

The SDK logs through the standard library, so a host program that has set up its own logging sees
our records there and nothing else changes. `configure_logging` is for a process that is a neuron
and nothing else: it takes over the root logger, and only `neuron.run()` calls it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO, cast

import msgspec
import structlog

from neuron_sdk.redaction import redact

MAX_FILE_BYTES = 10 * 1024 * 1024
"""A log file is rotated before it grows beyond this."""
KEPT_FILES = 5
"""How many rotated files are kept."""

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_OWN_HANDLER = "neuron_sdk"

Event = MutableMapping[str, Any]


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose fields travel as the standard library's `extra`, secrets taken out.

    It works the same whether or not anybody has configured structlog or logging.
    """
    return cast(
        "structlog.stdlib.BoundLogger",
        structlog.wrap_logger(
            logging.getLogger(name),
            processors=_to_stdlib(),
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        ),
    )


def configure_logging(*, level: str, file: Path | None, json: bool | None = None) -> None:
    """Send the whole process's logs to stderr, and to `file` if there is one.

    Calling it again replaces what it set up; handlers of the host program stay.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL, in any case.
        file: JSON lines go here as well; rotated at 10 MiB, 5 old files are kept.
        json: JSON lines on stderr, or lines for people; None chooses the latter on a terminal.

    Raises:
        ValueError: the level has no such name.
        OSError: the file cannot be written.
    """
    threshold = level.strip().upper()
    if threshold not in _LEVELS:
        raise ValueError(f"LOG_LEVEL {level!r} is unknown: use one of {', '.join(_LEVELS)}")
    handlers = [_stderr_handler(sys.stderr, json)]
    if file is not None:
        handlers.append(_file_handler(file))

    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.name == _OWN_HANDLER]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_OWN_HANDLER)
        root.addHandler(handler)
    root.setLevel(threshold)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=_to_stdlib(),
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def redact_event(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: the event as plain data without secrets."""
    return cast(Event, redact(event))


def _stderr_handler(stream: TextIO, json: bool | None) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    for_people = stream.isatty() if json is None else not json
    handler.setFormatter(_formatter(_console(stream) if for_people else _json_line))
    return handler


def _file_handler(file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(
            file, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise OSError(
            error.errno, f"LOG_FILE cannot be written ({error.strerror}): {file}"
        ) from error
    handler.setFormatter(_formatter(_json_line))
    return handler


def _to_stdlib() -> list[structlog.typing.Processor]:
    """What a structlog event passes on its way to the standard library."""
    return [
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        _redact_fields,
        _avoid_record_attributes,
        structlog.stdlib.render_to_log_kwargs,
    ]


def _redact_fields(_logger: object, _method: str, event: Event) -> Event:
    kept = {key: event.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in event}
    return {**cast(Event, redact(event)), **kept}


def _avoid_record_attributes(_logger: object, _method: str, event: Event) -> Event:
    """`logging` refuses `extra` fields that are named like its own: they get an underscore."""
    for key in _RECORD_ATTRIBUTES.intersection(event) - {"exc_info", "stack_info"}:
        event[f"{key}_"] = event.pop(key)
    return event


def _formatter(render: structlog.typing.Processor) -> logging.Formatter:
    """Formats every record alike, whether it came by structlog or by plain logging."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[
            _add_record,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            redact_event,
            render,
        ],
    )


def _add_record(_logger: object, _method: str, event: Event) -> Event:
    """When, how grave and by whom: from the record, which knows when it was made."""
    record: logging.LogRecord = event["_record"]
    made = datetime.fromtimestamp(record.created, UTC)
    about = {
        "timestamp": made.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
    }
    # Another handler's formatter may have left its own rendering on the record.
    return about | {key: event[key] for key in event if key not in {"message", "asctime"}}


def _console(stream: TextIO) -> structlog.typing.Processor:
    return structlog.dev.ConsoleRenderer(colors=stream.isatty())


def _json_line(_logger: object, _method: str, event: Mapping[str, Any]) -> str:
    return msgspec.json.encode(event).decode()
