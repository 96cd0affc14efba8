"""Memory before what is shared: two caches as one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from modelserve.caching.envelope import Kept, opened, sealed
from modelserve.caching.memory import MemoryCache
from modelserve.caching.shared import Shared
from modelserve.ports import CacheItem

LOCAL_S: Final = 10.0
"""How long a process keeps its own copy of a shared value: how long one that was cleared may still be answered."""
_JITTER: Final = 0.1


def split(ttl_s: float) -> tuple[float, float]:
    """Return how long the shared cache keeps a value, and a process its copy: together no longer than ``ttl_s``."""
    local_s = min(LOCAL_S, ttl_s / 2)
    return ttl_s - local_s, local_s


class Tiers:
    """Keeps JSON values by key, for a time that ``chance`` (0 to 1) shortens by up to a tenth.

    Without that, what was put at one moment would be missing at one moment.
    """

    def __init__(
        self,
        local: MemoryCache,
        shared: Shared | None = None,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._local = local
        self._shared = shared
        self._chance = chance
        self.get = local.get
        """Return the JSON that this process keeps under a key, or None. Does not wait."""

    @property
    def has_more(self) -> bool:
        """Whether what is not in this process may be elsewhere."""
        return self._shared is not None

    @property
    def failures(self) -> Mapping[str, int]:
        """How many keys of the shared cache could not be read, and how many values not be written."""
        return {} if self._shared is None else {"read": self._shared.unread, "write": self._shared.unwritten}

    async def fetch(self, keys: Sequence[str], ttl_s: float, deadline: float = math.inf) -> Sequence[Kept | None]:
        """Return what the shared cache has under each key by ``deadline``, and keep a copy of it here."""
        if self._shared is None:
            return [None] * len(keys)
        found = await self._shared.get_many(keys, deadline)
        kept = [opened(key, each) for key, each in zip(keys, found, strict=True)]
        _, local_s = split(ttl_s)
        for key, each in zip(keys, kept, strict=True):
            if each is not None:
                self._local.put(key, each.payload, self._shortened(local_s))
        return kept

    def put(self, values: Sequence[tuple[str, bytes]], ttl_s: float) -> None:
        """Keep JSON values for ``ttl_s`` at most. Does not wait for the shared cache."""
        shared_s, local_s = (0.0, ttl_s) if self._shared is None else split(ttl_s)
        for key, payload in values:
            self._local.put(key, payload, self._shortened(local_s))
        if self._shared is not None and values:
            self._shared.put([CacheItem(key, sealed(key, each), self._shortened(shared_s)) for key, each in values])

    async def open(self) -> None:
        """Connect to the shared cache."""
        if self._shared is not None:
            await self._shared.open()

    async def close(self) -> None:
        """Finish what is on its way to the shared cache, within a second."""
        if self._shared is not None:
            await self._shared.close()

    def _shortened(self, ttl_s: float) -> float:
        return ttl_s * (1.0 - _JITTER * self._chance())
