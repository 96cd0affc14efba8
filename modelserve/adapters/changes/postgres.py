"""Change hints by LISTEN: the registry in PostgreSQL notifies in the transaction of each change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import BackendUnavailable, ConfigError
from modelserve.feed import TICK_S, Feed, Turn
from modelserve.ports import PG_CHANNEL, ChangeListener

_BACKEND: Final = "PostgreSQL"
# An idle connection whose other end is gone without a word is given up after 25 s: nothing is ever sent on it
# that would show it sooner, and until then the poll finds what it misses.
_DEFAULTS: Final = {
    "application_name": "modelserve changes",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}


_CHECK_CHANNEL: Final = "modelserve_check"
_CHECK_S: Final = 5.0
_POOLED: Final = (
    "this URL leads to a pooler that hands out a connection for each transaction, and listening takes one to itself; "
    "name the server itself: changes='postgresql://user@host/database'"
)


class PostgresChanges:
    """Listens on a connection of its own to ``url``, which takes libpq's options.

    Behind a pooler that hands out a connection for each transaction nothing is ever heard. That is found out, and said.

    Raises ``ConfigError`` for a URL that cannot be read and ``MissingDependency`` without psycopg. Nothing is opened
    before the first subscription.
    """

    def __init__(self, url: str) -> None:
        self._psycopg = plugins.require("psycopg")
        scheme, _, rest = url.partition("://")
        self._options = _DEFAULTS | self._parsed(_without_prepare_threshold(f"{scheme.partition('+')[0]}://{rest}"))
        self._feed = Feed(_BACKEND, self._listen)

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener(model_name)`` on changes and ``listener(None)`` on each connection, from a thread."""
        return self._feed.subscribe(listener)

    def ping(self) -> None:
        """Connect and ask. Raises ``BackendUnavailable``."""
        with self._connected() as connection:
            connection.execute("SELECT 1")

    def close(self) -> None:
        """End every subscription and the thread. Safe to call twice; a later subscription starts anew."""
        self._feed.close()

    def _listen(self, turn: Turn) -> None:
        with self._connected() as connection:
            if not self._hears(connection):
                raise BackendUnavailable(_BACKEND, _POOLED)
            connection.execute(f"LISTEN {PG_CHANNEL}")
            turn.connected()
            while not turn.over:
                for notice in connection.notifies(timeout=TICK_S):
                    turn.tell(notice.payload)

    def _hears(self, connection: Any) -> bool:
        """Whether what another connection tells arrives on this one.

        A pooler makes up the number of the process at the other end. Where it is right, there is no pooler.
        """
        if connection.execute("SELECT pg_backend_pid()").fetchone() == (connection.info.backend_pid,):
            return True
        connection.execute(f"LISTEN {_CHECK_CHANNEL}")
        with self._connected() as another:
            another.execute(f"NOTIFY {_CHECK_CHANNEL}")
        heard = any(True for _ in connection.notifies(timeout=_CHECK_S, stop_after=1))
        connection.execute(f"UNLISTEN {_CHECK_CHANNEL}")
        return heard

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        try:
            with self._psycopg.connect(**self._options, autocommit=True) as connection:
                yield connection
        except self._psycopg.Error as error:
            said = error.diag.message_primary  # the rest of what it says quotes host and user
            raise BackendUnavailable(_BACKEND, said or "no connection") from error

    def _parsed(self, url: str) -> dict[str, Any]:
        try:
            return dict(self._psycopg.conninfo.conninfo_to_dict(url))
        except self._psycopg.Error:
            # The cause is left out: it may quote a part of the password.
            problem = "it is written postgresql://user@host/database, special characters %-encoded"
            raise ConfigError(f"the URL of the changes cannot be read; {problem}") from None


def _without_prepare_threshold(url: str) -> str:
    """Leave out the one option of a registry's URL that is psycopg's own: nothing is asked twice here."""
    before, _, options = url.partition("?")
    kept = [option for option in options.split("&") if option.partition("=")[0] != "prepare_threshold"]
    return f"{before}?{'&'.join(kept)}"
