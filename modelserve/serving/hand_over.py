"""How a pool takes over from the one before it within the number of replicas: ``reload="replace"``."""

from __future__ import annotations

import asyncio

from modelserve.execution.pool import Pool
from modelserve.execution.supervisor import Prove


class HandOver:
    """Starts and stops a pool, which may take over from the one of ``before``, and may hand over to the next.

    A pool that takes over starts with one replica, for which the other gives up one of its own, and grows to its full
    number when the other is freed. If it is freed first, because it failed or another version is wanted by now, the
    other grows back.
    """

    def __init__(self, pool: Pool, before: HandOver | None = None) -> None:
        self.pool = pool
        self._before = before
        self._lender: HandOver | None = None
        self._growing: asyncio.Task[None] | None = None
        self._lent = asyncio.Lock()
        self.freed = asyncio.Event()

    async def start(self, prove: Prove) -> None:
        """Start the pool, in full or with the replica that it is lent. Call :meth:`stop` also when this raises."""
        if self._before is None:
            await self.pool.start(prove)
            return
        await self._before.lend_replica()
        self._lender = self._before
        await self.pool.start(prove, replicas=1)
        self._growing = asyncio.create_task(self._grow(), name="modelserve-grow")

    async def stop(self) -> None:
        """Free the pool. The lender, if it is still there, has its replica back."""
        if self._growing is not None:
            self._growing.cancel()
            await asyncio.wait([self._growing])
        try:
            await self.pool.stop()
        finally:
            self.freed.set()
            lender, self._lender = self._lender, None
            if lender is not None:
                lender.reclaim_replica()

    async def lend_replica(self) -> None:
        """Give up one replica, if there is more than one, to a pool that is to take over.

        Only one pool can have it at a time: the next waits until it was taken back, so that there are never more
        replicas than the options say.
        """
        await self._lent.acquire()
        try:
            await self.grown()
            if self.pool.size > 1:
                await self.pool.confine(self.pool.size - 1)
        except BaseException:
            self.reclaim_replica()
            raise

    def reclaim_replica(self) -> None:
        """Grow to the full number of replicas again: the pool that was to take over is gone."""
        self._lent.release()
        if not self.freed.is_set():
            self.pool.release()

    async def grown(self) -> None:
        """Wait until the pool may have its full number of replicas, or was stopped before."""
        if self._growing is not None:
            await asyncio.wait([self._growing])

    async def _grow(self) -> None:
        assert self._lender is not None
        await self._lender.freed.wait()
        self._lender = None
        self.pool.release()
