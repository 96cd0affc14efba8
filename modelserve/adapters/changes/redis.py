"""Change hints over Redis' publish and subscribe, for registries that cannot tell by themselves."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.listening import TICK_S, Feed, Turn
from modelserve.ports import ChangeListener

CHANNEL: Final = "modelserve:changes"
_BACKEND: Final = "Redis"
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
        url, prefix = _without_prefix(url)
        self._channel = f"{prefix}{CHANNEL}"
        self._client = self._client_of(url)
        self._feed = Feed(_BACKEND, self._listen)
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
        late = BackendUnavailable(_BACKEND, f"no answer within {_PUBLISH_LIMIT_S} s")
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
        with self._our_errors():
            self._client.ping()

    def close(self) -> None:
        """End every subscription, the thread and the connections. Safe to call twice; later use starts anew."""
        self._feed.close()
        self._client.close()

    def _publish(self, model_name: str, outcome: queue.SimpleQueue[BackendUnavailable | None]) -> None:
        try:
            with self._our_errors():
                self._client.publish(self._channel, model_name)
        except BackendUnavailable as problem:
            outcome.put(problem)
        except Exception as error:  # noqa: BLE001  # closed meanwhile, the driver falls over its own feet
            outcome.put(BackendUnavailable(_BACKEND, f"publishing failed: {type(error).__name__}"))
        else:
            outcome.put(None)
        finally:
            self._slots.release()

    def _listen(self, turn: Turn) -> None:
        with self._our_errors(), self._client.pubsub() as subscription:
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
        retry = self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 1)  # a pooled connection may have died idle
        options = {
            "socket_connect_timeout": _TIMEOUT_S,
            "socket_timeout": _TIMEOUT_S,
            "socket_keepalive": True,
            "socket_keepalive_options": _keepalive(),
            "retry": retry,
        }
        if url.startswith("unix://"):
            options = {"socket_timeout": _TIMEOUT_S, "retry": retry}
        try:
            client = self._redis.Redis.from_url(url, **options)
            client.connection_pool.connection_kwargs["decode_responses"] = False  # whatever the URL says
            client.connection_pool.make_connection()  # connects to nothing, but takes every option or refuses it
        except (ValueError, TypeError, self._redis.RedisError):
            # The cause is left out: it may quote a part of the password.
            problem = "it is written redis://user:password@host:6379/0, special characters %-encoded"
            raise ConfigError(f"the URL of the changes cannot be read; {problem}") from None
        return client

    @contextlib.contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except (self._redis.RedisError, OSError) as error:
            raise BackendUnavailable(_BACKEND, self._in_short(error)) from error

    def _in_short(self, error: Exception) -> str:
        """Say what is wrong without what the driver says, which quotes host and user."""
        if isinstance(error, self._redis.AuthenticationError):
            return "it refuses the user or the password"
        if isinstance(error, self._redis.TimeoutError):
            return "it does not answer in time"
        return "no connection" if isinstance(error, self._redis.ConnectionError | OSError) else "it refuses the command"


def _without_prefix(url: str) -> tuple[str, str]:
    """Take our own option out of the URL."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return url, ""  # which the driver cannot read either
    options = dict(urllib.parse.parse_qsl(parts.query))
    prefix = options.pop("prefix", "")
    return parts._replace(query=urllib.parse.urlencode(options)).geturl(), prefix


def _keepalive() -> dict[int, int]:
    """Have the kernel give up an idle connection after 25 s whose other end is gone without a word."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
