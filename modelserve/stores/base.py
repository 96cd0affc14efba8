"""What the stores have in common: a database, shared or their own, and whether this account may write to it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import ClassVar, Self

import sqlalchemy as sa

from modelserve.database.engine import Database
from modelserve.errors import BackendUnavailable


class SqlStore:
    """Tables in the registry's database (``shared``), or in one apart.

    Use it as a context manager, or close it. Every method may raise ``BackendUnavailable`` when the database does not
    answer, and ``SchemaOutdated`` when its tables do not fit this release.
    """

    table: ClassVar[sa.Table]
    rights: ClassVar[tuple[str, ...]] = ("INSERT",)
    """The rights on the table that writing takes."""

    def __init__(self, database: Database, *, shared: bool = False) -> None:
        self._database = database
        self._shared = shared

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shown_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shown_url(self) -> str:
        """The URL of the database without its secrets."""
        return self._database.shown_url

    def close(self) -> None:
        """Close the idle connections, if they are not the registry's. Later use opens new ones."""
        if not self._shared:
            self._database.close()

    def may_write(self) -> bool:
        """Whether this account may write here; a replica, and a file that is read-only, take nothing."""
        try:
            with self._database.write() as connection:
                if connection.dialect.name == "postgresql":
                    return self._postgres_allows(connection)
                connection.execute(sa.delete(self.table).where(sa.false()))  # what only a writer may say
                return True
        except BackendUnavailable as error:
            if _is_read_only(error):
                return False
            raise

    def _postgres_allows(self, connection: sa.Connection) -> bool:
        rights = [sa.func.has_table_privilege(self.table.name, right) for right in self.rights]
        is_primary = sa.func.current_setting("transaction_read_only") == "off"
        return bool(connection.scalar(sa.select(sa.and_(is_primary, *rights))))

    @contextlib.contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """Open a transaction to write in.

        A store's own file may be moved away and is made anew; a registry that is gone must not come back empty.
        """
        try:
            with self._database.write() as connection:
                yield connection
        except BackendUnavailable:
            if not self._shared:
                self._database.look_again()
            raise


def _is_read_only(error: BackendUnavailable) -> bool:
    """Whether SQLite says that the file, or the connection, is for reading only."""
    cause = getattr(error.__cause__, "orig", None)
    return isinstance(cause, sqlite3.Error) and (cause.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_READONLY
