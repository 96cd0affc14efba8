"""The dedicated pool of one model version: its replicas behind one batcher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from modelserve.execution.batcher import Batcher, Runner
from modelserve.ports import Replica
from modelserve.signature import unstack
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

    async def start(self) -> None:
        """Load every replica. Raises ``LoadError``, and leaves none behind, if one does not load."""
        started = await asyncio.gather(*(replica.start() for replica in self._replicas), return_exceptions=True)
        for outcome in started:
            if isinstance(outcome, BaseException):
                await self.stop()
                raise outcome
        for replica in self._replicas:
            self._batcher.add(_runner(replica))

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


def _runner(replica: Replica) -> Runner[Row, Json]:
    async def run(rows: list[Row]) -> list[Json]:
        return unstack(await replica.infer(rows), len(rows))

    return run
