"""A shared cache under every fault, in virtual time: what it costs who waits, and what it is spared."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from modelserve.caching.shared import Shared
from modelserve.errors import BackendUnavailable
from modelserve.ports import CacheItem
from modelserve.testing.clock import VirtualTimeLoop
from tests.caching.doubles import FaultyCache, Turns

T = TypeVar("T")
LATEST_S = 0.0101  # the budget, and the grid on which deadlines are enforced


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work())


async def took(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Return a result, and the seconds until it was there."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    return await work, loop.time() - began


def keep(cache: FaultyCache, *keys: str) -> None:
    for key in keys:
        cache.put(key, key.encode(), 600.0)


def test_reads_of_one_turn_are_one_round_trip() -> None:
    """Two hundred callers cost one read, and each gets its own."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, *(f"m:{i}" for i in range(0, 200, 2)))
        shared = Shared(cache)
        found = await asyncio.gather(*(shared.get_many([f"m:{i}"]) for i in range(200)))
        assert [list(each) for each in found] == [[f"m:{i}".encode() if i % 2 == 0 else None] for i in range(200)]
        assert len(cache.reads) == 1
        await shared.close()

    run(work)


def test_a_request_of_more_keys_than_may_wait_is_kept_and_read() -> None:
    """As many values of one request are kept as may wait; all keys are read, in several round trips."""

    async def work() -> None:
        cache = FaultyCache(budget_s=10.0)
        shared = Shared(cache)
        keys = [f"m:{i}" for i in range(8192)]
        shared.put([CacheItem(key, key.encode(), 600.0) for key in keys])
        await Turns.until(lambda: len(cache) == len(keys))
        found = await shared.get_many([*keys, *(f"n:{i}" for i in range(1000))])
        assert found == [*(key.encode() for key in keys), *[None] * 1000]
        assert (shared.unread, shared.unwritten) == (0, 0)
        assert max(map(len, cache.reads)) <= 512
        await shared.close()

    run(work)


def test_reads_that_come_while_one_is_on_its_way_share_the_next() -> None:
    """There is one round trip at a time, however many ask."""

    async def work() -> None:
        cache = FaultyCache(budget_s=10.0)
        shared = Shared(cache)
        cache.flows.clear()
        reading = [asyncio.create_task(shared.get_many(["m:0"]))]
        await Turns.until(lambda: cache.reads)
        reading += [asyncio.create_task(shared.get_many([f"m:{i}"])) for i in range(50)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(cache.reads) == 1
        cache.flows.set()
        await asyncio.gather(*reading)
        assert [len(keys) for keys in cache.reads] == [1, 50]
        assert cache.most_at_once == 1
        await shared.close()

    run(work)


def test_writes_of_one_turn_are_one_pipeline() -> None:
    """What a crowd computed is kept by one write."""

    async def work() -> None:
        cache = FaultyCache()
        shared = Shared(cache)
        for i in range(100):
            shared.put([CacheItem(f"m:{i}", b"1", 60.0)])
        await Turns.until(lambda: len(cache) == 100)
        assert [len(items) for items in cache.writes] == [100]
        await shared.close()

    run(work)


def test_a_cache_that_stands_still_costs_a_budget_and_is_then_left_alone() -> None:
    """Nobody waits longer than the budget; a few reads later nobody waits at all, and no second read is begun."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, "m:a")
        shared = Shared(cache)
        cache.flows.clear()
        waits = []
        for _ in range(20):
            (found, waited), _ = await asyncio.gather(took(shared.get_many(["m:a"])), asyncio.sleep(0.06))
            assert list(found) == [None]
            waits.append(waited)
        assert max(waits) <= LATEST_S
        assert sum(waited > 0.0 for waited in waits) < 6
        assert shared.unread == 20
        assert cache.most_at_once == 1
        cache.flows.set()
        await asyncio.sleep(6.0)
        for _ in range(2):
            found = await shared.get_many(["m:a"])
        assert list(found) == [b"m:a"]
        await shared.close()

    run(work)


def test_a_caller_with_less_time_than_the_budget_waits_no_longer() -> None:
    """A read ends with the deadline of who asks, and that is not held against the cache."""

    async def work() -> None:
        cache = FaultyCache(budget_s=1.0)
        shared = Shared(cache)
        cache.delay_s = 0.1
        for _ in range(10):
            found, waited = await took(shared.get_many(["m:a"], asyncio.get_running_loop().time() + 0.01))
            assert list(found) == [None]
            assert waited <= 0.0151
            await asyncio.sleep(0.2)
        assert len(cache.reads) == 10
        await shared.close()

    run(work)


def test_a_caller_that_goes_cancels_no_command() -> None:
    """A cancelled read leaves the round trip running, for it would cost the connection; the others get theirs."""

    async def work() -> None:
        cache = FaultyCache(budget_s=10.0)
        keep(cache, "m:a", "m:b")
        shared = Shared(cache)
        cache.flows.clear()
        goes, stays = (asyncio.create_task(shared.get_many([key])) for key in ("m:a", "m:b"))
        await Turns.until(lambda: cache.reads)
        goes.cancel()
        await asyncio.wait([goes])
        assert cache.at_once == 1
        cache.flows.set()
        assert list(await stays) == [b"m:b"]
        await shared.close()

    run(work)


@pytest.mark.parametrize("error", [BackendUnavailable("Redis", "no connection"), RuntimeError("a bug"), OSError()])
def test_what_fails_is_a_miss_and_soon_not_asked(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Errors of any kind reach nobody. After a pause one attempt finds it well. The log has a line for each change."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, "m:a")
        shared = Shared(cache)
        cache.error = error
        for _ in range(20):
            assert list(await shared.get_many(["m:a"])) == [None]
            shared.put([CacheItem("m:b", b"1", 60.0), CacheItem("m:c", b"1", 60.0)])
            await asyncio.sleep(0.06)
        assert len(cache.reads) <= 5
        assert len(cache.writes) <= 5
        assert (shared.unread, shared.unwritten) == (20, 40)
        cache.error = None
        await asyncio.sleep(6.0)
        assert list(await shared.get_many(["m:a"])) == [b"m:a"]
        await shared.close()

    with caplog.at_level(logging.WARNING, logger="modelserve"):
        run(work)
    assert sum("the cache of predictions fails" in message for message in caplog.messages) == 2  # reads, and writes
    assert sum("is used again" in message for message in caplog.messages) == 1


def test_a_cache_that_does_not_take_values_is_still_read() -> None:
    """Writes that fail, as on a full or a read-only Redis, hold up no read."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, "m:a")
        shared = Shared(cache)
        for _ in range(10):
            cache.error = BackendUnavailable("Redis", "it refuses the command")
            shared.put([CacheItem("m:b", b"1", 60.0)])
            await asyncio.sleep(0.06)
            cache.error = None
            assert list(await shared.get_many(["m:a"])) == [b"m:a"]
        assert shared.unread == 0
        await shared.close()

    run(work)


def test_a_cache_that_is_slow_costs_a_budget_and_is_left_alone() -> None:
    """Answers that come after the budget are misses, and not worth asking for."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, "m:a")
        shared = Shared(cache)
        cache.delay_s = 0.02
        for _ in range(40):
            (found, waited), _ = await asyncio.gather(took(shared.get_many(["m:a"])), asyncio.sleep(0.06))
            assert list(found) == [None]
            assert waited <= LATEST_S
        assert len(cache.reads) < 8
        await shared.close()

    run(work)


def test_another_number_of_values_than_keys_is_no_answer() -> None:
    """A cache that gives too few values gives none."""

    async def work() -> None:
        cache = FaultyCache()
        keep(cache, "m:a", "m:b")

        async def short(keys: Any) -> list[bytes | None]:
            values: list[bytes | None] = [b"m:b"]
            return values[: len(keys) - 1]

        cache.get_many = short  # type: ignore[method-assign]
        shared = Shared(cache)
        assert list(await shared.get_many(["m:a", "m:b"])) == [None, None]
        await shared.close()

    run(work)


def test_closing_ends_a_command_that_hangs() -> None:
    """A cache that stands still holds up the end of a server by a second at most, in each direction at once."""

    async def work() -> None:
        cache = FaultyCache()
        shared = Shared(cache)
        cache.flows.clear()
        shared.put([CacheItem("m:b", b"1", 60.0)])
        await shared.get_many(["m:a"])
        _, waited = await took(shared.close())
        assert waited <= 1.1
        assert cache.at_once == 0
        assert list(await shared.get_many(["m:a"])) == [None]
        shared.put([CacheItem("m:b", b"1", 60.0)])

    run(work)


def test_opening_does_not_wait_for_what_stands_still(caplog: pytest.LogCaptureFixture) -> None:
    """A server starts within half a second more, and the log says what does not answer."""

    async def work() -> None:
        cache = FaultyCache()
        cache.flows.clear()
        shared = Shared(cache)
        _, waited = await took(shared.open())
        assert waited <= 0.5
        await shared.close()

    with caplog.at_level(logging.WARNING, logger="modelserve"):
        run(work)
    assert "does not answer; they are computed" in caplog.text
