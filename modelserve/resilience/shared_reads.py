"""Reads of the registry that many clients ask for: one for all who ask the same, kept for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from modelserve.resilience.executor import DaemonExecutor, call_with_timeout

T = TypeVar("T")
LIFETIME_S: Final = 1.0
_MOST_KEPT: Final = 64


class SharedReads(Generic[T]):
    """Answers from what was read within the last second, a failure too; else it reads, one thing at a time.

    One at a time, so that clients never occupy all the threads that the server itself asks the registry in. It belongs
    to one event loop.
    """

    def __init__(self, executor: DaemonExecutor, *, lifetime_s: float = LIFETIME_S) -> None:
        self._executor = executor
        self._lifetime_s = lifetime_s
        self._loop = asyncio.get_running_loop()
        self._one_at_a_time = asyncio.Lock()
        self._reads: dict[Any, tuple[asyncio.Task[T], float]] = {}

    def __len__(self) -> int:
        return len(self._reads)

    async def get(self, key: Any, read: Callable[..., T], *args: Any) -> T:
        """Return what ``read`` returns, or raise what it raises; a caller that leaves does not end it for others."""
        task, expires = self._reads.get(key, (None, 0.0))
        if task is None or (task.done() and expires <= self._loop.time()):
            task = asyncio.create_task(self._read(key, read, args), name="modelserve-read")
            task.add_done_callback(_looked_at)
            self._reads[key] = (task, 0.0)
        return await asyncio.shield(task)

    async def _read(self, key: Any, read: Callable[..., T], args: tuple[Any, ...]) -> T:
        try:
            async with self._one_at_a_time:
                return await call_with_timeout(self._executor, read, *args)
        finally:
            self._keep(key)

    def _keep(self, key: Any) -> None:
        """Let the read that ends now be used for a while, and forget the oldest beyond a bound."""
        task, _ = self._reads.pop(key)
        self._reads[key] = (task, self._loop.time() + self._lifetime_s)
        done = [each for each, (other, _) in self._reads.items() if other.done()]
        for each in done[: max(0, len(self._reads) - _MOST_KEPT)]:
            del self._reads[each]


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Take note of a failure, which may have no caller any more to raise it to."""
    if not task.cancelled():
        task.exception()
