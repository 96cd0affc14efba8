"""The way of a request whose model has a cache: what is known is answered, what runs is waited for, the rest is run.

Only what the model answered in full is kept: no error, and nothing that JSON would not give back as it was.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, Self, TypeAlias

import orjson

from modelserve.batching.calls import copy_of
from modelserve.caching.envelope import payload_of
from modelserve.caching.flights import Flight, Flights, Ticket
from modelserve.caching.memory import MemoryCache
from modelserve.caching.shared import Shared
from modelserve.caching.tiers import Tiers
from modelserve.errors import DeadlineExceeded, NotReady
from modelserve.ports import Cache
from modelserve.signature import AT_ONCE, Signature
from modelserve.turns import Steps, in_turns
from modelserve.types import Json, ModelVersion, Row

Result: TypeAlias = Json | Exception
_MISSING: Final = object()


class Runs(Protocol):
    """Runs rows: a pool, or what stands in for one."""

    def submit(self, rows: Sequence[Row], deadline: float) -> asyncio.Future[Sequence[Result]]:
        """Return a result per row: the model's answer, or its error."""
        ...


class CacheableVersion(Protocol):
    """What the cache needs of a version."""

    meta: ModelVersion
    cache_ttl_s: float
    timeout_s: float
    signature: Signature

    @property
    def pool(self) -> Runs:
        """What runs the rows that are not known."""
        ...

    def cache_key(self, row: Row) -> str:
        """Return the key of the answer to a row."""
        ...


class Known(NamedTuple):
    """What was found under each key."""

    keys: Sequence[str]
    results: list[Result]

    @property
    def complete(self) -> bool:
        """Whether there is an answer under every key."""
        return _MISSING not in self.results

    @property
    def answered(self) -> list[bool]:
        """Whether there is an answer, under each key."""
        return [each is not _MISSING for each in self.results]

    def among(self, places: Sequence[int]) -> Known:
        """Return what was found under some of the keys."""
        return Known([self.keys[i] for i in places], [self.results[i] for i in places])


class PredictionCache:
    """Answers rows from ``tiers``, and runs what is not there, once, however many ask for it at the same time.

    All of it belongs to one event loop.
    """

    def __init__(self, tiers: Tiers) -> None:
        self._loop = asyncio.get_running_loop()
        self._tiers = tiers
        self._flights: Flights[Result] = Flights()
        self.counts: Counter[tuple[str, str]] = Counter()
        """Rows by model and how they were answered: ``local``, ``shared``, ``joined`` (what ran already), ``miss``,
        ``bypass`` (degraded)."""

    @classmethod
    def over(cls, cache: Cache | None) -> Self:
        """Keep answers in this process, and in ``cache`` as well unless that is in this process too."""
        if cache is None or isinstance(cache, MemoryCache):
            return cls(Tiers(MemoryCache() if cache is None else cache))
        return cls(Tiers(MemoryCache(), Shared(cache)))

    @property
    def failures(self) -> Mapping[str, int]:
        """How many keys of the shared cache could not be read, and how many values not be written."""
        return self._tiers.failures

    async def open(self) -> None:
        """Connect to the shared cache, if there is one and it answers soon."""
        await self._tiers.open()

    async def close(self) -> None:
        """Finish what is on its way to the shared cache, within a second."""
        await self._tiers.close()

    async def look(
        self, target: CacheableVersion, key_of: Callable[[Any], str], rows: Sequence[Any], deadline: float
    ) -> Known:
        """Return what is kept for each row under its key, as far as that can be had by ``deadline``."""
        if len(rows) * target.signature.strings <= AT_ONCE:
            keys = list(map(key_of, rows))
        else:
            keys = await in_turns(_keys(key_of, rows, max(1, AT_ONCE // target.signature.strings)))
        known = Known(keys, [_MISSING] * len(keys))
        self._look(target, known)
        if self._tiers.has_more and not known.complete:
            await self._fetch(target, known, deadline)
            self._look(target, known)  # while that was read, another request may have computed it
        return known

    async def answer(
        self,
        target: CacheableVersion,
        rows: Sequence[Row],
        deadline: float,
        known: Known | None = None,
        degraded: Sequence[tuple[str, ...]] = (),
    ) -> tuple[Sequence[Result], Sequence[bool]]:
        """Return one value or exception for each row, and whether it was in the cache.

        What the rows are kept under is told by ``known``, if they were looked for already; else it is what they are as
        inputs of the version. A row that is ``degraded`` is neither looked for nor kept. Raises ``DeadlineExceeded``
        when it takes longer than ``deadline``, and what submitting to the version's pool raises.
        """
        if any(degraded):
            return await self._answer_some(target, rows, deadline, known, degraded)
        if known is None:
            known = await self.look(target, target.cache_key, rows, deadline)
        cached = known.answered
        if not known.complete:
            await self._run(target, rows, known.keys, known.results, deadline)
        return known.results, cached

    async def _answer_some(
        self,
        target: CacheableVersion,
        rows: Sequence[Row],
        deadline: float,
        known: Known | None,
        degraded: Sequence[tuple[str, ...]],
    ) -> tuple[Sequence[Result], Sequence[bool]]:
        """Answer the rows that are not degraded as others are, and run the rest beside them."""
        whole = [i for i, names in enumerate(degraded) if not names]
        rest = [i for i, names in enumerate(degraded) if names]
        known = None if known is None else known.among(whole)
        running = target.pool.submit([rows[i] for i in rest], deadline)  # first: what it raises leaves nothing behind
        others = self.answer(target, [rows[i] for i in whole], deadline, known)
        run, (answered, hits) = await asyncio.gather(running, others)
        self._count(target, "bypass", len(rest))
        results: list[Result] = [_MISSING] * len(rows)
        cached = [False] * len(rows)
        for i, result in zip(rest, run, strict=True):
            results[i] = result
        for i, result, hit in zip(whole, answered, hits, strict=True):
            results[i], cached[i] = result, hit
        return results, cached

    def _look(self, target: CacheableVersion, known: Known) -> None:
        for i, key in enumerate(known.keys):
            if known.results[i] is _MISSING and (payload := self._tiers.get(key)) is not None:
                known.results[i] = orjson.loads(payload)
                self._count(target, "local")

    async def _fetch(self, target: CacheableVersion, known: Known, deadline: float) -> None:
        wanted = [i for i, each in enumerate(known.results) if each is _MISSING]
        found = await self._tiers.fetch([known.keys[i] for i in wanted], target.cache_ttl_s, deadline)
        for i, kept in zip(wanted, found, strict=True):
            if kept is not None:
                known.results[i] = kept.value
                self._count(target, "shared")

    async def _run(
        self, target: CacheableVersion, rows: Sequence[Row], keys: Sequence[str], results: list[Result], deadline: float
    ) -> None:
        began = self._loop.time()
        while wanted := [i for i, each in enumerate(results) if each is _MISSING]:
            if not deadline > self._loop.time():  # also where it is no time at all (NaN)
                raise DeadlineExceeded(max(0.0, deadline - began))
            tickets = self._board(target, rows, keys, wanted, deadline)
            if not await self._land(tickets.values(), deadline):
                raise DeadlineExceeded(max(0.0, deadline - began))
            for i, ticket in tickets.items():
                results[i] = self._result(target, ticket, deadline)

    def _board(
        self, target: CacheableVersion, rows: Sequence[Row], keys: Sequence[str], wanted: Sequence[int], deadline: float
    ) -> Mapping[int, Ticket[Result]]:
        """Find each row its place in a flight; begin one for those that have none."""
        tickets: dict[int, Ticket[Result]] = {}
        fresh: dict[str, int] = {}
        for i in wanted:
            ticket = self._flights.find(keys[i])
            if ticket is not None:
                tickets[i] = ticket
            else:
                fresh.setdefault(keys[i], i)
        if fresh:
            flight = self._begin(target, [rows[i] for i in fresh.values()], list(fresh), deadline)
            places = {key: place for place, key in enumerate(fresh)}
            tickets |= {i: Ticket(flight, places[keys[i]], own=fresh[keys[i]] == i) for i in wanted if i not in tickets}
        self._count(target, "miss", len(fresh))
        self._count(target, "joined", len(tickets) - len(fresh))
        return tickets

    def _begin(
        self, target: CacheableVersion, rows: Sequence[Row], keys: Sequence[str], deadline: float
    ) -> Flight[Result]:
        """Run rows for whoever wants them: with at least the time that a request of this model has by default."""
        last = max(deadline, self._loop.time() + target.timeout_s)
        running = target.pool.submit(rows, last)
        flight = self._flights.begin(running, keys, last, by=target)
        running.add_done_callback(partial(self._landed, flight, target.cache_ttl_s))
        return flight

    def _count(self, target: CacheableVersion, how: str, rows: int = 1) -> None:
        self.counts[target.meta.model_name, how] += rows

    async def _land(self, tickets: Iterable[Ticket[Result]], deadline: float) -> bool:
        """Wait for the flights of these tickets; return whether they all landed before the deadline."""
        flights = {id(ticket.flight): ticket.flight for ticket in tickets}.values()
        for flight in flights:
            flight.aboard += 1
        try:
            for flight in flights:
                if not await flight.wait(deadline):
                    return False
            return True
        finally:
            for flight in flights:
                self._flights.leave(flight)

    def _landed(self, flight: Flight[Result], ttl_s: float, running: asyncio.Future[Sequence[Result]]) -> None:
        try:
            if not running.cancelled() and running.exception() is None:
                payloads = [(key, payload_of(each)) for key, each in zip(flight.keys, running.result(), strict=True)]
                self._tiers.put([(key, payload) for key, payload in payloads if payload is not None], ttl_s)
        finally:
            self._flights.end(flight)  # whatever a host's own cache does, nobody is left waiting

    def _result(self, target: CacheableVersion, ticket: Ticket[Result], deadline: float) -> Result:
        """Return a row's result, or ``_MISSING`` where it has to be asked for once more."""
        running = ticket.flight.future
        if running.cancelled():
            return _MISSING
        error = running.exception()
        if isinstance(error, DeadlineExceeded) and deadline > ticket.flight.deadline:
            return _MISSING  # those who began it had less time
        if isinstance(error, NotReady) and ticket.flight.by is not target:
            return _MISSING  # it was the same version, loaded before, and is going
        if error is not None:
            raise copy_of(error)
        result = running.result()[ticket.place]
        if ticket.own:
            return result
        return copy_of(result) if isinstance(result, Exception) else copy.deepcopy(result)


def _keys(key_of: Callable[[Any], str], rows: Sequence[Any], at_once: int) -> Steps[list[str]]:
    keys: list[str] = []
    for start in range(0, len(rows), at_once):
        keys += map(key_of, rows[start : start + at_once])
        yield
    return keys
