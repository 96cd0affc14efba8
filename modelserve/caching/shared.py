"""A cache that other processes use too, used in such a way that it costs a request little and can fail none."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeVar

from modelserve.batching.batcher import Batcher
from modelserve.errors import BackendUnavailable, DeadlineExceeded, ModelServeError, describe
from modelserve.ports import Cache, CacheItem
from modelserve.resilience.breaker import Breaker

T = TypeVar("T")

_log = logging.getLogger("modelserve")
_MOST_KEYS: Final = 512  # in one round trip
_MOST_OF_ONE: Final = 2048  # keys of one request at a time
_MOST_WAITING: Final = 8192
_GRID_S: Final = 0.001
_WRITE_S: Final = 1.0
_OPEN_S: Final = 0.5
_HANG_S: Final = 2.0  # after which a command is given up, whatever the driver's own patience


class Shared:
    """Reads and writes a :class:`Cache` in batches, one at a time in each direction.

    Reads of one turn of the event loop, and those that come while another is on its way, are one round trip. A read
    that takes longer than the cache's budget is a miss for who waits, and goes on: a command that is cancelled would
    cost its connection. Whatever fails is a miss as well, or a value that is not kept.
    """

    def __init__(self, cache: Cache) -> None:
        self._loop = asyncio.get_running_loop()
        self._cache = cache
        self._reading = Breaker(3, first_pause_s=0.5, last_pause_s=5.0)
        self._writing = Breaker(3, first_pause_s=0.5, last_pause_s=5.0)
        self._reads: Batcher[str, bytes | None] = Batcher(
            max_rows=_MOST_KEYS, queue_limit=_MOST_WAITING, grid_s=_GRID_S
        )
        self._writes: Batcher[CacheItem, None] = Batcher(max_rows=_MOST_KEYS, queue_limit=_MOST_WAITING)
        self._reads.add(self._read)
        self._writes.add(self._write)
        self.unread = 0
        """Keys whose reading failed, was late or was not tried."""
        self.unwritten = 0
        """Values whose writing failed or was not tried."""

    async def get_many(self, keys: Sequence[str], deadline: float = math.inf) -> Sequence[bytes | None]:
        """Return what is kept under each key, None for what cannot be had in time. Never raises for the cache.

        The time is over at ``deadline``, if that is before the end of the budget.
        """
        budget_ends = self._loop.time() + self._cache.budget_s
        values: list[bytes | None] = []
        for part in _parts(keys):
            values += await self._get_part(part, budget_ends, deadline)
        return values

    async def _get_part(self, keys: Sequence[str], budget_ends: float, deadline: float) -> Sequence[bytes | None]:
        now = self._loop.time()
        found: Sequence[bytes | Exception | None] = ()
        if self._reading.lets_through(now):
            try:
                found = await self._reads.submit(keys, min(budget_ends, deadline))
            except DeadlineExceeded:
                if deadline >= budget_ends:  # else it was the caller who had no more time
                    self._reading.late(self._loop.time())
            except ModelServeError:
                pass  # too many wait already, or it is being closed
        if not found:
            self.unread += len(keys)
            return [None] * len(keys)
        values = [None if isinstance(each, Exception) else each for each in found]
        self.unread += values.count(None) - found.count(None)
        return values

    def put(self, items: Sequence[CacheItem]) -> None:
        """Have values kept, soon. Does not wait, and drops them where too many wait already."""
        for part in _parts(items):
            self._put_part(part)

    def _put_part(self, items: Sequence[CacheItem]) -> None:
        now = self._loop.time()
        if not self._writing.lets_through(now):
            self.unwritten += len(items)
            return
        try:
            self._writes.submit(items, now + _WRITE_S).add_done_callback(partial(self._written, len(items)))
        except ModelServeError:
            self.unwritten += len(items)

    async def open(self) -> None:
        """Connect, so that the first request need not. One that does not answer is left to the requests to find."""
        try:
            async with asyncio.timeout(_OPEN_S):
                await self._cache.ping()
        except Exception as error:  # noqa: BLE001  # a third party's; predictions do not depend on it
            _log.warning("the cache of predictions does not answer; they are computed: %s", describe(error))

    async def close(self) -> None:
        """Finish what is on its way, within a second, and give up the rest."""
        await asyncio.gather(self._reads.close(), self._writes.close())

    async def _read(self, keys: list[str]) -> Sequence[bytes | None]:
        began = self._loop.time()
        found = await self._tried(self._reading, lambda: self._cache.get_many(keys))
        if len(found) != len(keys):
            self._reading.failed(self._loop.time())
            raise BackendUnavailable("the cache", f"{len(found)} values for {len(keys)} keys")
        if self._loop.time() - began > self._cache.budget_s:
            self._reading.late(self._loop.time())
        else:
            self._succeeded(self._reading)
        return found

    async def _write(self, items: list[CacheItem]) -> Sequence[None]:
        await self._tried(self._writing, lambda: self._cache.put_many(items))
        self._succeeded(self._writing)
        return [None] * len(items)

    async def _tried(self, breaker: Breaker, attempt: Callable[[], Awaitable[T]]) -> T:
        was_open = breaker.open
        try:
            async with asyncio.timeout(_HANG_S):
                return await attempt()
        except Exception as error:
            breaker.failed(self._loop.time())
            if breaker.open and not was_open:
                _log.warning("the cache of predictions fails, it is left alone for a while: %s", describe(error))
            raise BackendUnavailable("the cache", "a command failed") from error

    def _succeeded(self, breaker: Breaker) -> None:
        if breaker.open:
            _log.warning("the cache of predictions is used again")
        breaker.succeeded()

    def _written(self, count: int, writing: asyncio.Future[Sequence[Exception | None]]) -> None:
        if writing.cancelled() or writing.exception() is not None:
            self.unwritten += count
        else:
            self.unwritten += sum(each is not None for each in writing.result())


def _parts(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Divide what one request brings, so that none is refused for being too large for the queue."""
    return (items[start : start + _MOST_OF_ONE] for start in range(0, len(items), _MOST_OF_ONE))
