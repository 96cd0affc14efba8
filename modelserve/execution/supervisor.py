"""One place in a pool: a replica, and after its death the next one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final, TypeAlias

from modelserve.batching.batcher import Batcher, Lane
from modelserve.errors import LoadFailed, WorkerDied
from modelserve.ports import NotRun, Replica
from modelserve.types import Json, ReplicaStatus, Row

_log = logging.getLogger("modelserve")
_DEPTH: Final = 2  # batches in a replica's hands: one runs, the next is there when it ends

Infer: TypeAlias = Callable[[Sequence[Row]], Awaitable[list[Json]]]
Prove: TypeAlias = Callable[[Infer], Awaitable[None]]
"""Warms a fresh replica up through its ``infer`` and shows that it answers. Raises ``LoadError`` if not."""
Intact: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]
"""Surrounds each start of a replica. Raises when what the replica opens cannot be had, or is not what it should be."""


class ReplicaSupervisor:
    """Keeps one replica running, at the ``place`` of that number.

    ``on_death(reason, convicted)`` is called at every death and returns how many seconds to wait before the next start;
    ``convicted`` says that it was the fault of an input which is refused from now on.
    """

    def __init__(
        self,
        make_replica: Callable[[int], Replica],
        place: int,
        batcher: Batcher[Row, Json],
        *,
        prove: Prove,
        start_limit_s: float,
        on_death: Callable[[str, bool], float],
        intact: Intact = contextlib.nullcontext,
    ) -> None:
        self.place = place
        self._make_replica = partial(make_replica, place)
        self._batcher = batcher
        self._prove = prove
        self._start_limit_s = start_limit_s
        self._on_death = on_death
        self._intact = intact
        self._loop = asyncio.get_running_loop()
        self._replica = self._make_replica()
        self._task: asyncio.Task[None] | None = None
        self._start_s = 0.0
        self._state = "starting"
        self.lane: Lane[Row, Json] | None = None
        self.restarts = 0
        self.ready_at = math.inf
        """When it is expected to take batches again, by the loop's time; in the past while it does."""

    async def open(self) -> None:
        """Start the replica, prove it, and let it take batches. Raises ``LoadError`` and leaves nothing behind."""
        await self._bring_up()
        self._task = asyncio.create_task(self._keep(), name="modelserve-supervisor")

    async def close(self) -> None:
        """Take no more batches, finish the ones at hand, free the replica. Safe to call twice."""
        self._state = "leaving"
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.lane is not None:
            await self._batcher.remove(self.lane)
        await self._replica.stop()

    def kill(self, reason: str) -> None:
        """Give up the replica; :meth:`_keep` replaces it once it has ended."""
        self._state = "hung"
        self._replica.kill(reason)

    @property
    def alive(self) -> bool:
        """Whether it takes batches."""
        return self.lane is not None and self._replica.alive

    def status(self) -> ReplicaStatus:
        """Return where it stands."""
        return ReplicaStatus(state=self._state, restarts=self.restarts, detail=self._replica.detail())

    async def _bring_up(self) -> None:
        self._state = "starting"
        began = self._loop.time()
        self.ready_at = began + self._start_s
        try:
            async with self._intact(), asyncio.timeout(self._start_limit_s):
                await self._replica.start()
                await self._prove(self._infer)
        except BaseException as error:
            await asyncio.shield(self._give_up(f"it did not start: {error}"))
            if isinstance(error, TimeoutError):
                raise LoadFailed(f"the model did not start within {self._start_limit_s:.0f} s") from error
            if isinstance(error, WorkerDied | NotRun):
                raise LoadFailed(f"the worker was lost while it was proven: {error}") from error
            raise
        self._start_s = self._loop.time() - began
        self.ready_at = self._loop.time()
        self.lane = self._batcher.add(self._replica.infer, depth=_DEPTH)
        self._state = "ready"

    async def _give_up(self, reason: str) -> None:
        self._replica.kill(reason)
        await self._replica.stop()

    async def _infer(self, rows: Sequence[Row]) -> list[Json]:
        return await self._replica.infer(rows)

    async def _keep(self) -> None:
        """Replace the replica whenever it ends."""
        while True:
            reason = await self._replica.ended()
            convicted = False
            if self.lane is not None:
                convicted = self.lane.convicted
                self._batcher.remove(self.lane)
                self.lane = None
            await self._replica.stop()
            await self._pause(reason, convicted=convicted)
            self._replica = self._make_replica()
            self.restarts += 1
            try:
                await self._bring_up()
            except Exception:  # noqa: BLE001  # whatever it was, it is mourned in the next round
                _log.debug("a worker did not start", exc_info=True)

    async def _pause(self, reason: str, *, convicted: bool) -> None:
        pause = self._on_death(reason, convicted)
        self._state = "waiting"
        self.ready_at = self._loop.time() + pause + self._start_s
        await asyncio.sleep(pause)
