"""Entity keys into features: one coalesced read for concurrent requests, within a budget, merged into rows."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeGuard

from modelserve import plugins
from modelserve.batching.batcher import Batcher
from modelserve.errors import ConfigError, DeadlineExceeded, InvalidInput, Overloaded, describe
from modelserve.events import FeaturesRead, Observers
from modelserve.features.declaration import Features
from modelserve.features.plan import Completed, FeaturePlan, Pending, Unread, groups_of
from modelserve.ports import FeatureKey, FeatureRow, FeatureStore, OpenedAhead
from modelserve.resilience.breaker import Breaker
from modelserve.types import Row

_Found: TypeAlias = FeatureRow | Unread | None
READS_AT_ONCE: Final = 4
"""Reads that are under way to the store at most, those that nobody waits for any more included."""
_ROWS_AT_ONCE: Final = 100  # of one read; DynamoDB takes no more
_ROWS_A_CALL: Final = 10_000  # of one request at a time, so that it leaves room for others
_ROWS_WAITING: Final = 20_000
_GRID_S: Final = 0.001
_PAUSE_S: Final = 1.0
_HANG_S: Final = 5.0  # a store that breaks its promise to end by itself; ours give up after a second
_WARM_UP_S: Final = 2.0
_OPENING_S: Final = 30.0  # Feast alone takes five to be imported
_NOBODYS_ROW: Final = FeatureKey("modelserve", "nobody", ("nothing",))
_NOBODY: Final[Sequence[tuple[str, ...]]] = ()
_log = logging.getLogger("modelserve")


class FeatureReader:
    """Completes requests with what a feature store has, for one server.

    The reads of concurrent requests go into one, and at most :data:`READS_AT_ONCE` of those are under way. A request
    whose budget ends leaves its read behind; the read is not cancelled, which would cost its connection, and keeps
    its place until it ends. A store that does not answer is left alone by a :class:`Breaker`.
    """

    def __init__(
        self,
        store: FeatureStore,
        name: str,
        observers: Observers,
        *,
        own: bool,
        groups: Sequence[tuple[str, tuple[str, ...]]] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self._store = store
        self._groups = groups
        self._own = own
        self._observers = observers
        self._now = now
        self._breaker = Breaker(5, first_pause_s=_PAUSE_S, last_pause_s=_PAUSE_S)
        self._within_s = 0.0
        self._batcher: Batcher[FeatureKey, FeatureRow] | None = None
        self._last: Unread = "error"

    async def start(self) -> None:
        """Belong to the loop that runs now, and open the connections, so that no request waits for one.

        A store that does not answer keeps no server from starting; one that says that it can never have what is
        declared does, with ``ConfigError``.
        """
        self._loop = asyncio.get_running_loop()
        self._breaker = Breaker(5, first_pause_s=_PAUSE_S, last_pause_s=_PAUSE_S)
        self._batcher = Batcher(max_rows=_ROWS_AT_ONCE, queue_limit=_ROWS_WAITING, grid_s=_GRID_S)
        for _ in range(READS_AT_ONCE):
            self._batcher.add(self._read_batch)
        try:
            await self._warm_up()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  # a store can be anybody's code; requests will see how it is
            _log.warning("the feature store %s does not answer yet: %s", self.name, describe(error))

    async def _warm_up(self) -> None:
        if isinstance(self._store, OpenedAhead):
            async with asyncio.timeout(_OPENING_S):
                await self._store.open(self._groups)
            return
        async with asyncio.timeout(_WARM_UP_S):
            await asyncio.gather(*(self._store.read([_NOBODYS_ROW], _WARM_UP_S) for _ in range(READS_AT_ONCE)))

    async def close(self) -> None:
        """Wait a moment for what is under way, and close the store if it was given as a URL."""
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            await batcher.close()
        if self._own:
            await self._store.close()

    # -- the way of a request ------------------------------------------------------------------------------

    async def enrich(
        self,
        plan: FeaturePlan,
        requests: Sequence[Pending],
        where: str,
        deadline: float,
        answered: Sequence[bool] = (),
    ) -> tuple[list[Row], Sequence[tuple[str, ...]]]:
        """Return the completed rows, and the features of each that have their default (empty: none of any).

        A request that is ``answered`` already needs no features; an empty row stands in its place.
        Raises ``InvalidInput`` and ``BackendUnavailable`` for a feature that is required and is not there.
        """
        began = self._loop.time()
        self._within_s = max(self._within_s, plan.budget_s)
        places = [i for i in range(len(requests)) if not (answered and answered[i])]
        wanted = list(dict.fromkeys(key for i in places for key in requests[i].wanted if key is not None))
        found = await self._read_all(wanted, began + plan.budget_s * _batches(wanted), deadline)
        now = self._now()
        completed = [
            plan.complete(requests[i], [None if key is None else found[key] for key in requests[i].wanted], now)
            for i in places
        ]
        if completed and self._observers:
            self._tell(plan, completed, self._loop.time() - began)
        return _rows(completed, places, len(requests), where)

    async def _read_all(
        self, wanted: list[FeatureKey], end_of_budget: float, deadline: float
    ) -> Mapping[FeatureKey, _Found]:
        found: dict[FeatureKey, _Found] = {}
        for start in range(0, len(wanted), _ROWS_A_CALL):
            part = wanted[start : start + _ROWS_A_CALL]
            found |= zip(part, await self._read(part, end_of_budget, deadline), strict=True)
        return found

    async def _read(self, wanted: list[FeatureKey], end_of_budget: float, deadline: float) -> Sequence[_Found]:
        """Return what became of each row that is wanted. Raises nothing: a store that fails is not the end."""
        batcher = self._batcher
        if batcher is None or not self._breaker.lets_through(self._loop.time()):
            return [self._last] * len(wanted)
        try:
            found = await batcher.submit(wanted, min(end_of_budget, deadline))
        except (DeadlineExceeded, Overloaded) as error:
            in_a_hurry = deadline < end_of_budget
            if in_a_hurry or _batches(wanted) > 1 or isinstance(error, Overloaded):  # it says nothing about the store
                return ["timeout"] * len(wanted)
            return self._failed("timeout", error, len(wanted))
        except Exception as error:  # noqa: BLE001  # a store can be anybody's code; its policy decides what follows
            return self._failed("error", error, len(wanted))
        first_error = next((each for each in found if isinstance(each, Exception)), None)
        if first_error is not None and all(isinstance(each, Exception) for each in found):
            return self._failed("error", first_error, len(wanted))
        if self._breaker.open:
            _log.info("the feature store %s answers again", self.name)
        self._breaker.succeeded()
        return [each if _is_sound(each, key) else "error" for key, each in zip(wanted, found, strict=True)]

    def _failed(self, status: Unread, error: Exception, rows: int) -> Sequence[_Found]:
        self._last = status
        was_open = self._breaker.open
        self._breaker.late(self._loop.time())  # a hiccup of a busy store fails many reads at once
        if self._breaker.open and not was_open:
            problem = "it does not answer in time" if status == "timeout" else str(error)
            _log.warning("the feature store %s is asked once in %g s only: %s", self.name, _PAUSE_S, problem)
        return [status] * rows

    async def _read_batch(self, items: list[FeatureKey]) -> Sequence[FeatureRow]:
        """Read each row once, however many requests of the batch want it."""
        unique = list(dict.fromkeys(items))
        async with asyncio.timeout(_HANG_S):
            found = await self._store.read(unique, self._within_s)
        if len(found) != len(unique):
            raise TypeError(f"it answered {len(found)} rows for {len(unique)}")
        if len(unique) == len(items):
            return found  # type: ignore[return-value]  # the batcher hands the errors among them on
        by_key = dict(zip(unique, found, strict=True))
        return [by_key[item] for item in items]  # type: ignore[misc]  # as above

    def _tell(self, plan: FeaturePlan, completed: Sequence[Completed], waited_s: float) -> None:
        statuses: Counter[str] = Counter()
        for each in completed:
            statuses.update(each.statuses)
        self._observers.emit(FeaturesRead(plan.model_name, self.name, statuses, int(waited_s * 1_000_000) / 1000))


def _batches(wanted: Sequence[FeatureKey]) -> int:
    """Return how many reads a call takes at least."""
    return math.ceil(len(wanted) / _ROWS_AT_ONCE)


def _is_sound(found: Any, wanted: FeatureKey) -> TypeGuard[FeatureRow]:
    """Whether this is a row, with a value for each feature and a time or none: a store can be anybody's code."""
    return (
        isinstance(found, FeatureRow)
        and len(found.values) == len(wanted.names)
        and (found.written_at is None or isinstance(found.written_at, int | float))
    )


def _rows(
    completed: Sequence[Completed], places: Sequence[int], count: int, where: str
) -> tuple[list[Row], Sequence[tuple[str, ...]]]:
    rows: list[Row] = [()] * count
    degraded: list[tuple[str, ...]] = [()] * count
    for i, each in zip(places, completed, strict=True):
        if isinstance(each.refusal, InvalidInput):
            raise each.refusal.within(where.format(i))
        if each.refusal is not None:
            raise each.refusal
        rows[i], degraded[i] = each.row, each.degraded
    return rows, degraded if any(degraded) else _NOBODY


# -- from options to a reader ------------------------------------------------------------------------------


def feature_reader_of(
    store: str | FeatureStore | None, declared: Mapping[str, Sequence[Features]], observers: Observers
) -> FeatureReader | None:
    """Return what completes requests from a store: a URL, an object, or None. ``declared`` are the features by model.

    Raises ``ConfigError`` for a URL that cannot be read, and for models that need a store where there is none.
    """
    if store is None:
        needy = next((name for name, features in declared.items() if features), None)
        if needy is not None:
            raise ConfigError(f"models.{needy}.features: there is no feature store; give features=")
        return None
    groups = [each for features in declared.values() for each in groups_of(features)]
    if isinstance(store, str):
        return FeatureReader(plugins.features(store), store.partition("://")[0], observers, own=True, groups=groups)
    return FeatureReader(store, type(store).__name__, observers, own=False, groups=groups)
