"""Change hints over Redis' publish and subscribe, for registries that cannot tell by themselves."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.redis_driver import BACKEND, our_errors, reading_url, socket_options, split_url
from modelserve.errors import BackendUnavailable
from modelserve.feed import TICK_S, Feed, Turn
from modelserve.ports import ChangeListener

CHANNEL: Final = "modelserve:changes"
_PUBLISH_LIMIT_S: Final = 0.5
_PUBLISHING_AT_ONCE: Final = 8
_TIMEOUT_S: Final = 2.0


class RedisChanges:
    """Listens to, and publishes on, the channel ``modelserve:changes`` of ``redis://``, ``rediss://`` or ``unix://``.

    The options of the URL are redis-py's, and ``prefix``, which is put before the channel's name: channels belong to
    all databases of a server. Raises ``ConfigError`` for a URL that cannot be read and ``MissingDependency`` without
    redis-py. Nothing is opened before first use.
    """

    def __init__(self, url: str) -> None:
        self._redis = plugins.require("redis")
        url, own = split_url(url, ("prefix",), "changes")
        self._channel = own.get("prefix", "") + CHANNEL
        self._client = self._client_of(url)
        self._feed = Feed(BACKEND, self._listen)
        self._slots = threading.BoundedSemaphore(_PUBLISHING_AT_ONCE)

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener(model_name)`` on changes and ``listener(None)`` on each connection, from a thread."""
        return self._feed.subscribe(listener)

    def publish(self, model_name: str) -> None:
        """Tell every subscriber. Takes half a second at most and raises ``BackendUnavailable`` when that was too short.

        The driver bounds each step on its own, and looking a name up not at all: a thread that can be left behind
        bounds their sum. No more than eight of them are.
        """
        give_up = time.monotonic() + _PUBLISH_LIMIT_S
        outcome: queue.SimpleQueue[BackendUnavailable | None] = queue.SimpleQueue()
        late = BackendUnavailable(BACKEND, f"no answer within {_PUBLISH_LIMIT_S} s")
        if not self._slots.acquire(timeout=_PUBLISH_LIMIT_S):
            raise late
        threading.Thread(
            target=self._publish, args=(model_name, outcome), name="modelserve-publish", daemon=True
        ).start()
        try:
            problem = outcome.get(timeout=max(0.0, give_up - time.monotonic()))
        except queue.Empty:
            raise late from None
        if problem is not None:
            raise problem

    def ping(self) -> None:
        """Ask whether it answers. Raises ``BackendUnavailable``."""
        with our_errors():
            self._client.ping()

    def close(self) -> None:
        """End every subscription, the thread and the connections. Safe to call twice; later use starts anew."""
        self._feed.close()
        self._client.close()

    def _publish(self, model_name: str, outcome: queue.SimpleQueue[BackendUnavailable | None]) -> None:
        try:
            with our_errors():
                self._client.publish(self._channel, model_name)
        except BackendUnavailable as problem:
            outcome.put(problem)
        except Exception as error:  # noqa: BLE001  # closed meanwhile, the driver falls over its own feet
            outcome.put(BackendUnavailable(BACKEND, f"publishing failed: {type(error).__name__}"))
        else:
            outcome.put(None)
        finally:
            self._slots.release()

    def _listen(self, turn: Turn) -> None:
        with our_errors(), self._client.pubsub() as subscription:
            subscription.subscribe(self._channel)
            while not turn.over:
                message = subscription.get_message(timeout=TICK_S)
                if message is None:
                    continue
                if message["type"] == "subscribe":  # also where the driver has connected anew by itself
                    turn.connected()
                elif message["type"] == "message":
                    turn.tell(message["data"].decode("utf-8", "replace"))

    def _client_of(self, url: str) -> Any:
        options = {
            **socket_options(url, _TIMEOUT_S),
            "socket_timeout": _TIMEOUT_S,
            "retry": self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 1),  # a pooled one may have died idle
        }
        with reading_url("changes"):
            client = self._redis.Redis.from_url(url, **options)
            client.connection_pool.make_connection()  # connects to nothing, but takes every option or refuses it
        return client
