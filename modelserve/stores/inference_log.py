"""The inference log as a table: added to in bulk, read in batches of columns, pruned bit by bit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import orjson
import sqlalchemy as sa

from modelserve.database.tables import inference_log
from modelserve.errors import InvalidInput
from modelserve.stores.base import SqlStore
from modelserve.types import LogRecord

_COLUMNS: Final = LogRecord._fields
_ARRAY_TYPES: Final = {"row_index": "int32", "latency_ms": "float64", "cached": "bool", "shadow": "bool"}
_PG_TYPES: Final = {
    "id": "uuid",
    "row_index": "int4",
    "latency_ms": "float8",
    "cached": "bool",
    "shadow": "bool",
    "occurred_at": "timestamptz",
    "inputs": "jsonb",
    "prediction": "jsonb",
    "degraded": "jsonb",
}


def _sqlite_insert() -> str:
    values = [f"json_extract(value, '$[{i}]')" for i in range(len(_COLUMNS))]
    values[-1] = f"substr({values[-1]}, 1, 26)"  # a moment lies there in UTC, without saying so
    return _insert(values, "json_each(?) WHERE true")  # without a condition, ON would begin one of a join


def _postgres_insert() -> str:
    values = [f"(r ->> {i})::{_PG_TYPES.get(name, 'text')}" for i, name in enumerate(_COLUMNS)]
    return _insert(values, "jsonb_array_elements(%s::jsonb) AS r")


def _insert(values: Sequence[str], rows: str) -> str:
    # No conflict target: with one, adding would take the right to read as well.
    names = ", ".join(_COLUMNS)
    return f"INSERT INTO inference_log ({names}) SELECT {', '.join(values)} FROM {rows} ON CONFLICT DO NOTHING"  # noqa: S608  # constants


_INSERT: Final = {"sqlite": _sqlite_insert(), "postgresql": _postgres_insert()}
_ROWS_A_STATEMENT: Final = 100


class LogTable(SqlStore):
    """The inference log in a database: the registry's own, or one apart."""

    table = inference_log

    # -- writing -------------------------------------------------------------------------------------------

    def append(self, records: Sequence[LogRecord]) -> None:
        """Add records in one transaction; those whose ids are there already change nothing.

        Raises ``InvalidInput`` when the database cannot hold one of them; then none was added.
        """
        if not records:
            return
        with self._write() as connection:
            insert = _INSERT[connection.dialect.name]
            for at in range(0, len(records), _ROWS_A_STATEMENT):
                connection.exec_driver_sql(insert, (_document(records[at : at + _ROWS_A_STATEMENT]),))

    # -- reading -------------------------------------------------------------------------------------------

    def read(
        self,
        model_name: str,
        *,
        since: dt.datetime | None = None,
        until: dt.datetime | None = None,
        columns: Sequence[str] = _COLUMNS,
        batch_rows: int = 10_000,
    ) -> Iterator[dict[str, Any]]:
        """Yield a model's records from ``since`` up to, not including, ``until``, oldest first, as batches of columns.

        A batch maps each of ``columns`` to ``batch_rows`` values (fewer in the last one): a NumPy array for numbers,
        truth values and ``occurred_at`` (``datetime64[us]``, UTC), a list for the rest, with ``inputs``, ``prediction``
        and ``degraded`` parsed. Each batch is a short transaction of its own, so a long read holds up nobody; what is
        added behind it meanwhile is not seen.

        Raises ``InvalidInput`` for a column that there is none of, and for a time without a zone.
        """
        if batch_rows < 1:
            raise InvalidInput("batch_rows", f"a batch has at least one row, not {batch_rows}")
        for name in columns:
            if name not in _COLUMNS:
                raise InvalidInput("columns", f"the log has no {name!r}; it has {', '.join(_COLUMNS)}")
        since = None if since is None else _in_utc("since", since)
        until = None if until is None else _in_utc("until", until)
        within = _within(model_name, since, until)
        return self._batches(within, tuple(columns), batch_rows)

    def _batches(self, within: sa.ColumnElement[bool], names: tuple[str, ...], size: int) -> Iterator[dict[str, Any]]:
        log = inference_log.c
        order = (log.occurred_at, log.id)
        query = sa.select(*(log[name] for name in names), *order).where(within).order_by(*order).limit(size)
        last: Any = None
        while True:
            after = query if last is None else query.where(sa.tuple_(*order) > _place(*last[-2:]))
            with self._database.read() as connection:
                rows = connection.execute(after).all()
            if not rows:
                return
            last = rows[-1]
            values = zip(*rows, strict=True)
            yield {name: _as_column(name, column) for name, column in zip(names, values, strict=False)}
            if len(rows) < size:
                return

    # -- pruning -------------------------------------------------------------------------------------------

    def count(self, before: dt.datetime, *, model_name: str | None = None) -> int:
        """Return how many records :meth:`prune` would remove."""
        before = _in_utc("before", before)
        with self._database.read() as connection:
            names = _names(connection) if model_name is None else [model_name]
            query = sa.select(sa.func.count()).select_from(inference_log)
            return sum(connection.scalar(query.where(_within(name, None, before))) or 0 for name in names)

    def prune(self, before: dt.datetime, *, model_name: str | None = None, batch_rows: int = 10_000) -> int:
        """Remove what is older than ``before``, of one model or of all; return how many records that were.

        They go in transactions of ``batch_rows`` each, so that nobody waits long for a lock; what was removed stays
        removed when it is interrupted.
        """
        before = _in_utc("before", before)
        with self._database.read() as connection:
            names = _names(connection) if model_name is None else [model_name]
        return sum(self._prune(_within(name, None, before), batch_rows) for name in names)

    def _prune(self, within: sa.ColumnElement[bool], batch_rows: int) -> int:
        oldest = sa.select(inference_log.c.id).where(within).order_by(inference_log.c.occurred_at).limit(batch_rows)
        statement = sa.delete(inference_log).where(inference_log.c.id.in_(oldest))
        removed = 0
        while True:
            with self._database.write() as connection:
                gone = connection.execute(statement).rowcount
            removed += gone
            if gone < batch_rows:
                return removed


def _within(model_name: str, since: dt.datetime | None, until: dt.datetime | None) -> sa.ColumnElement[bool]:
    found = inference_log.c.model_name == model_name
    if since is not None:
        found &= inference_log.c.occurred_at >= since
    if until is not None:
        found &= inference_log.c.occurred_at < until
    return found


def _place(occurred_at: dt.datetime, record_id: str) -> sa.Tuple:
    log = inference_log.c
    return sa.tuple_(sa.literal(occurred_at, log.occurred_at.type), sa.literal(record_id, log.id.type))


def _names(connection: sa.Connection) -> list[str]:
    """Return the models that have records, each found by the index: DISTINCT would read the whole table."""
    name = inference_log.c.model_name
    names: list[str] = []
    following = sa.select(sa.func.min(name))
    found = connection.scalar(following)
    while found is not None:
        names.append(found)
        found = connection.scalar(following.where(name > found))
    return names


def _in_utc(field: str, moment: dt.datetime) -> dt.datetime:
    """Return a time in UTC. Raises ``InvalidInput`` for one without a zone, and one that is none there."""
    if moment.tzinfo is None:
        raise InvalidInput(field, "a time without a time zone is not a moment; use an aware datetime")
    try:
        return moment.astimezone(dt.UTC)
    except OverflowError:
        raise InvalidInput(field, f"{moment} is beyond the years that there are in UTC") from None


def _as_column(name: str, values: tuple[Any, ...]) -> Any:
    if name == "occurred_at":
        return np.array([moment.replace(tzinfo=None) for moment in values], dtype="datetime64[us]")
    dtype = _ARRAY_TYPES.get(name)
    return list(values) if dtype is None else np.array(values, dtype=dtype)


def _document(records: Sequence[LogRecord]) -> str:
    """Write records as one JSON list of lists, which the database takes apart itself.

    A parameter for each value would take several times as long here, with the interpreter, which is needed elsewhere.
    Raises ``InvalidInput`` for a text that is none.
    """
    rows = [(*record[:-1], record.occurred_at.astimezone(dt.UTC).isoformat(" ", "microseconds")) for record in records]
    try:
        return orjson.dumps(rows).decode()
    except TypeError as error:
        raise InvalidInput("records", f"cannot be written: {error}") from error
