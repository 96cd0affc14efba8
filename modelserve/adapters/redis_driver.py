"""What the adapters for Redis have in common: the options of its URL, its connections, and what its errors say."""

from __future__ import annotations

import contextlib
import socket
import urllib.parse
from collections.abc import Collection, Iterator
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import BackendUnavailable, ConfigError

BACKEND: Final = "Redis"


def split_url(url: str, own: Collection[str], option: str) -> tuple[str, dict[str, str]]:
    """Return a URL without our own options, and these. Raises ``ConfigError``, which names the ``option``."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        raise unreadable(option) from None
    options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    options.pop("decode_responses", None)  # what is read are bytes, whatever the URL says
    found = {name: options.pop(name) for name in own if name in options}
    return parts._replace(query=urllib.parse.urlencode(options)).geturl(), found


@contextlib.contextmanager
def reading_url(option: str) -> Iterator[None]:
    """Turn what the driver says of a URL's options into ``ConfigError``."""
    try:
        yield
    except (ValueError, TypeError, plugins.require("redis").RedisError):
        # The cause is left out: it may quote a part of the password.
        raise unreadable(option) from None


def unreadable(option: str) -> ConfigError:
    """Return what is said of a URL that cannot be read."""
    problem = "it is written redis://user:password@host:6379/0, special characters %-encoded"
    return ConfigError(f"{option}: the URL cannot be read; {problem}")


def socket_options(url: str, connect_limit_s: float) -> dict[str, Any]:
    """Return how to connect, where there is a network between.

    The kernel gives up an idle connection after 25 s whose other end is gone without a word.
    """
    if url.startswith("unix://"):
        return {}
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    keepalive = {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
    return {
        "socket_connect_timeout": connect_limit_s,
        "socket_keepalive": True,
        "socket_keepalive_options": keepalive,
    }


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Turn the driver's exceptions into ``BackendUnavailable``."""
    try:
        yield
    except (plugins.require("redis").RedisError, OSError, EOFError) as error:
        raise BackendUnavailable(BACKEND, in_short(error)) from error


def in_short(error: Exception) -> str:
    """Say what is wrong without what the driver says, which quotes host and user."""
    redis = plugins.require("redis")
    if isinstance(error, redis.AuthenticationError):
        return "it refuses the user or the password"
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return "it does not answer in time"
    return "no connection" if isinstance(error, redis.ConnectionError | OSError) else "it refuses the command"
