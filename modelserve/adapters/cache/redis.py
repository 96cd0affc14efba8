"""Cached predictions in Redis, for all processes that are given its URL."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.redis_driver import our_errors, reading_url, socket_options, split_url
from modelserve.errors import ConfigError
from modelserve.ports import CacheItem

_SPACE: Final = "modelserve:predictions:"
_TIMEOUT_S: Final = 1.0
_CONNECTIONS: Final = 4
_BUDGET_MS: Final = 5.0
_PAGE: Final = 1000


class RedisCache:
    """Keeps values in ``redis://``, ``rediss://`` or ``unix://``, as strings that expire.

    The options of the URL are redis-py's, and two of ours: ``prefix`` is put before every key, and a read that takes
    longer than ``budget_ms`` (5) is a miss. Raises ``ConfigError`` for a URL that cannot be read and
    ``MissingDependency`` without redis-py. Nothing is opened before first use, and never more than four connections.
    """

    def __init__(self, url: str) -> None:
        self._redis = plugins.require("redis")
        self._asyncio = plugins.require("redis.asyncio")
        self._url, own = split_url(url, ("prefix", "budget_ms"), "cache")
        self._space = own.get("prefix", "") + _SPACE
        self.budget_s = _milliseconds(own.get("budget_ms", str(_BUDGET_MS))) / 1000
        self._client: Any = None
        self._new_client()

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Return what is kept under each key. A key that holds another type of Redis' has no value here."""
        if not keys:
            return []
        with our_errors():
            values: Sequence[bytes | None] = await self._opened().mget([self._space + key for key in keys])
        return values

    async def put_many(self, items: Sequence[CacheItem]) -> None:
        """Keep each value for its time, in place of whatever was there."""
        with our_errors():
            commands = self._opened().pipeline(transaction=False)
            for key, value, ttl_s in items:
                commands.set(self._space + key, value, px=max(1, int(ttl_s * 1000)))
            await commands.execute()

    async def clear(self, prefix: str) -> int:
        """Forget every key that begins with ``prefix``; return how many there were."""
        count, pattern = 0, _literally(self._space + prefix) + "*"
        with our_errors():
            client, cursor = self._opened(), 0
            while True:
                cursor, names = await client.scan(cursor, match=pattern, count=_PAGE)
                if names:
                    count += await client.unlink(*names)
                if cursor == 0:
                    return count

    async def ping(self) -> None:
        """Ask whether it answers. Raises ``BackendUnavailable``."""
        with our_errors():
            await self._opened().ping()

    async def close(self) -> None:
        """Close the connections. Safe to call twice; later use opens new ones, on whichever event loop that is."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(self._redis.RedisError, OSError):
                await client.aclose()

    def _opened(self) -> Any:
        if self._client is None:
            self._client = self._new_client()
        return self._client

    def _new_client(self) -> Any:
        options: dict[str, Any] = {
            **socket_options(self._url, _TIMEOUT_S),
            "socket_timeout": _TIMEOUT_S,
            "max_connections": _CONNECTIONS,
            "protocol": 2,
            # Whoever asks has a few milliseconds, and a circuit breaker of its own.
            "retry": self._asyncio.retry.Retry(self._redis.backoff.NoBackoff(), 0),
        } | self._anonymous()
        with reading_url("cache"):
            pool = self._asyncio.ConnectionPool.from_url(self._url, **options)
            pool.connection_class(**pool.connection_kwargs)  # connects to nothing, but takes every option or refuses it
        return self._asyncio.Redis.from_pool(pool)

    def _anonymous(self) -> dict[str, None]:
        """Have connections not tell the driver's version: it is looked up on the disk, for each, on the event loop."""
        if hasattr(self._redis, "driver_info"):
            return {"driver_info": None}
        return {"lib_name": None, "lib_version": None}


def _milliseconds(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0.0 < budget <= 1000 * _TIMEOUT_S:
        raise ConfigError(f"the URL of the cache: budget_ms is a number of milliseconds above 0, not {text[:40]!r}")
    return budget


def _literally(text: str) -> str:
    """Escape what has a meaning in a pattern of Redis'."""
    return "".join(f"\\{each}" if each in "*?[]^-\\" else each for each in text)
