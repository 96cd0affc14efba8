"""The contract of a cache, as tests. Inherit :class:`CacheContract` and say what to run it on.

::

    class TestMyCache(CacheContract):
        @pytest.fixture
        async def cache(self) -> AsyncIterator[Cache]: ...
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Final

import pytest

from modelserve.ports import Cache, CacheItem

_LIMIT_S: Final = 20.0
_LONG_S: Final = 600.0


async def until_gone(cache: Cache, key: str) -> None:
    """Ask until there is nothing under a key any more."""
    until = time.monotonic() + _LIMIT_S
    while (await cache.get_many([key]))[0] is not None:
        assert time.monotonic() < until, "a value outlives its time"
        await asyncio.sleep(0.005)


class CacheContract:
    """What is kept can be had, in order and byte for byte, until its time is over."""

    @pytest.fixture
    def model(self) -> str:
        """A name that no other test uses: the place may be shared."""
        return f"m-{uuid.uuid4().hex}"

    async def test_it_satisfies_the_port(self, cache: Cache) -> None:
        """It has the methods of :class:`modelserve.ports.Cache`, a budget, and answers a ping."""
        assert isinstance(cache, Cache)
        assert cache.budget_s > 0.0
        await cache.ping()

    async def test_values_come_back_in_the_order_of_the_keys(self, cache: Cache, model: str) -> None:
        """Each key has its own value, as it was put, and one that was never put has none."""
        values = [b"0.5", b'"\xc3\xa4"', b'{"a":[1,2]}', b"null", b'""']
        await cache.put_many([CacheItem(f"{model}:{i}", value, _LONG_S) for i, value in enumerate(values)])
        keys = [f"{model}:{i}" for i in (4, 2, 9, 0, 3, 1, 2)]
        assert list(await cache.get_many(keys)) == [values[4], values[2], None, *(values[i] for i in (0, 3, 1, 2))]

    async def test_nothing_asked_is_nothing_told(self, cache: Cache) -> None:
        """No keys give no values, and putting nothing does nothing."""
        await cache.put_many([])
        assert list(await cache.get_many([])) == []

    async def test_a_value_is_replaced(self, cache: Cache, model: str) -> None:
        """The last value that was put counts."""
        for value in (b"1", b"2"):
            await cache.put_many([CacheItem(f"{model}:a", value, _LONG_S)])
        assert list(await cache.get_many([f"{model}:a"])) == [b"2"]

    async def test_a_value_ends_with_its_time(self, cache: Cache, model: str) -> None:
        """One with a short time is gone after it; another one, put together with it, is still there."""
        await cache.put_many([CacheItem(f"{model}:short", b"1", 0.02), CacheItem(f"{model}:long", b"2", _LONG_S)])
        await until_gone(cache, f"{model}:short")
        assert list(await cache.get_many([f"{model}:short", f"{model}:long"])) == [None, b"2"]

    async def test_thousands_at_once(self, cache: Cache, model: str) -> None:
        """A large batch is kept and read like a small one."""
        keys = [f"{model}:{i}" for i in range(2500)]
        await cache.put_many([CacheItem(key, b"%d" % i, _LONG_S) for i, key in enumerate(keys)])
        assert list(await cache.get_many(keys)) == [b"%d" % i for i in range(2500)]

    async def test_clearing_takes_what_begins_like_that(self, cache: Cache, model: str) -> None:
        """All of a prefix goes, is counted, and nothing else goes."""
        keys = [f"{model}:{i}" for i in range(2500)]
        await cache.put_many([CacheItem(key, b"1", _LONG_S) for key in [*keys, f"{model}2:a"]])
        assert await cache.clear(f"{model}:") == 2500  # noqa: PLR2004
        assert await cache.clear(f"{model}:") == 0
        assert list(await cache.get_many([keys[0], keys[-1], f"{model}2:a"])) == [None, None, b"1"]

    @pytest.mark.parametrize("trap", ["*:", "[ab]:", "?:", "\\*:"])
    async def test_a_prefix_is_no_pattern(self, cache: Cache, model: str, trap: str) -> None:
        """What means something in the patterns of some store is taken as it is."""
        await cache.put_many([CacheItem(f"{model}{each}:1", b"1", _LONG_S) for each in ("a", "b", trap[:-1])])
        assert await cache.clear(f"{model}{trap}") == 1
        assert list(await cache.get_many([f"{model}a:1", f"{model}b:1"])) == [b"1", b"1"]

    async def test_closing_twice_and_use_afterwards(self, cache: Cache, model: str) -> None:
        """A second close does nothing, and what is asked or put later finds a cache that works."""
        await cache.close()
        await cache.close()
        await cache.put_many([CacheItem(f"{model}:a", b"1", _LONG_S)])
        assert list(await cache.get_many([f"{model}:a"])) == [b"1"]
