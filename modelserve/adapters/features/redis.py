"""Features in Redis: a hash per row, read by one pipeline of HMGETs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.redis_driver import BACKEND, in_short, our_errors, reading_url, socket_options, split_url
from modelserve.errors import BackendUnavailable
from modelserve.features.layout import TIME, decoded, row_id, time_of
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow

_ROOT: Final = "modelserve:features:"
_LIMIT_S: Final = 1.0  # a read that has not ended by then loses its connection
_WRITE_LIMIT_S: Final = 10.0
_CONNECTIONS: Final = 8


class RedisFeatures:
    """Keeps the row ``user_id:42`` in the hash ``modelserve:features:user_id:42`` of ``redis://``, ``rediss://``, ``unix://``.

    The options of the URL are redis-py's, and ``prefix``, which is put before the name of each hash. Reading is of one
    event loop and holds at most eight connections; writing has its own. Raises ``ConfigError`` for a URL that cannot
    be read and ``MissingDependency`` without redis-py. Nothing is opened before first use.
    """

    def __init__(self, url: str) -> None:
        self._redis = plugins.require("redis")
        self._aio = plugins.require("redis.asyncio")
        self._url, own = split_url(url, ("prefix",), "features")
        self._root = own.get("prefix", "") + _ROOT
        self._reader: Any = None
        self._writer = self._client_of(self._redis, _WRITE_LIMIT_S)
        self._client_of(self._aio, _LIMIT_S)  # takes every option, or refuses it now

    async def read(self, wanted: Sequence[FeatureKey], within_s: float) -> Sequence[FeatureRow | BackendUnavailable]:  # noqa: ARG002  # nothing is tried again
        """Read many rows in one round trip. A key that holds something else than a hash fails alone."""
        if self._reader is None:
            self._reader = self._client_of(self._aio, _LIMIT_S)
        commands = b"".join(_hmget(self._root + row_id(key.group, key.key), key.names) for key in wanted)
        with our_errors():
            async with asyncio.timeout(_LIMIT_S):
                answers = await self._ask(self._reader.connection_pool, commands, len(wanted))
        return [self._row(answer) for answer in answers]

    async def _ask(self, pool: Any, commands: bytes, count: int) -> list[Any]:
        """Send commands and return as many answers. The client's own pipeline takes four times as long to pack them."""
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command([commands])
            return [await self._answer(connection) for _ in range(count)]
        except BaseException:
            await connection.disconnect(nowait=True)  # what is still to come on it answers nobody else
            raise
        finally:
            await pool.release(connection)

    async def _answer(self, connection: Any) -> Any:
        try:
            return await connection.read_response()
        except self._redis.ResponseError as error:
            return error

    def write(self, records: Sequence[FeatureRecord]) -> None:
        """Write rows, each in place of the one before it, in one transaction."""
        pipeline = self._writer.pipeline(transaction=True)
        for record in records:
            name = self._root + row_id(record.group, record.key)
            pipeline.delete(name)
            pipeline.hset(name, mapping={**record.values, TIME: repr(record.written_at)})
        with our_errors():
            pipeline.execute()

    def ping(self) -> None:
        """Ask whether it answers. Raises ``BackendUnavailable``."""
        with our_errors():
            self._writer.ping()

    async def close(self) -> None:
        """Close the connections. Safe to call twice; later use opens new ones, in the loop that runs then."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.aclose()
        self._writer.close()

    def _row(self, answer: Any) -> FeatureRow | BackendUnavailable:
        if isinstance(answer, Exception):
            return BackendUnavailable(BACKEND, in_short(answer))
        *values, written_at = answer
        return FeatureRow(tuple(map(decoded, values)), time_of(written_at))

    def _client_of(self, driver: Any, limit_s: float) -> Any:
        backoff = plugins.require("redis.backoff")
        retries = plugins.require("redis.retry" if driver is self._redis else "redis.asyncio.retry")
        options: dict[str, Any] = {
            **socket_options(self._url, limit_s),
            "socket_timeout": limit_s if driver is self._redis else None,  # reads have a limit as a whole
            "retry": retries.Retry(backoff.NoBackoff(), 1 if driver is self._redis else 0),
            "protocol": 2,
        }
        if driver is self._aio:
            options |= {"max_connections": _CONNECTIONS}
        with reading_url("features"):
            client = driver.Redis.from_url(self._url, **options)
            client.connection_pool.make_connection()  # connects to nothing, but takes every option or refuses it
        return client


def _hmget(name: str, names: tuple[str, ...]) -> bytes:
    """Return the command that reads a row, and its time at the end, as Redis takes it."""
    key, (count, packed) = name.encode(), _packed(names)
    return b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n%s\r\n%s" % (count, len(key), key, packed)


@functools.lru_cache(256)
def _packed(names: tuple[str, ...]) -> tuple[int, bytes]:
    """Return how many words a command for these features has, and the words after the key: the same for every row."""
    words = [name.encode() for name in (*names, TIME)]
    return len(words) + 2, b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
