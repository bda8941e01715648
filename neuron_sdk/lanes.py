"""Who runs next: a lane has a number of places and a queue by priority, then age. No I/O."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """Places and those who wait for one. Not thread-safe: it belongs to one loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[int, int, T]] = []
        self._left: set[int] = set()
        self._numbers: dict[int, int] = {}
        self.held = False
        """While it is held nobody gets a place."""

    def enter(self, item: T, priority: int, number: int) -> None:
        """Queue by priority, then by `number`: unique, and lower for what is older."""
        self._numbers[id(item)] = number
        heapq.heappush(self._waiting, (-priority, number, item))

    def leave(self, item: T) -> bool:
        """Stop waiting. False if it does not wait: it has its place already."""
        number = self._numbers.pop(id(item), None)
        if number is None:
            return False
        self._left.add(number)
        return True

    def reserve(self) -> bool:
        """Get a place at once, without waiting. False if there is none, or others wait."""
        if self.held or not self._free or self._numbers:
            return False
        self._free -= 1
        return True

    def take(self) -> T | None:
        """Who gets a place now; None if there is no place or nobody waits."""
        while self._waiting and self._free and not self.held:
            _, number, item = heapq.heappop(self._waiting)
            if number in self._left:
                self._left.discard(number)
                continue
            del self._numbers[id(item)]
            self._free -= 1
            return item
        return None

    def give_back(self) -> None:
        """A place is free again."""
        self._free += 1

    def waiting(self) -> int:
        """How many wait."""
        return len(self._numbers)
