"""A version whose model the test holds in its hands, and a cache that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from modelserve.batching.batcher import Batcher
from modelserve.caching import MemoryCache
from modelserve.errors import InferenceFailed
from modelserve.ports import CacheItem
from modelserve.serving.version import LoadedVersion
from modelserve.signature import Field, Signature
from modelserve.types import Json, Row
from tests.serving.versions import version_of


class Target:
    """Stands where a loaded version does. Its model answers ``[value]`` to a row, a batch at a time."""

    def __init__(self, *, ttl_s: float = 60.0, timeout_s: float = 1.0, name: str = "m") -> None:
        self.cache_ttl_s = ttl_s
        self.timeout_s = timeout_s
        self.meta = version_of(name)
        self.signature = Signature([Field("x", "int64")])
        self.runs: list[Row] = []
        """Every row that was run."""
        self.gate = asyncio.Event()
        """Clear: the model does not answer."""
        self.gate.set()
        self.fails = False
        self.pool: Batcher[Row, Json] = Batcher(max_rows=64, queue_limit=1024)
        self.pool.add(self._run)

    def cache_key(self, row: Row) -> str:
        return f"{self.meta.model_name}:{row[0]}"

    @property
    def loaded(self) -> LoadedVersion:
        return cast("LoadedVersion", self)

    async def _run(self, rows: list[Row]) -> Sequence[Json]:
        self.runs += rows
        await self.gate.wait()
        if self.fails:
            raise InferenceFailed("no such row")
        return [[row[0]] for row in rows]


class FaultyCache:
    """A cache of another process, as far as anybody can tell. ``flows`` clear: nothing comes back."""

    def __init__(self, budget_s: float = 0.005) -> None:
        self._kept = MemoryCache()
        self.budget_s = budget_s
        self.flows = asyncio.Event()
        self.flows.set()
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.reads: list[list[str]] = []
        self.writes: list[list[CacheItem]] = []
        self.at_once = 0
        self.most_at_once = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Put a value as another process would."""
        self._kept.put(key, value, ttl_s)

    async def clear(self, prefix: str) -> int:
        return await self._kept.clear(prefix)

    async def ping(self) -> None:
        await self._happen()

    async def close(self) -> None:
        """There is nothing to close."""

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        self.reads.append(list(keys))
        await self._happen()
        return await self._kept.get_many(keys)

    async def put_many(self, items: Sequence[CacheItem]) -> None:
        self.writes.append(list(items))
        await self._happen()
        await self._kept.put_many(items)

    async def _happen(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self.flows.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.at_once -= 1


class Turns:
    """Lets the loop turn until something holds."""

    @staticmethod
    async def until(condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # what it waits for has no event
                await asyncio.sleep(0)
