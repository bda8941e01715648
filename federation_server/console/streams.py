"""A stream that is to be heard to its end, over as many calls as it takes.

One that breaks is opened again, patiently, until whoever listens has heard the end; how the next
one goes on where the last one ended is the opener's.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from federation_server.console.failure import Failure
from federation_server.console.problem import CallFailure
from federation_server.console.render import Output

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PATIENCE_S = 300.0
"""How long a federation may be away before we stop to ask; what was ordered goes on without us."""

FIRST_SILENCE_S = 2.0
LONGEST_SILENCE_S = 30.0
"""How long nothing may be heard before it is wondered at, and again."""


class Story(Protocol[T_co]):
    """What is heard."""

    @property
    def known(self) -> bool:
        """Something was heard, so that asking again finds the same."""

    @property
    def over(self) -> bool:
        """There is nothing more to hear."""

    def open(self) -> Iterator[T_co]:
        """The messages from where the last one ended."""

    def wonder(self) -> None:
        """Nothing has been heard for a while."""


class Listener(Generic[T]):
    """Hears a story to its end."""

    def __init__(self, out: Output, story: Story[T]) -> None:
        """Says on `out` when it has to ask again."""
        self._out = out
        self._story = story

    def messages(self) -> Iterator[T]:
        """What is heard, until the story is over.

        Raises:
            CallFailure: it was refused, or the federation stayed away.
        """
        heard = time.monotonic()
        pause = FIRST_PAUSE_S
        told = False
        while not self._story.over:
            try:
                for message in self._heard():
                    heard, pause, told = time.monotonic(), FIRST_PAUSE_S, False
                    yield message
            except CallFailure as failure:
                away = time.monotonic() - heard
                if not self._story.known or not failure.passing or away > PATIENCE_S:
                    raise
                if not told:
                    told = True
                    self._out.note(f"federation: {failure.lines[0]}; asking again")
                pause = max(pause, failure.retry_after)
            if not self._story.over:
                time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads callers
                pause = min(pause * 2, LONGEST_PAUSE_S)

    def _heard(self) -> Iterator[T]:
        """One stream's messages; in between, silence is wondered at."""
        queue: SimpleQueue[T | Failure | None] = SimpleQueue()

        def listen() -> None:
            try:
                for message in self._story.open():
                    queue.put(message)
            except Failure as failure:
                queue.put(failure)
            else:
                queue.put(None)

        # Nobody waits for it: it ends with the channel.
        threading.Thread(target=listen, name="stream", daemon=True).start()
        silence = FIRST_SILENCE_S
        while True:
            try:
                message = queue.get(timeout=silence)
            except Empty:
                silence = min(silence * 2, LONGEST_SILENCE_S)
                self._story.wonder()
                continue
            if message is None:
                return
            if isinstance(message, Failure):
                raise message
            silence = FIRST_SILENCE_S
            yield message
