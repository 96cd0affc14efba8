"""Clients that ask for the same share one read, and one after another at most one thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from modelserve.errors import BackendUnavailable
from modelserve.resilience.executor import DaemonExecutor
from modelserve.resilience.shared_reads import SharedReads


@pytest.fixture
async def executor() -> AsyncIterator[DaemonExecutor]:
    """Threads enough for two reads at once."""
    executor = DaemonExecutor(2, "modelserve-test")
    yield executor
    executor.shutdown()


async def test_all_who_ask_at_once_share_one_read(executor: DaemonExecutor) -> None:
    """Forty clients cost one read, and so do those that come while it is fresh."""
    reads, values = SharedReads[int](executor, lifetime_s=3600), iter(range(7, 99))
    assert await asyncio.gather(*(reads.get("a", next, values) for _ in range(40))) == [7] * 40
    assert await reads.get("a", next, values) == 7
    assert await reads.get("b", next, values) == 8


async def test_what_is_old_is_read_again(executor: DaemonExecutor) -> None:
    """After its lifetime a read counts no more."""
    reads = SharedReads[int](executor, lifetime_s=0)
    assert [await reads.get("a", lambda each=each: each) for each in range(3)] == [0, 1, 2]


async def test_a_failure_is_shared_too(executor: DaemonExecutor) -> None:
    """A database that fails is not asked again by each client."""
    reads, calls = SharedReads[int](executor, lifetime_s=3600), []

    def fails() -> int:
        calls.append(1)
        raise BackendUnavailable("registry", "away")

    for _ in range(3):
        with pytest.raises(BackendUnavailable):
            await reads.get("a", fails)
    assert calls == [1]


async def test_different_reads_take_one_thread(executor: DaemonExecutor) -> None:
    """However many pages clients ask for, one is read at a time, and few are kept."""
    reads, running, most = SharedReads[int](executor, lifetime_s=3600), threading.Semaphore(1), []

    def read(value: int) -> int:
        most.append(running.acquire(blocking=False))
        running.release()
        return value

    assert await asyncio.gather(*(reads.get(i, read, i) for i in range(200))) == list(range(200))
    assert all(most)
    assert len(reads) <= 64


async def test_a_caller_that_leaves_does_not_end_the_read(executor: DaemonExecutor) -> None:
    """The read goes on for the others."""
    reads, may_end = SharedReads[int](executor), threading.Event()
    first = asyncio.create_task(reads.get("a", lambda: may_end.wait(30) and 7))
    second = asyncio.create_task(reads.get("a", lambda: 8))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    may_end.set()
    assert await second == 7
