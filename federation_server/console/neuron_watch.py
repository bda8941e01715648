"""`federation neurons watch`: the fleet as it is, again and again.

It asks for the list at each turn and shows what it was told: a table on a terminal, in a pipe one
JSON line for each neuron that was added, changed or removed. A federation that is away is asked
again until it is back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from rich.console import Group
from rich.live import Live

from federation.v1 import fleet_service_pb2 as pb
from federation_server.console import neuron_view
from federation_server.console.problem import CallFailure
from federation_server.console.render import Output, plain, to_dict

if TYPE_CHECKING:
    from federation.v1.neuron_pb2 import Neuron
    from federation_server.console.leaf import Session

ROWS_AROUND_TABLE = 6
"""Lines of the screen that are not the table's rows."""


class _View(Protocol):
    def shows(self) -> int:
        """How many neurons can be shown; 0: all."""

    def update(self, answer: pb.ListNeuronsResponse) -> None:
        """Shows what the federation answered."""

    def lost(self, why: str) -> None:
        """Says that the federation is away; only the first time is worth a word."""


def watch(session: Session, *, filter_text: str, order_by: str, interval: float) -> None:
    """Shows the neurons until it is interrupted.

    Raises:
        CallFailure: the federation refused, or it was not there in the first place.
    """
    federation = session.federation
    request = pb.ListNeuronsRequest(filter=filter_text, order_by=order_by)
    with _view(session.out) as view:
        known = False
        while True:
            pause = interval
            try:
                answer = federation.pages(
                    federation.fleet.ListNeurons, request, "neurons", limit=view.shows()
                )
                known = True
                view.update(answer)
            except CallFailure as failure:
                if not (known and failure.passing):
                    raise
                view.lost(failure.lines[0])
                pause = max(interval, failure.retry_after)
            time.sleep(pause)


@contextmanager
def _view(out: Output) -> Iterator[_View]:
    if out.json or not out.tty:
        yield _Changes(out)
        return
    with Live(console=out.console, auto_refresh=False, vertical_overflow="crop") as live:
        yield _Screen(out, live)


class _Screen:
    """A table that stays in its place."""

    def __init__(self, out: Output, live: Live) -> None:
        self._out = out
        self._live = live
        self._answer = pb.ListNeuronsResponse()
        self._seen = datetime.now(UTC)

    def shows(self) -> int:
        """As many as the terminal has room for."""
        return max(self._out.console.height - ROWS_AROUND_TABLE, 1)

    def update(self, answer: pb.ListNeuronsResponse) -> None:
        """Puts the new table in the old one's place."""
        self._answer = answer
        self._seen = datetime.now(UTC)
        self._draw("")

    def lost(self, why: str) -> None:
        """Leaves the old table and says how old it is."""
        away = round((datetime.now(UTC) - self._seen).total_seconds())
        self._draw(f"as it was {away} s ago: {why}")

    def _draw(self, trouble: str) -> None:
        table = self._out.make_table(
            neuron_view.COLUMNS, map(neuron_view.row, self._answer.neurons)
        )
        more = ", and more than fit here" if self._answer.next_page_token else ""
        at = self._seen.astimezone().strftime("%H:%M:%S")
        count = len(self._answer.neurons)
        foot = f"{at}  {count} {'neuron' if count == 1 else 'neurons'}{more}  Ctrl-C ends"
        self._live.update(Group(table, plain(foot), plain(trouble)), refresh=True)


class _Changes:
    """One line of JSON for each change."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._neurons: dict[str, Neuron] = {}
        self._away = False

    def shows(self) -> int:
        """All of them."""
        return 0

    def update(self, answer: pb.ListNeuronsResponse) -> None:
        """Prints what is different from the last time."""
        if self._away:
            self._away = False
            self._out.note("the federation is back")
        found = {neuron.neuron_id: neuron for neuron in answer.neurons}
        for neuron_id, neuron in found.items():
            if neuron_id not in self._neurons:
                self._print("added", neuron)
            elif neuron != self._neurons[neuron_id]:
                self._print("changed", neuron)
        for neuron_id, neuron in self._neurons.items():
            if neuron_id not in found:
                self._print("removed", neuron)
        self._neurons = found

    def lost(self, why: str) -> None:
        """Says once, on stderr, that nothing is heard."""
        if not self._away:
            self._away = True
            self._out.note(f"federation: {why}; asking again")

    def _print(self, change: str, neuron: Neuron) -> None:
        self._out.object({"change": change, "neuron": to_dict(neuron)})
