"""What becomes of the rows of batches that failed.

A batch that fails is searched for its first bad row: half of it is run, then half of what must hold that row, until a
row has failed alone. What runs on the way is answered. What lies behind the bad row is released: nothing speaks against
it but that it stood beside one, so it is run together with others released, and goes the same way if that fails.

All this is work that one caller causes and all others pay for, so it has a budget, a fifth of the runners' time. Beyond
that a full batch of those that wait in the queue goes first, because it answers more rows than a search does, until the
rows that are searched have waited for a quarter of their time. Rows that are known to be worse wait until nothing else
does: those of a call that had a bad row before, those that failed before, and those that were in the hands of a worker
that died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from modelserve.batching.calls import Call, Part, Parts, calls_of, halve, rows_of
from modelserve.batching.cost import CostModel
from modelserve.batching.grouping import Grouping

In = TypeVar("In")
Out = TypeVar("Out")

_SHARE: Final = 0.2  # of the runners' time
_EARNED: Final = _SHARE / (1.0 - _SHARE)  # for each second of other work
_MOST_SAVED_S: Final = 1.0  # so that a rare failure is dealt with at once
_PATIENCE: Final = 0.25  # of its time a row waits for others once the budget is spent


class Trial(NamedTuple, Generic[In, Out]):
    """Rows to be run, and why: ``fresh`` from the queue, or for the sake of a batch that failed.

    One of the ``rest`` is bad if none of these rows is; with None in its place nothing is known of them. Those
    ``apart`` are known to be worse than others. A ``deadly`` row may end its runner.
    """

    parts: Parts[In, Out]
    rest: Parts[In, Out] | None = None
    fresh: bool = False
    apart: bool = False
    deadly: bool = False

    def calls(self) -> Iterator[Call[In, Out]]:
        """Return the calls that wait for these rows and for the rest."""
        yield from calls_of(self.parts)
        yield from calls_of(self.rest or ())


class Budget:
    """How much of the runners' time may go into recovery: a token bucket, in seconds."""

    __slots__ = ("_saved_s",)

    def __init__(self) -> None:
        self._saved_s = _MOST_SAVED_S

    @property
    def left(self) -> bool:
        """Whether recovery may have its turn before others."""
        return self._saved_s > 0.0

    def earn(self, seconds: float) -> None:
        """Note that other work ran for so long."""
        self._saved_s = min(_MOST_SAVED_S, self._saved_s + _EARNED * seconds)

    def spend(self, seconds: float) -> None:
        """Note that recovery ran for so long. What it takes while it disturbs no other is no debt for ever."""
        self._saved_s = max(-_MOST_SAVED_S, self._saved_s - seconds)


class _Shelf(Generic[In, Out]):
    """Rows that wait: in groups of which a row is bad, and those of which nothing is known."""

    __slots__ = ("at_fault", "grouping", "released", "rows")

    def __init__(self) -> None:
        self.grouping = Grouping()
        self.at_fault: deque[Parts[In, Out]] = deque()
        self.released: deque[Part[In, Out]] = deque()
        self.rows = 0

    def search(self, group: Parts[In, Out]) -> None:
        self.at_fault.append(group)
        self.rows += rows_of(group)

    def release(self, parts: Parts[In, Out]) -> None:
        self.released.extend(parts)
        self.rows += rows_of(parts)

    def withdraw(self, call: Call[In, Out]) -> Parts[In, Out]:
        """Give up the released rows of a call."""
        found = [part for part in self.released if part[0] is call]
        self.released = deque(part for part in self.released if part[0] is not call)
        self.rows -= rows_of(found)
        return found

    def pressing(self, now: float) -> bool:
        """Whether one of these rows has waited for a large part of its time."""
        heads = (*islice(self.released, 1), *(group[0] for group in self.at_fault))
        return any(now - call.entered > _PATIENCE * (call.deadline - call.entered) for call in calls_of(heads))

    def next(self, now: float, most: int) -> tuple[Parts[In, Out], Parts[In, Out] | None] | None:
        """Take what has waited longest: half of a group, and its rest, or of what was released."""
        while self.at_fault or self.released:
            group = min(self.at_fault, key=_entered, default=None)
            if group is None or (self.released and self.released[0][0].entered < _entered(group)):
                if parts := self._some_released(now, most):
                    return parts, None
                continue
            self.at_fault.remove(group)
            if parts := self._leave(group, now):
                return halve(parts, max(1, rows_of(parts) // 2))
        return None

    def _some_released(self, now: float, most: int) -> Parts[In, Out]:
        found: Parts[In, Out] = []
        while self.released and most:
            call, start, stop = self.released.popleft()
            middle = min(stop, start + most)
            if middle < stop:
                self.released.appendleft((call, middle, stop))
            if part := self._leave([(call, start, middle)], now):
                found += part
                most -= middle - start
        return found

    def _leave(self, parts: Parts[In, Out], now: float) -> Parts[In, Out]:
        """Count these parts out; return those for which a caller waits."""
        self.rows -= rows_of(parts)
        return _wanted(parts, now)

    def prune(self, now: float) -> None:
        self.released = deque(_wanted(self.released, now))
        self.at_fault = deque(filter(None, (_wanted(group, now) for group in self.at_fault)))
        self.rows = sum(map(rows_of, (self.released, *self.at_fault)))

    def calls(self) -> Iterator[Call[In, Out]]:
        for group in (self.released, *self.at_fault):
            yield from calls_of(group)


class Recovery(Generic[In, Out]):
    """Holds what is to be run again, and says what is run next. Knows neither runners nor time."""

    def __init__(self) -> None:
        self.budget = Budget()
        self._unbegun: deque[Trial[In, Out]] = deque()  # what a runner was given and never began
        self._shelf: _Shelf[In, Out] = _Shelf()
        self._apart: _Shelf[In, Out] = _Shelf()
        self._deadly: deque[Part[In, Out]] = deque()

    @property
    def grouping(self) -> Grouping:
        """How many rows of the queue to run together."""
        return self._shelf.grouping

    @property
    def ahead(self) -> int:
        """Rows that may go before those of the queue."""
        return self._shelf.rows + sum(rows_of(trial.parts) + rows_of(trial.rest or ()) for trial in self._unbegun)

    @property
    def rows(self) -> int:
        """Rows that wait here."""
        return self.ahead + self._apart.rows + len(self._deadly)

    # -- what comes in -------------------------------------------------------------------------------------

    def put_back(self, trial: Trial[In, Out]) -> None:
        """Take what a runner never began."""
        if trial.deadly:
            self._deadly.extendleft(trial.parts)
        else:
            self._unbegun.appendleft(trial)

    def run_alone(self, parts: Parts[In, Out], *, deadly: bool) -> None:
        """Take rows that run one by one: each of them failed before, or was there when a worker died."""
        for call, start, stop in parts:
            singles = [(call, i, i + 1) for i in range(start, stop)]
            if deadly:
                self._deadly.extend(singles)
            else:
                for single in singles:
                    self._apart.search([single])

    def run_apart(self, parts: Parts[In, Out]) -> None:
        """Take rows of calls that have a bad row."""
        self._apart.release(parts)

    def release(self, parts: Parts[In, Out]) -> None:
        """Take rows against which nothing speaks but their company."""
        self._shelf.release(parts)

    def passed(self, trial: Trial[In, Out]) -> None:
        """Note that a batch ran: if one of its rows and of the rest is bad, it is one of the rest."""
        shelf = self._of(trial)
        shelf.grouping.passed(rows_of(trial.parts))
        if trial.rest:
            shelf.search(trial.rest)

    def failed(self, trial: Trial[In, Out]) -> Parts[In, Out]:
        """Note that a batch failed. Returns the bad row if it is found, and nothing otherwise."""
        shelf = self._of(trial)
        if trial.rest is None:
            shelf.grouping.found_a_bad_one()
        if rows_of(trial.parts) > 1:
            shelf.release(trial.rest or [])
            shelf.search(trial.parts)
            return []
        shelf.grouping.failed_alone()
        self._separate(trial)
        return trial.parts

    def _separate(self, trial: Trial[In, Out]) -> None:
        """Part the rest from the rows that came in the same call as a bad one: they are likely to be bad too."""
        ((culprit, _, _),) = trial.parts
        culprit.tainted = True
        self._of(trial).release(trial.rest or [])
        if culprit.missing > 1:
            self._apart.release(self._shelf.withdraw(culprit))

    def _of(self, trial: Trial[In, Out]) -> _Shelf[In, Out]:
        return self._apart if trial.apart else self._shelf

    # -- what goes out -------------------------------------------------------------------------------------

    def next(self, now: float, most: int, *, waiting: int) -> Trial[In, Out] | None:
        """Return what is to be run before the ``waiting`` rows of the queue, or None; ``most`` fill a batch.

        Skips the rows of calls for which nothing waits any more.
        """
        if not self.budget.left and waiting >= most and not self._shelf.pressing(now):
            return None
        while self._unbegun:
            trial = self._unbegun.popleft()
            if parts := _wanted(trial.parts, now):
                return trial._replace(parts=parts)
        found = self._shelf.next(now, most)
        return None if found is None else Trial(*found)

    def next_apart(
        self, now: float, cost: CostModel, most: int, *, waiting: int, deadly: bool
    ) -> Trial[In, Out] | None:
        """Return the same of the rows that are known to be worse; ``deadly`` ones only where that may be."""
        if not self.budget.left and waiting:
            return None
        while deadly and self._deadly:
            if parts := _wanted([self._deadly.popleft()], now):
                return Trial(parts, apart=True, deadly=True)
        found = self._apart.next(now, self._apart.grouping.size(cost, most))
        return None if found is None else Trial(*found, apart=True)

    def calls(self) -> Iterator[Call[In, Out]]:
        """Return the calls of which rows wait here."""
        for trial in self._unbegun:
            yield from trial.calls()
        yield from self._shelf.calls()
        yield from self._apart.calls()
        yield from calls_of(self._deadly)

    def prune(self, now: float) -> None:
        """Let go of the rows of calls for which nothing waits any more."""
        self._shelf.prune(now)
        self._apart.prune(now)
        self._deadly = deque(_wanted(self._deadly, now))

    def clear(self) -> None:
        """Forget all that waits."""
        self._unbegun.clear()
        self._deadly.clear()
        self._shelf, self._apart = _Shelf(), _Shelf()


def _entered(group: Parts[In, Out]) -> float:
    return min(call.entered for call in calls_of(group))


def _wanted(parts: Iterable[Part[In, Out]], now: float) -> Parts[In, Out]:
    return [part for part in parts if part[0].wanted(now)]
