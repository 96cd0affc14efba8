"""Publishing features, in the layout that serving reads."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import numpy as np

from modelserve import plugins
from modelserve.errors import InvalidInput
from modelserve.features.declaration import group_problem
from modelserve.features.layout import AHEAD_S, encoded, key_of
from modelserve.ports import FeatureKey, FeatureRecord, FeatureRow, FeatureStore
from modelserve.signature import columns_of
from modelserve.signature.examination import plain

T = TypeVar("T")
_AT_ONCE: Final = 500
_FAR_S: Final = 1e25  # beyond it is no time in any unit


class FeatureWriter:
    """Writes features to a store (a URL, or an object) as servers read them: for training jobs and notebooks.

    A row is written whole: what it held before is gone, and all of its values have the one time ``written_at`` (a
    datetime, or Unix seconds; None: now). Features of one entity that are published apart go into groups of their own.
    It blocks, and is not for the request path. Raises ``ConfigError`` for a URL that cannot be read.
    """

    def __init__(self, store: str | FeatureStore, *, now: Callable[[], float] = time.time) -> None:
        self.store = plugins.features(store) if isinstance(store, str) else store
        self._own = isinstance(store, str)
        self._now = now

    def put(
        self, group: str, key: str | int, values: Mapping[str, Any], *, written_at: dt.datetime | float | None = None
    ) -> None:
        """Write one row: ``put("user_id", 42, {"avg_spend_7d": 12.5})``.

        Raises ``InvalidInput`` naming the feature that cannot be stored, and ``BackendUnavailable``.
        """
        moment = self._now() if written_at is None else written_at
        self.store.write([self._record(group, key, values, moment)])

    def load(self, table: Any, group: str, *, key: str | None = None, time: str | None = None) -> int:
        """Write a row per row of a DataFrame or a mapping of columns; return how many.

        ``key`` is the column with the keys (None: the one called as the group), ``time`` the one with the time at which
        each row was true (None: all are of now). Every other column is a feature. Raises like :meth:`put`; the rows
        before are written.
        """
        key = group if key is None else key
        columns = columns_of(table, least=0)  # a job may have nothing to publish today
        for name in filter(None, (key, time)):
            if name not in columns:
                raise InvalidInput(name, f"the table has no such column; it has {', '.join(map(str, columns))[:200]}")
        now, count = self._now(), 0
        for part in _batched(self._records(columns, group, key, time, now), _AT_ONCE):
            self.store.write(part)
            count += len(part)
        return count

    def get(self, group: str, key: str | int, names: Iterable[str]) -> FeatureRow:
        """Read one row back, to look at it. Raises ``BackendUnavailable``.

        A store that was given as an object may read in one event loop only: leave it alone while a server uses it.
        """
        return _run(self._get(FeatureKey(group, key_of(group, key), tuple(names))))

    async def _get(self, wanted: FeatureKey) -> FeatureRow:
        (found,) = await self.store.read([wanted], 10.0)
        if self._own:
            await self.store.close()  # its connections belong to this loop, which ends here
        if not isinstance(found, FeatureRow):
            raise found
        return found

    def close(self) -> None:
        """Close the store, if it was given as a URL."""
        if self._own:
            _run(self.store.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _records(
        self, columns: Mapping[str, Any], group: str, key: str, time: str | None, now: float
    ) -> Iterator[FeatureRecord]:
        names = [name for name in columns if name not in {key, time}]
        for i in range(len(columns[key])):
            values = {name: plain(columns[name][i]) for name in names}
            yield self._record(group, plain(columns[key][i]), values, now if time is None else columns[time][i])

    def _record(self, group: str, key: Any, values: Mapping[str, Any], written_at: Any) -> FeatureRecord:
        problem = group_problem(group)
        if problem is not None:
            raise InvalidInput("group", problem)
        if not values:
            raise InvalidInput(group, "give at least one feature")
        moment = _seconds(written_at)
        if moment > self._now() + AHEAD_S:
            raise InvalidInput("time", f"{moment:.15g} s after 1970 is yet to come; give datetimes, or seconds")
        return FeatureRecord(group, key_of(group, key), encoded(values), moment)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop and a thread of its own: a notebook's thread has a loop already."""
    with ThreadPoolExecutor(1, thread_name_prefix="modelserve-features") as thread:
        return thread.submit(asyncio.run, work).result()


def _seconds(moment: Any) -> float:
    """Return Unix seconds. A datetime without a zone is UTC, as in NumPy and in most tables."""
    if isinstance(moment, np.datetime64):
        moment = moment.astype("datetime64[us]").item()
    if isinstance(moment, str):
        try:
            moment = dt.datetime.fromisoformat(moment)
        except ValueError:
            raise InvalidInput("time", f"{moment[:40]!r} is neither Unix seconds nor a date in ISO form") from None
    if isinstance(moment, dt.datetime) and moment == moment:  # noqa: PLR0124  # pandas' NaT is a datetime without a time
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
    number = plain(moment)
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < _FAR_S:
        raise InvalidInput("time", f"expected a datetime or Unix seconds, got {moment!r:.40}")
    return float(number)


def _batched(records: Iterator[FeatureRecord], size: int) -> Iterator[list[FeatureRecord]]:
    while part := list(itertools.islice(records, size)):
        yield part
