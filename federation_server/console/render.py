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
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from federation_server.console.wording import clean, clean_lines
from federation_server.domain.text import escape_json

LARGEST_WHOLE = 2**53
"""Beyond this a double does not hold every whole number."""

PIPE_WIDTH = 100_000
"""So wide that nothing is ever broken."""

WIDE = 100
"""A terminal of fewer columns is narrow."""

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
        self.colored = self.tty and not os.environ.get("NO_COLOR")
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

    def entry(self, head: Text, body: str) -> None:
        """Prints a line whose body goes on below itself where a terminal is too narrow for it."""
        if not self.tty:
            self.line(head + plain(body) if body else plain(head.plain.rstrip()))
            return
        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(head, plain(body))
        self.console.print(grid)

    def drawing(self, text: str) -> None:
        """Prints what was drawn by us, colours and all."""
        print(text, flush=True)  # noqa: T201 - what this is for

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
            padding=(0, 1, 0, 0) if self.tty else (0, 2, 0, 0),
            header_style="bold",
        )
        narrow = self.tty and self.console.width < WIDE
        shown = [index for index, column in enumerate(columns) if not (narrow and column.spare)]
        for column in (columns[index] for index in shown):
            table.add_column(
                plain(column.title),
                justify="right" if column.right else "left",
                overflow="fold",
                no_wrap=not self.tty or not column.folds,
                min_width=min(len(column.title), 12),
            )
        for row in rows:
            table.add_row(*(word(row[index]) for index in shown))
        return table

    def facts(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Prints a titled list of names and values; those without a value are left out."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold", no_wrap=not self.tty)
        for name, value in rows:
            if value:
                grid.add_row(plain("  " + name), word(value))
        if not grid.row_count:
            return
        self.console.print(Text(clean(title), style="bold"))
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


@dataclass(frozen=True)
class Column:
    """A table's column."""

    title: str
    right: bool = False
    """Its values stand to the right, as numbers do."""
    folds: bool = False
    """On a narrow terminal it goes on in the next line; others keep their width."""
    spare: bool = False
    """On a narrow terminal it is left out."""


def plain(text: str) -> Text:
    """Text on one line that is printed as it is."""
    return Text(clean(text))


def word(text: str) -> Text:
    """As `plain`, in the colour of the state that it names, if it is one."""
    return Text(clean(text), style=_STYLES.get(text, ""))


def to_dict(message: Message) -> dict[str, Any]:
    """A message as proto3 JSON, with the contract's field names; zeros are written out."""
    found: dict[str, Any] = _whole(
        MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    )
    return found


def _whole(value: Any) -> Any:
    """JSON in which a double that is a whole number is written as one: 3, not 3.0."""
    match value:
        case dict():
            return {key: _whole(each) for key, each in value.items()}
        case list():
            return [_whole(each) for each in value]
        case float() if value.is_integer() and abs(value) <= LARGEST_WHOLE:
            return int(value)
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that is safe to show on a terminal."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    return escape_json(jsonlib.dumps(value, indent=indent, ensure_ascii=ascii_only))


def struct_json(struct: Struct, *, indent: int | None = None) -> str:
    """A free-form payload as JSON, in the order of its keys: a Struct itself has none."""
    return to_json(_sorted(to_dict(struct)), indent=indent)


def _sorted(value: Any) -> Any:
    match value:
        case dict():
            return {key: _sorted(value[key]) for key in sorted(value)}
        case list():
            return [_sorted(each) for each in value]
    return value
