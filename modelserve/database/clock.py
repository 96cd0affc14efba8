"""The clock of the database: the one time on which all processes agree, whatever their hosts' clocks say."""

from __future__ import annotations

import datetime as dt
from typing import Final

import sqlalchemy as sa

_NOW: Final = {
    "postgresql": "SELECT clock_timestamp()",
    "sqlite": "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')",  # UTC, in milliseconds
}


def now(connection: sa.Connection) -> dt.datetime:
    """Return the database's time in UTC: at this moment, not when the transaction began.

    SQLite has no clock but that of its machine, which the processes that share the file share as well.
    """
    found: dt.datetime | str = connection.exec_driver_sql(_NOW[connection.dialect.name]).scalar_one()
    if isinstance(found, str):
        return dt.datetime.fromisoformat(found).replace(tzinfo=dt.UTC)
    return found.astimezone(dt.UTC)
