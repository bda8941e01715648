"""The newest results by the requests that led to them, so that the same work is done once."""

from __future__ import annotations

import threading
from collections import OrderedDict


class Cache:
    """A thread-safe LRU cache of bytes, bounded by entries and by their size."""

    def __init__(self, *, max_entries: int = 1_000, max_bytes: int = 32 * 1024 * 1024) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> bytes | None:
        """The value, which is the newest now; None if there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value; the oldest fall out if there are too many."""
        with self._lock:
            self._bytes += len(value) - len(self._entries.get(key, b""))
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= len(dropped)

    def clear(self) -> int:
        """Forget everything; returns how many entries there were."""
        with self._lock:
            count = len(self._entries)
            self._entries.clear()
            self._bytes = 0
            return count

    def __len__(self) -> int:
        return len(self._entries)
