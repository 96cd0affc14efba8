"""The database behind the registry: engine, transactions, schema."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import NullPool, Pool, QueuePool

from modelserve import plugins
from modelserve.database import schema
from modelserve.database.tables import HEAD
from modelserve.errors import BackendUnavailable, ConfigError, InvalidInput, SchemaOutdated

_DRIVERS: Final = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_SECRETS: Final = frozenset({"password", "sslpassword"})
_SET_UP_LIMIT_S: Final = 5.0  # of the first connection, for which SQLAlchemy lets all other threads wait
_PATIENCE: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_OF_PSYCOPG: Final = ("prepare_threshold",)  # the driver's own option, which the database's library does not know
_UNFIT: Final = frozenset({"autocommit", "context", "cursor_factory", "row_factory"})  # a transaction would be none
_LOCK_WAIT_MS: Final = 30_000
_migrating = threading.Lock()  # alembic keeps the running migration in module globals


class Database:
    """Hands out connections in a transaction, on tables that are known to fit this release.

    Nothing is opened before first use, and a copy made by ``fork`` opens connections of its own.
    Driver errors leave as ``BackendUnavailable``, which says that it is the database of ``whose``.
    """

    def __init__(self, url: str, whose: str = "registry") -> None:
        self.url = _parse(url, whose)
        self._backend = f"{whose} database"
        try:
            self._engine = _engine(self.url)
        except (sa.exc.ArgumentError, ValueError, TypeError):  # the cause is left out, as above: it may quote the URL
            raise ConfigError(f"the {whose}'s URL has an option that cannot be used") from None
        self._set_up_since: float | None = None
        self._is_set_up = False
        self._pid = os.getpid()
        self._inherited: list[Pool] = []
        self._schema_fits = False
        self._is_expected = False

    def __repr__(self) -> str:
        return f"Database({self.shown_url!r})"

    @property
    def shown_url(self) -> str:
        """The URL without its secrets."""
        query = {key: "***" if key in _SECRETS else value for key, value in self.url.query.items()}
        return self.url.set(query=query).render_as_string(hide_password=True)

    @property
    def libpq_url(self) -> str | None:
        """The URL as PostgreSQL's own library reads it, secrets included; None for SQLite."""
        if self.url.drivername == "sqlite":
            return None
        _, options = self._engine.dialect.create_connect_args(self.url.difference_update_query(_OF_PSYCOPG))
        written = {name: value for name, value in options.items() if isinstance(value, str | int)}
        return "postgresql://?" + urllib.parse.urlencode(written, quote_via=urllib.parse.quote)

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a database that is no file, or one that SQLite alone finds (``file:``)."""
        is_file = self.url.drivername == "sqlite" and not _in_memory(self.url)
        return Path(str(self.url.database)) if is_file and not str(self.url.database).startswith("file:") else None

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction to read in. On SQLite it waits for no writer."""
        self._require_schema(may_create=not self._is_expected)
        with self._transaction(write=False) as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction to write in; it is committed unless the body raises."""
        self._require_schema()
        with self._transaction(write=True) as connection:
            yield connection

    def upgrade(self) -> None:
        """Create the tables, or bring them to this release. Safe when many processes do so at once.

        A newer schema with which this release is compatible is left as it is, and takes no right to write. Raises
        ``SchemaOutdated`` for one with which it is not.
        """
        if not schema.fits(self._schema()):
            with _migrating, self._transaction(write=True) as connection:
                schema.upgrade(connection)
        self._schema_fits = True

    def expect(self) -> None:
        """Take it for granted that there are tables: readers that find none are told so, and create none."""
        self._is_expected = True

    def look_again(self) -> None:
        """Take nothing for known of the tables: the next use looks whether they are there, and creates them if not."""
        self._schema_fits = False

    def close(self) -> None:
        """Close the idle connections. Later use opens new ones."""
        self._leave_inherited_connections()
        self._engine.dispose()

    def _require_schema(self, *, may_create: bool = True) -> None:
        is_known = self._schema_fits or not may_create
        if is_known and (file := self.file) is not None and not file.exists():  # connecting would make an empty one
            raise BackendUnavailable(self._backend, "its file is gone")
        if self._schema_fits:
            return
        found = self._schema()
        if found is None and not may_create:
            raise BackendUnavailable(self._backend, "it is empty, and was not before")
        if found is None:
            self.upgrade()
        elif not schema.fits(found):
            raise SchemaOutdated(found.revision, HEAD)
        self._schema_fits = True

    def _schema(self) -> schema.Schema | None:
        with self._transaction(write=False) as connection:
            return schema.schema_of(connection)

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[sa.Connection]:
        self._leave_inherited_connections()
        self._replace_hanging_engine()
        engine = self._engine
        try:
            with (
                _our_errors(self._backend),
                engine.connect().execution_options(modelserve_write=write) as connection,
                connection.begin(),
            ):
                self._is_set_up = self._is_set_up or engine is self._engine
                yield connection
        finally:
            if engine is not self._engine:
                engine.dispose()

    def _replace_hanging_engine(self) -> None:
        """Begin anew with an engine whose first connection hangs: all others would wait for it as long as it does."""
        now = time.monotonic()
        if self._is_set_up or self.url.drivername == "sqlite":
            return
        if self._set_up_since is None:
            self._set_up_since = now
        elif now - self._set_up_since > _SET_UP_LIMIT_S:
            self._engine, self._set_up_since = _engine(self.url), now

    def _leave_inherited_connections(self) -> None:
        if self._pid == os.getpid():
            return
        self._inherited.append(self._engine.pool)  # kept, so that the parent's sockets are not even closed here
        self._engine.dispose(close=False)
        self._pid = os.getpid()


def _parse(text: str, whose: str) -> sa.URL:
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        # The cause is left out: it may quote a part of the password.
        hint = "special characters in it must be %-encoded" if "://" in text else "a file is sqlite:///models.db"
        raise ConfigError(f"the {whose}'s URL cannot be read; {hint}") from None
    if url.drivername not in _DRIVERS:
        msg = f"the {whose} keeps its rows in sqlite:// or postgresql://, not in {url.drivername}://"
        raise ConfigError(msg)
    for option in _UNFIT & url.query.keys():
        raise ConfigError(f"the {whose}'s URL cannot say {option}; leave it out")
    url = url.set(drivername=_DRIVERS[url.drivername])
    if url.drivername == "sqlite" and not _in_memory(url) and not str(url.database).startswith("file:"):
        return url.set(database=str(Path(str(url.database)).absolute()))  # the host may change its directory
    return url


def _in_memory(url: sa.URL) -> bool:
    return url.database in {None, "", ":memory:"}


def _engine(url: sa.URL) -> sa.Engine:
    options: dict[str, Any] = {"hide_parameters": True}
    if url.drivername == "sqlite":
        return _sqlite_engine(url, options)
    plugins.require("psycopg")
    # A connection whose other end has gone without a word is found out before the kernel's quarter of an hour is over.
    patience = {name: value for name, value in _PATIENCE.items() if name not in url.query}
    options["connect_args"] = patience | {"prepare_threshold": _prepare_threshold(url)}
    return sa.create_engine(
        url.difference_update_query(_OF_PSYCOPG), pool_pre_ping=True, isolation_level="READ COMMITTED", **options
    )


def _prepare_threshold(url: sa.URL) -> int | None:
    """Return after how many times psycopg prepares a statement: None, unless the URL says so, is never.

    A prepared statement belongs to a connection, and a pooler hands out another one for each transaction.
    """
    asked = url.query.get("prepare_threshold", "none")
    return None if asked == "none" else int(str(asked))


def _sqlite_engine(url: sa.URL, options: dict[str, Any]) -> sa.Engine:
    if _in_memory(url):  # one connection, which every thread takes in turn: another would see another database
        options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
        options["connect_args"] = {"check_same_thread": False}
    else:  # none stays open: SQLite counts its file locks per process and cannot follow an open file over a fork
        options["poolclass"] = NullPool
    engine = sa.create_engine(url, **options)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions itself, and late
    connection.execute(f"PRAGMA busy_timeout = {_LOCK_WAIT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")
    with contextlib.suppress(sqlite3.OperationalError):  # only switching needs the file alone; the next one tries again
        connection.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that turns to writing fails at once when another wrote meanwhile; this one waits.
    write = connection.get_execution_options().get("modelserve_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextlib.contextmanager
def _our_errors(backend: str) -> Iterator[None]:
    try:
        yield
    except sa.exc.IntegrityError:
        raise  # an invariant is broken, which no retry and no caller can mend
    except sa.exc.DataError as error:
        raise InvalidInput("", f"the database cannot hold this: {_in_short(error)}") from error
    except sa.exc.DBAPIError as error:
        raise BackendUnavailable(backend, _in_short(error)) from error
    except sa.exc.TimeoutError as error:
        raise BackendUnavailable(backend, "all connections are busy") from error


def _in_short(error: sa.exc.DBAPIError) -> str:
    """Say what the database said; of what the driver says, which quotes host and user, nothing."""
    if isinstance(error.orig, sqlite3.Error):
        return str(error.orig)
    diagnosis = getattr(error.orig, "diag", None)
    return getattr(diagnosis, "message_primary", None) or "no connection"
