"""Leases: one of all processes does something, for a term that it renews.

Time is the database's. Each new holder gets a higher fencing token, and a holder that was frozen while its term passed
is refused by its old one: `fence` makes a transaction fail unless the token is still the last.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import socket
import uuid
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from modelserve.database import clock
from modelserve.database.engine import Database
from modelserve.database.tables import lease as leases
from modelserve.errors import LeaseLost
from modelserve.stores.base import SqlStore

_log = logging.getLogger("modelserve")
Clock: TypeAlias = Callable[[sa.Connection], dt.datetime]
_IDLE_LIMIT: Final = "idle_in_transaction_session_timeout"


class Lease(NamedTuple):
    """A lease that was acquired: it lapses after its term unless it is renewed."""

    name: str
    token: int
    term_s: float


class Leases(SqlStore):
    """The leases in a database, for one process, which is named ``holder`` there.

    An account that may not write gets none: that is logged once, and not asked again. Calls block for a few
    milliseconds; on an event loop, make them in an executor. Calls may also raise ``BackendUnavailable``: a holder that
    cannot renew goes on until the end of its term at most.
    """

    table = leases
    rights = ("SELECT", "INSERT", "UPDATE")

    def __init__(
        self, database: Database, *, shared: bool = False, holder: str | None = None, now: Clock = clock.now
    ) -> None:
        super().__init__(database, shared=shared)
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._now = now
        self._may_write = False
        self.off = False
        """Whether this account may not write, so that no lease is ever acquired."""

    def acquire(self, name: str, term_s: float) -> Lease | None:
        """Return the lease if it is free, released or has lapsed; None while another holder has it."""
        if not self._is_open() or self._is_held(name):
            return None
        with self._write() as connection:
            self._require_row(connection, name)
            # A holder that froze inside a fenced transaction keeps the row locked: passed over, not waited for.
            row = connection.execute(_row(name).with_for_update(skip_locked=True)).one_or_none()
            now = self._now(connection)  # asked under the lock: an earlier moment would see the future
            if row is None or _is_live(row, now):
                return None
            token = row.token + 1
            connection.execute(
                sa.update(leases)
                .where(leases.c.name == name)
                .values(holder=self._holder, token=token, **_period(now, term_s))
            )
            return Lease(name, token, term_s)

    def renew(self, lease: Lease) -> None:
        """Begin the term again, also after it lapsed if no other process acquired it. Raises ``LeaseLost``."""
        with self._write() as connection:
            self._update(connection, lease, **_period(self._now(connection), lease.term_s))

    def release(self, lease: Lease) -> None:
        """Let the next process in at once; one that was lost already is left alone."""
        with self._write() as connection:
            connection.execute(sa.update(leases).where(_is_current(lease)).values(holder=None))

    def _is_open(self) -> bool:
        if not self._may_write and not self.off:
            self._may_write = self.may_write()
            self.off = not self._may_write
            if self.off:
                rights = ", ".join(self.rights)
                _log.warning("leases unavailable until restart: grant %s on lease in %s", rights, self.shown_url)
        return self._may_write

    def _is_held(self, name: str) -> bool:
        """Look first without a lock: most processes ask for what another has."""
        with self._database.read() as connection:
            row = connection.execute(_row(name)).one_or_none()
            return row is not None and _is_live(row, self._now(connection))

    def _require_row(self, connection: sa.Connection, name: str) -> None:
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        free = insert(leases).values(name=name, token=0, **_period(self._now(connection), 0))
        connection.execute(free.on_conflict_do_nothing())

    def _update(self, connection: sa.Connection, lease: Lease, **values: dt.datetime) -> None:
        values_of = sa.update(leases).where(_is_current(lease)).values(**values)
        if connection.execute(values_of).rowcount != 1:
            raise LeaseLost(lease.name, lease.token)


def fence(connection: sa.Connection, lease: Lease) -> None:
    """Make the rest of a transaction count only under a lease. Raises ``LeaseLost`` if another process has it.

    Until the transaction ends no other process acquires the lease; renewing it does not wait. PostgreSQL rolls back a
    transaction that stands still for the term, so a process that froze in the middle of one does not keep it either.
    """
    held = sa.select(leases.c.token).where(_is_current(lease)).with_for_update(read=True, key_share=True)
    if connection.execute(held).one_or_none() is None:
        raise LeaseLost(lease.name, lease.token)
    if connection.dialect.name == "postgresql":
        limit = str(max(1, round(lease.term_s * 1000)))  # milliseconds
        connection.execute(sa.select(sa.func.set_config(_IDLE_LIMIT, limit, True)))  # noqa: FBT003  # SQL: for this transaction


def _row(name: str) -> sa.Select[Any]:
    return sa.select(leases.c.holder, leases.c.token, leases.c.renewed_at, leases.c.until).where(leases.c.name == name)


def _is_current(lease: Lease) -> sa.ColumnElement[bool]:
    return (leases.c.name == lease.name) & (leases.c.token == lease.token) & leases.c.holder.is_not(None)


def _period(now: dt.datetime, term_s: float) -> dict[str, dt.datetime]:
    return {"renewed_at": now, "until": now + dt.timedelta(seconds=term_s)}


def _is_live(row: sa.Row[Any], now: dt.datetime) -> bool:
    """Whether a lease is held. One renewed more than its term from now is not: the clock was put back since."""
    return row.holder is not None and now < row.until and row.renewed_at - now <= row.until - row.renewed_at
