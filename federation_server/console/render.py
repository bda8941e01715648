"""What a command prints: tables and facts for people, JSON for programs.

On a terminal tables have lines and colours and fit its width. In a pipe they have neither, and
one row is one line however long. Data is only ever printed as text: control characters are taken
out, and what looks like rich's markup stays as it is.
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from federation_server.console.wording import clean, clean_lines, escape_json

PIPE_WIDTH = 100_000
"""So wide that nothing is ever broken."""

_STYLES = {
    "ONLINE": "green",
    "ACTIVE": "green",
    "SUCCEEDED": "green",
    "UP": "green",
    "SUSPECT": "yellow",
    "PENDING": "yellow",
    "DEGRADED": "yellow",
    "WARNING": "yellow",
    "CANCELLING": "yellow",
    "CANCELLED": "yellow",
    "STALLED": "yellow",
    "EXPIRED": "yellow",
    "OFFLINE": "red",
    "DEACTIVATED": "red",
    "DOWN": "red",
    "FAILED": "red",
    "REJECTED": "red",
    "TIMED_OUT": "red",
    "OUTCOME_UNKNOWN": "red",
    "ERROR": "red",
    "CRITICAL": "bold red",
}
"""Words that have a colour of their own wherever they stand alone."""


class Output:
    """Where a command's results go: stdout for them, stderr for what is said about them."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self.tty = sys.stdout.isatty()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self.console = Console(
            force_terminal=self.tty,
            no_color=bool(os.environ.get("NO_COLOR")) or None,
            width=None if self.tty else PIPE_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def document(self, message: Message, *, indent: int | None = 2) -> None:
        """Prints a message as proto3 JSON, with the contract's field names."""
        self.object(to_dict(message), indent=indent)

    def object(self, value: Mapping[str, Any], *, indent: int | None = None) -> None:
        """Prints one JSON document; without indent on one line."""
        print(to_json(value, indent=indent), flush=True)  # noqa: T201 - what this is for

    def line(self, text: str | Text = "") -> None:
        """Prints a line."""
        self.console.print(text if isinstance(text, Text) else plain(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """Says something about the results, on stderr."""
        print(clean(text), file=sys.stderr, flush=True)  # noqa: T201 - what this is for

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table."""
        self._print(self.make_table(columns, rows))

    def make_table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
        """A table that fits where it will be printed."""
        table = Table(
            box=box.SIMPLE_HEAD if self.tty else None,
            pad_edge=False,
            padding=(0, 1) if self.tty else (0, 2, 0, 0),
            header_style="bold",
        )
        for column in columns:
            table.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                overflow="fold",
                no_wrap=not self.tty or not column.folds,
                min_width=min(len(column.title), 12),
            )
        for row in rows:
            table.add_row(*map(word, row))
        return table

    def facts(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Prints a titled list of names and values; those without a value are left out."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold", no_wrap=not self.tty)
        for name, value in rows:
            if value:
                grid.add_row(Text("  " + name), word(value))
        if not grid.row_count:
            return
        self.console.print(Text(title, style="bold"))
        self._print(grid)

    def block(self, text: str, *, indent: int = 2) -> None:
        """Prints several lines as they are."""
        for line in clean_lines(text).split("\n"):
            self.console.print(Text(" " * indent + line), soft_wrap=True)

    def _print(self, table: Table) -> None:
        if self.tty:
            self.console.print(table)
            return
        with self.console.capture() as captured:
            self.console.print(table)
        for line in captured.get().splitlines():
            self.console.print(Text(line.rstrip()), soft_wrap=True)


class Column:
    """A table's column."""

    def __init__(self, title: str, *, right: bool = False, folds: bool = False) -> None:
        self.title = title
        self.right = right
        self.folds = folds
        """On a narrow terminal it goes on in the next line; others keep their width."""


def plain(text: str) -> Text:
    """Text on one line that is printed as it is."""
    return Text(clean(text))


def word(text: str) -> Text:
    """As `plain`, in the colour of the state that it names, if it is one."""
    return Text(clean(text), style=_STYLES.get(text, ""))


def to_dict(message: Message) -> dict[str, Any]:
    """A message as proto3 JSON, with the contract's field names; zeros are written out."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that is safe to show on a terminal."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    return escape_json(jsonlib.dumps(value, indent=indent, ensure_ascii=ascii_only))
