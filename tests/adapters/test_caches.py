"""What keeps predictions, in this process, in Redis, and one before the other: the contract and the rest of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest
import redis as redis_py

from modelserve import plugins
from modelserve.adapters.cache.redis import RedisCache
from modelserve.caching import MemoryCache, Tiers
from modelserve.caching.shared import Shared
from modelserve.errors import BackendUnavailable, ConfigError, MissingDependency
from modelserve.ports import Cache, CacheItem
from modelserve.testing.caches import CacheContract
from tests import servers
from tests.tcp_proxy import tcp_proxy


class TestMemory(CacheContract):
    @pytest.fixture
    def cache(self) -> Cache:
        return plugins.cache("memory://")


class TestRedis(CacheContract):
    @pytest.fixture
    async def cache(self, redis_url: str) -> AsyncIterator[Cache]:
        cache = plugins.cache(redis_url)
        yield cache
        await cache.close()

    async def test_any_bytes_are_kept(self, cache: Cache, model: str) -> None:
        """Values are bytes, whatever they are."""
        await cache.put_many([CacheItem(f"{model}:a", bytes(range(256)), 600.0)])
        assert list(await cache.get_many([f"{model}:a"])) == [bytes(range(256))]


class TwoTiers:
    """Memory before another cache, asked as one cache is."""

    budget_s = 5.0

    def __init__(self, far: Cache) -> None:
        self.far = far
        self._local = MemoryCache()
        self._shared = Shared(far)
        self._tiers = Tiers(self._local, self._shared, chance=lambda: 0.0)

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        near = [self._tiers.get(key) for key in keys]
        kept = await self._tiers.fetch(keys, 600.0)
        return [here or (there and there.payload) for here, there in zip(near, kept, strict=True)]

    async def put_many(self, items: Sequence[CacheItem]) -> None:
        for item in items:
            self._tiers.put([(item.key, item.value)], item.ttl_s)
        while self._shared._writes.waiting or any(lane.batches for lane in self._shared._writes._lanes):  # noqa: ASYNC110  # what it waits for has no event
            await asyncio.sleep(0.001)

    async def clear(self, prefix: str) -> int:
        return max(await self._local.clear(prefix), await self.far.clear(prefix))

    async def ping(self) -> None:
        await self.far.ping()

    async def close(self) -> None:
        await self.far.close()


class TestTwoTiers(CacheContract):
    @pytest.fixture
    async def cache(self, redis_url: str) -> AsyncIterator[Cache]:
        cache = TwoTiers(plugins.cache(f"{redis_url}&budget_ms=1000"))
        yield cache
        await cache._tiers.close()
        await cache.close()


# -- Redis -------------------------------------------------------------------------------------------------


async def test_prefixes_keep_applications_of_one_redis_apart(redis_server: servers.RedisServer) -> None:
    """What is put or cleared under one prefix is not seen under another."""
    ours, theirs = (RedisCache(f"{redis_server.url}?prefix={uuid.uuid4().hex}:") for _ in range(2))
    await ours.put_many([CacheItem("m:a", b"1", 60.0)])
    assert list(await theirs.get_many(["m:a"])) == [None]
    assert await theirs.clear("m:") == 0
    assert list(await ours.get_many(["m:a"])) == [b"1"]
    await asyncio.gather(ours.close(), theirs.close())


async def test_another_type_under_a_key_is_no_value_and_is_replaced(
    redis_server: servers.RedisServer, redis_url: str
) -> None:
    """A list where a value should be is a miss, also among values, and a value can be put in its place."""
    cache = RedisCache(redis_url)
    await cache.put_many([CacheItem("m:b", b"2", 60.0)])
    with redis_py.Redis(port=redis_server.port) as client:
        client.rpush(f"{cache._space}m:a", "x")
    assert list(await cache.get_many(["m:a", "m:b"])) == [None, b"2"]
    await cache.put_many([CacheItem("m:a", b"1", 60.0)])
    assert list(await cache.get_many(["m:a", "m:b"])) == [b"1", b"2"]
    await cache.close()


async def test_values_expire_in_redis_itself(redis_server: servers.RedisServer, redis_url: str) -> None:
    """Every key has a time to live: nothing is left of a server that is gone."""
    cache = RedisCache(redis_url)
    await cache.put_many([CacheItem("m:a", b"1", 60.0), CacheItem("m:b", b"1", 0.0001)])
    await cache.close()
    with redis_py.Redis(port=redis_server.port) as client:
        assert 50_000 < client.pttl(f"{cache._space}m:a") <= 60_000
        assert client.pttl(f"{cache._space}m:b") in {-2, 0, 1}


async def test_a_redis_that_refuses_to_write_is_a_typed_error(
    redis_server: servers.RedisServer, redis_url: str
) -> None:
    """Full memory is ``BackendUnavailable``, in our words."""
    cache = RedisCache(redis_url)
    with redis_py.Redis(port=redis_server.port) as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(BackendUnavailable, match="Redis is unavailable: it refuses the command"):
                await cache.put_many([CacheItem("m:a", b"1", 60.0)])
        finally:
            client.config_set("maxmemory", "0")
    await cache.close()


async def test_a_reply_that_breaks_off_is_a_typed_error_and_the_next_is_right(
    redis_server: servers.RedisServer, redis_url: str
) -> None:
    """Garbage and a reset in place of a reply each cost that reply; afterwards values are right again."""
    async with tcp_proxy(redis_server.port) as proxy:
        cache = RedisCache(redis_url.replace(str(redis_server.port), str(proxy.port)))
        await cache.put_many([CacheItem("m:a", b"1", 60.0)])
        for garbage in (b"!garbage\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
            proxy.garbage = garbage
            with pytest.raises(BackendUnavailable):
                await cache.get_many(["m:a"])
            assert list(await cache.get_many(["m:a"])) == [b"1"]
        proxy.flows.clear()
        reading = asyncio.create_task(cache.get_many(["m:a"]))
        while not proxy._writers:  # noqa: ASYNC110  # what it waits for has no event
            await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(BackendUnavailable):
            await reading
        proxy.flows.set()
        assert list(await cache.get_many(["m:a"])) == [b"1"]
        await cache.close()


async def test_nobody_there_is_a_typed_error() -> None:
    """What does not answer is ``BackendUnavailable``, without host or user in it."""
    cache = plugins.cache(f"redis://someone@127.0.0.1:{servers.free_port()}")
    with pytest.raises(BackendUnavailable, match="Redis is unavailable: no connection") as refused:
        await cache.ping()
    assert "someone" not in str(refused.value)


def test_it_serves_one_event_loop_after_another(redis_url: str) -> None:
    """Closed on one loop, it works on the next: a server may be started again."""
    cache = RedisCache(redis_url)

    async def use(value: bytes) -> Sequence[bytes | None]:
        await asyncio.gather(*(cache.put_many([CacheItem("m:a", value, 60.0)]) for _ in range(3)))
        found = await cache.get_many(["m:a"])
        await cache.close()
        return found

    assert [list(asyncio.run(use(value))) for value in (b"1", b"2")] == [[b"1"], [b"2"]]


# -- URLs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "kafka://host",
        "",
        "redis",
        "redis://host:notaport",
        "redis://host?nonsense=1",
        "redis://me:secret@[half",
        "redis://host?budget_ms=0",
        "redis://host?budget_ms=soon",
        "memory://host",
        "memory://?max_entries=few",
        "memory://?max_bytes=0",
        "memory://?entries=3",
    ],
)
def test_a_url_that_cannot_be_read_is_a_config_error(url: str) -> None:
    """The error says how it is written, and quotes no secret."""
    with pytest.raises(ConfigError, match="cache") as refused:
        plugins.cache(url)
    assert "secret" not in str(refused.value)


def test_a_missing_driver_answers_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for without its driver, the cache names the extra that brings it."""
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(MissingDependency, match=r"pip install 'modelserve\[redis\]'"):
        plugins.cache("redis://localhost")


def test_the_budget_comes_from_the_url() -> None:
    """A read may take five milliseconds, or what the URL says."""
    assert plugins.cache("redis://localhost").budget_s == pytest.approx(0.005)
    assert plugins.cache("redis://localhost?budget_ms=20").budget_s == pytest.approx(0.020)
