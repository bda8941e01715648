"""How a command of the console fails: the lines that a person reads, and the exit codes."""

from __future__ import annotations

EXIT_FAILED = 1
"""The federation refused, or what was ordered did not succeed."""
EXIT_USAGE = 2
"""The command was written wrongly, or there is no key to call with; nothing was asked."""
EXIT_UNAVAILABLE = 3
"""The federation did not answer; the same command may work later."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_PIPE = 141
"""Whoever read our output went away."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, or it did not succeed; 2 wrong usage or no key;"
    " 3 no answer; 130 Ctrl-C."
)


class Failure(Exception):
    """A command cannot go on: lines for people, the first of them the whole story, and a code."""

    def __init__(self, *lines: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.exit_code = exit_code
