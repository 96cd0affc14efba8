"""A cache in this process: least recently used goes first, and nothing outlives its time."""

from __future__ import annotations

import math
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from modelserve.errors import ConfigError
from modelserve.ports import CacheItem

MAX_ENTRIES: Final = 100_000
MAX_BYTES: Final = 64 * 1024 * 1024
_OVERHEAD: Final = 400  # bytes that an entry takes besides key and value: objects, links, its place in the table


class MemoryCache:
    """Keeps at most ``max_entries`` values and about ``max_bytes``, keys and bookkeeping included.

    It belongs to one event loop. ``clock`` tells seconds and never goes back.
    """

    budget_s = math.inf

    def __init__(
        self,
        *,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_entries, max_bytes) < 1:
            raise ConfigError("a cache in memory: max_entries and max_bytes must be at least 1")
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # the value, and until when it counts
        self.size = 0
        """Bytes taken, by estimate."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> bytes | None:
        """Return what is kept under a key, if its time is not over."""
        found = self._entries.get(key)
        if found is None:
            return None
        if found[1] <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep a value for so many seconds, in place of whatever was there. One that can never fit is not kept."""
        if key in self._entries:
            self._drop(key)
        size = _size(key, value)
        if size > self._max_bytes or not ttl_s > 0.0:
            return
        self._entries[key] = (value, self._clock() + ttl_s)
        self.size += size
        while self.size > self._max_bytes or len(self._entries) > self._max_entries:
            oldest, (dropped, _) = self._entries.popitem(last=False)
            self.size -= _size(oldest, dropped)

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Return what is kept under each key."""
        return [self.get(key) for key in keys]

    async def put_many(self, items: Sequence[CacheItem]) -> None:
        """Keep each value for its time."""
        for item in items:
            self.put(*item)

    async def clear(self, prefix: str) -> int:
        """Forget every key that begins with ``prefix``; return how many there were."""
        cleared = [key for key in self._entries if key.startswith(prefix)]
        for key in cleared:
            self._drop(key)
        return len(cleared)

    async def ping(self) -> None:
        """It is always there."""

    async def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.size = 0

    def _drop(self, key: str) -> None:
        self.size -= _size(key, self._entries.pop(key)[0])


def from_url(url: str) -> MemoryCache:
    """Return the cache of ``memory://?max_entries=…&max_bytes=…``. Raises ``ConfigError`` for anything else."""
    parts = urllib.parse.urlsplit(url)
    options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    if parts.netloc or parts.path or not options.keys() <= {"max_entries", "max_bytes"}:
        raise ConfigError(
            "the URL of the cache: it is written memory:// or memory://?max_entries=1000&max_bytes=1000000"
        )
    try:
        max_entries = int(options.get("max_entries", MAX_ENTRIES))
        max_bytes = int(options.get("max_bytes", MAX_BYTES))
    except ValueError:
        raise ConfigError("the URL of the cache: max_entries and max_bytes are whole numbers") from None
    return MemoryCache(max_entries=max_entries, max_bytes=max_bytes)


def _size(key: str, value: bytes) -> int:
    return len(key) + len(value) + _OVERHEAD
