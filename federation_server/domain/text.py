"""Text that comes from others, where a person or a terminal reads it, or a log keeps it.

A neuron's texts are data. Shown as they are they could move a terminal's cursor, set its
clipboard, turn what stands beside them around, or begin a line of their own in a log. They may
quote a secret, and be as long as their sender likes.
"""

from __future__ import annotations

import re

HIDDEN = r"\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
"""Characters that hide text, turn it around, or end a line for some readers; for a regex's set."""

_ACTING = re.compile(rf"[\x7f-\x9f{HIDDEN}]")
_UNSEEN = re.compile(rf"[\x00-\x1f\x7f-\x9f{HIDDEN}\ud800-\udfff]")

REDACTED = "[redacted]"

# Whoever writes a text decides how long a pattern looks at it, so none may begin anew within what
# it has looked at: each finds its next place, or fails, in one pass.
_SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(?:fet|fak)_[\w-]{8,}"  # enrollment tokens and API keys that we have made
    r"|(?<![\w-])eyJ[\w-]+\.[\w-]*\.[\w-]*"  # a JWT, as neurons' tokens are
    r"|(?<=://)[^\s/:]*:[^\s/]*(?=@)"  # name and password in a URL
    r"|(?i:(?<=password=)|(?<=bearer ))(?:'(?:[^'\\]|\\.)*'|[^\s']+)"  # libpq, HTTP
)
"""What a secret looks like, wherever it stands."""


def without_secrets(text: str) -> str:
    """The text without what looks like a secret; in a time that grows as the text does."""
    return _SECRETS.sub(REDACTED, text)


def escape_json(document: str) -> str:
    r"""JSON in which what a terminal might act on is written as \uXXXX."""
    return _ACTING.sub(_escape, document)


def escape_line(text: str) -> str:
    r"""The text on one line, in which whatever is no visible character is written as \uXXXX."""
    return _UNSEEN.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
