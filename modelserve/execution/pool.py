"""The dedicated pool of one model version: its replicas behind one batcher."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from modelserve.execution.batcher import Batcher
from modelserve.ports import Replica
from modelserve.types import Json, Row


class Pool:
    """Runs rows on a set of replicas. ``start`` before ``submit``; ``stop`` when the last request has gone."""

    def __init__(
        self,
        make_replica: Callable[[], Replica],
        *,
        replicas: int,
        max_batch_size: int,
        queue_limit: int,
        max_wait_s: float = 0.0,
    ) -> None:
        self._replicas = [make_replica() for _ in range(replicas)]
        self._batcher: Batcher[Row, Json] = Batcher(
            max_rows=max_batch_size, queue_limit=queue_limit, max_wait_s=max_wait_s
        )

    async def start(self, prove: Callable[[Replica], Awaitable[None]]) -> None:
        """Load every replica and ``prove`` it before it takes a row.

        Raises what loading or proving raised, and leaves no replica behind, if one of them fails.
        """
        starts = (_start(replica, prove) for replica in self._replicas)
        started = await asyncio.gather(*starts, return_exceptions=True)
        for outcome in started:
            if isinstance(outcome, BaseException):
                await self.stop()
                raise outcome
        for replica in self._replicas:
            self._batcher.add(replica.infer)

    def submit(self, rows: Sequence[Row], deadline: float) -> asyncio.Future[Sequence[Json | Exception]]:
        """Queue the rows of one request; see :meth:`Batcher.submit`."""
        return self._batcher.submit(rows, deadline)

    async def stop(self) -> None:
        """Fail what waits, finish what runs, free the replicas."""
        await self._batcher.close()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))

    @property
    def alive(self) -> bool:
        """Whether at least one replica can take a batch."""
        return any(replica.alive for replica in self._replicas)

    @property
    def queue_depth(self) -> int:
        """Rows that wait for a replica."""
        return self._batcher.waiting


async def _start(replica: Replica, prove: Callable[[Replica], Awaitable[None]]) -> None:
    await replica.start()
    await prove(replica)
