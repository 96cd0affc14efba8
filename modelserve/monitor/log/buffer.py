"""A queue with bounds in rows and in bytes, which refuses at once what has no room."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Entry(NamedTuple, Generic[T]):
    """Something that waits, and the room it takes."""

    item: T
    rows: int
    size: int


class Buffer(Generic[T]):
    """Takes from one thread and gives to another. What was taken out holds its room until it is released."""

    def __init__(self, *, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._entries: deque[Entry[T]] = deque()
        self._lock = threading.Lock()
        self._size = 0
        self.rows = 0
        """Rows that wait or are being dealt with."""

    def put(self, item: T, rows: int, size: int) -> bool:
        """Take an item of so many rows and bytes; False when it has no room. Does not wait."""
        with self._lock:
            if self.rows + rows > self._max_rows or self._size + size > self._max_bytes:
                return False
            self.rows += rows
            self._size += size
            self._entries.append(Entry(item, rows, size))
        return True

    def take(self, max_rows: int, max_bytes: int) -> list[Entry[T]]:
        """Return the oldest items, as many as fit both bounds, and one if there is any."""
        taken: list[Entry[T]] = []
        with self._lock:
            while self._entries:
                entry = self._entries[0]
                max_rows, max_bytes = max_rows - entry.rows, max_bytes - entry.size
                if taken and min(max_rows, max_bytes) < 0:
                    break
                taken.append(self._entries.popleft())
        return taken

    def release(self, entries: list[Entry[T]]) -> None:
        """Give back the room of items that were taken out."""
        with self._lock:
            self.rows -= sum(entry.rows for entry in entries)
            self._size -= sum(entry.size for entry in entries)
