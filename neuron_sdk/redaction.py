"""Takes secrets out of what leaves the process: logs, check messages, the status page.

Two rules: a value under a key that names a secret is replaced whole, and in every other string
the parts that look like a secret are. The result is made of plain data only, so that it can be
encoded by any JSON encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

REDACTED: Final = "[redacted]"

_MAX_DEPTH = 8
_MAX_ITEMS = 1_000
_MAX_INT = 2**63 - 1  # beyond it JSON encoders differ

# Anywhere in a key, because "db_password_old" is one too …
_SECRET_WORD = re.compile(
    r"secret|passw|passphrase|authorization|credential|cookie|private_?key|api_?key|admin_?key",
    re.IGNORECASE,
)
# … but a token only at its end: "token_count" and "tokens" are numbers worth reading.
_TOKEN = re.compile(r"(token|jwt|pwd)$", re.IGNORECASE)

_IN_TEXT = (
    # A JWT: two parts of base64url JSON, which begin with {" as eyJ, and a signature.
    (re.compile(r"(?<![\w-])eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*"), REDACTED),
    # The federation's own: enrollment tokens and admin keys.
    (re.compile(r"(?<![A-Za-z0-9])(?:fet|fak)_[\w-]{8,}"), REDACTED),
    (
        # But no placeholder, as in `authorization: Bearer <token>`: that tells people what to send.
        re.compile(
            r"""(authorization["']?\s*[=:]\s*)(?!(?:\w+\s+)?<)(?:\w+\s+)?\S+""", re.IGNORECASE
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b(bearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\1{REDACTED}"),
    # postgresql://user:secret@host; the last @ before a slash ends the password.
    (re.compile(r"(://[^\s/:@]*):[^\s/]+@"), rf"\1:{REDACTED}@"),
    # password=secret in a connection string or a query, quoted or not.
    (
        re.compile(
            r"""((?:passw(?:or)?d|pwd|secret|token|api_?key)["']?\s*[=:]\s*)"""
            r"""(?:"[^"]*"|'[^']*'|[^\s&;,"']+)""",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
)

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


def redact_text(text: str) -> str:
    """`text` with everything in it that looks like a secret replaced, fit for UTF-8."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def redact(value: object) -> Plain:
    """`value` as plain data without secrets; what is too deep or too long is cut off."""
    return _redact(value, _MAX_DEPTH)


def redact_fields(fields: Mapping[str, object]) -> dict[str, Plain]:
    """A log line's fields as plain data without secrets."""
    return {key: _redact_item(key, value, _MAX_DEPTH) for key, value in fields.items()}


def _redact(value: object, depth: int) -> Plain:
    match value:
        case None | bool():
            return value
        case int():
            return value if -_MAX_INT <= value <= _MAX_INT else str(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return redact_text(value)
        case Mapping() | list() | tuple() | set() | frozenset() if depth == 0:
            return "…"
        case Mapping():
            items = list(value.items())[:_MAX_ITEMS]
            return {str(key): _redact_item(str(key), item, depth - 1) for key, item in items}
        case list() | tuple() | set() | frozenset():
            return [_redact(item, depth - 1) for item in list(value)[:_MAX_ITEMS]]
        case _:
            return redact_text(str(value))


def _redact_item(key: str, value: object, depth: int) -> Plain:
    plain_key = key.replace("-", "_")
    named_secret = _SECRET_WORD.search(plain_key) or _TOKEN.search(plain_key)
    if named_secret and not (value is None or isinstance(value, bool)):
        return REDACTED
    return _redact(value, depth)
