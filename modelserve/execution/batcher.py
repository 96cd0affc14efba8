"""Collect concurrent calls, run them as one, hand each its own result.

The one batching primitive of modelserve. It belongs to one event loop and needs neither lock nor task per call:
a call goes to the end of a queue, and at the end of the loop's present turn every idle runner takes what waits, up
to ``max_rows``. While all runners are busy the queue grows, and with it the next batch. A lone call therefore
waits for nothing, and a crowd is batched without a timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from modelserve.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded

In = TypeVar("In")
Out = TypeVar("Out")
Runner: TypeAlias = Callable[[list[In]], Awaitable[Sequence[Out]]]
"""Runs one batch at a time and answers one result per item, in order."""

_SWEEP_GRID_S = 0.005  # deadlines are enforced this late at most; a finer grid would sweep the queue too often

_CLOSE_S = 1.0  # whoever waits for a batch has left before a batcher is closed; this is for what nobody waits for
_FORGETTING = 0.2  # weight of the newest batch in the mean that retry_after is estimated from


class _Call(Generic[In, Out]):
    """One caller's items and the future it waits on."""

    __slots__ = ("deadline", "entered", "future", "items", "missing", "results", "taken")

    def __init__(
        self, items: Sequence[In], deadline: float, entered: float, future: asyncio.Future[Sequence[Out | Exception]]
    ) -> None:
        self.items = items
        self.deadline = deadline
        self.entered = entered
        self.future = future
        self.taken = 0
        self.missing = len(items)
        self.results: list[Out | Exception | None] | None = None

    def settle(self, start: int, results: Sequence[Out | Exception]) -> None:
        self.missing -= len(results)
        if len(results) < len(self.items):  # a part of a split call; the ordinary one is answered whole, by one batch
            self.results = self.results or [None] * len(self.items)
            self.results[start : start + len(results)] = results
            results = self.results  # type: ignore[assignment]  # while none is missing, none is None
        # The caller may have gone or been told of its deadline: a resolver only ever says "if not done, set".
        if self.missing == 0 and not self.future.done():
            self.future.set_result(results)

    def expire(self) -> None:
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(max(0.0, self.deadline - self.entered)))

    def refuse(self) -> None:
        if not self.future.done():
            self.future.set_exception(NotReady("the model is being taken out of service"))


_Part: TypeAlias = tuple[_Call[In, Out], int, int]
"""Items ``start`` to ``stop`` of a call."""


class _Running(NamedTuple, Generic[In, Out]):
    runner: Runner[In, Out]
    parts: list[_Part[In, Out]]
    rows: int
    started: float


class Batcher(Generic[In, Out]):
    """Queues calls for a set of runners and batches them.

    ``max_rows`` bounds a batch and ``queue_limit`` the waiting items, both counted in items, not calls; a call of
    more than ``max_rows`` items is split. ``max_wait_s`` holds a partial batch back for that long, counted from its
    oldest call, and never longer than half of any waiting call's time limit. A batch that fails with
    ``InferenceFailed`` is run again in halves until the item at fault stands alone. Times are ``loop.time()``.
    """

    def __init__(self, *, max_rows: int, queue_limit: int, max_wait_s: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_rows = max_rows
        self._queue_limit = queue_limit
        self._max_wait_s = max_wait_s
        self._queue: deque[_Call[In, Out]] = deque()
        self._halves: deque[list[_Part[In, Out]]] = deque()
        self._idle: deque[Runner[In, Out]] = deque()
        self._running: dict[asyncio.Future[Sequence[Out]], _Running[In, Out]] = {}
        self._turn: asyncio.Handle | None = None
        self._window: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0  # beside the handle, because uvloop's does not always know
        self._closed = False
        self._batch_seconds = 0.0
        self.waiting = 0
        """Items in the queue."""
        self.batches = 0
        """Batches run so far."""

    def add(self, runner: Runner[In, Out]) -> None:
        """Give the batcher one more runner."""
        self._idle.append(runner)
        self._wake()

    def submit(self, items: Sequence[In], deadline: float) -> asyncio.Future[Sequence[Out | Exception]]:
        """Queue one call; the future gives one result or exception per item, in order.

        The future itself fails with ``DeadlineExceeded`` once ``deadline`` has passed, run or not; cancelling it
        takes the call out of the queue. Raises ``Overloaded`` when the queue is full and ``NotReady`` after closing.
        """
        if self._closed:
            raise NotReady("the model is being taken out of service")
        if self.waiting + len(items) > self._queue_limit:
            self._admit(len(items))
        now = self._loop.time()
        call = _Call(items, deadline, now, self._loop.create_future())
        if not items:
            call.settle(0, [])
        elif not deadline > now:  # over already, or no time at all (NaN)
            call.expire()
        else:
            self._enqueue(call)
        return call.future

    def _enqueue(self, call: _Call[In, Out]) -> None:
        self._queue.append(call)
        self.waiting += len(call.items)
        if self._sweep is None or call.deadline < self._sweep_due - _SWEEP_GRID_S:
            self._sweep_at(call.deadline)
        self._wake()

    async def close(self) -> None:
        """Refuse new calls, fail the waiting ones with ``NotReady``, and wait a while for the running batches.

        A batch that does not end is given up, and its calls fail likewise.
        """
        self._closed = True
        for call in self._open_calls(waiting_only=True):
            call.refuse()
        self._queue.clear()
        self._halves.clear()
        self.waiting = 0
        for handle in (self._turn, self._window, self._sweep):
            if handle is not None:
                handle.cancel()
        if self._running:
            _, hanging = await asyncio.wait(self._running, timeout=_CLOSE_S)
            for running in hanging:
                running.cancel()
            if hanging:
                await asyncio.wait(hanging)

    # -- admission -----------------------------------------------------------------------------------------

    def _admit(self, rows: int) -> None:
        """Make room by dropping abandoned calls, or refuse."""
        self._queue = deque(call for call in self._queue if not call.future.done())
        self.waiting = sum(len(call.items) - call.taken for call in self._queue)
        if self.waiting + rows > self._queue_limit:
            turns = 1 + self.waiting // self._max_rows
            problem = f"the queue is full ({self.waiting} of {self._queue_limit} rows)"
            raise Overloaded(problem, retry_after=max(0.01, turns * self._batch_seconds))

    # -- from queue to runner ------------------------------------------------------------------------------

    def _wake(self) -> None:
        # At the end of this turn of the loop, not now: calls made in the same turn belong in one batch.
        if self._turn is None and self._idle and not self._closed:
            self._turn = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._turn = None
        while self._idle and (self._halves or self._queue):
            if not self._halves and self._held_back():
                return
            parts = self._take()
            if parts:
                self._run(self._idle.popleft(), parts)

    def _held_back(self) -> bool:
        """Whether a partial batch should wait for company; sets the timer that ends the wait."""
        if self._max_wait_s == 0.0 or self.waiting >= self._max_rows:
            return False
        until = min(min(call.entered + self._max_wait_s, (call.entered + call.deadline) / 2) for call in self._queue)
        if until <= self._loop.time():
            return False
        if self._window is not None:
            self._window.cancel()
        self._window = self._loop.call_at(until, self._dispatch)
        return True

    def _take(self) -> list[_Part[In, Out]]:
        """Take the next batch: what was left of a failed one, else the head of the queue. Skips who has gone."""
        now = self._loop.time()
        if self._halves:
            return [part for part in self._halves.popleft() if _wanted(part[0], now)]
        if self.waiting <= self._max_rows:  # the ordinary case: all that waits goes
            calls, self._queue, self.waiting = self._queue, deque(), 0
            return [(call, call.taken, len(call.items)) for call in calls if _wanted(call, now)]
        parts: list[_Part[In, Out]] = []
        room = self._max_rows
        while self._queue and room:
            call = self._queue[0]
            start, left = call.taken, len(call.items) - call.taken
            rows = min(left, room) if _wanted(call, now) else 0
            if rows:
                call.taken += rows
                room -= rows
                parts.append((call, start, call.taken))
            if rows in (0, left):
                self._queue.popleft()
            self.waiting -= rows or left
        return parts

    def _run(self, runner: Runner[In, Out], parts: list[_Part[In, Out]]) -> None:
        items = [item for call, start, stop in parts for item in call.items[start:stop]]
        self.batches += 1
        running = asyncio.ensure_future(runner(items))
        self._running[running] = _Running(runner, parts, len(items), self._loop.time())
        running.add_done_callback(self._finish)

    # -- from result to callers ----------------------------------------------------------------------------

    def _finish(self, running: asyncio.Future[Sequence[Out]]) -> None:
        runner, parts, rows, started = self._running.pop(running)
        self._idle.append(runner)
        self._batch_seconds += _FORGETTING * (self._loop.time() - started - self._batch_seconds)
        error = _error_of(running, rows)
        if error is None:
            self._scatter(parts, running.result())
        elif rows > 1 and isinstance(error, InferenceFailed) and not self._closed:
            self._halves.extendleft(reversed(_halve(parts, rows // 2)))
        else:
            self._scatter(parts, [_copy(error) for _ in range(rows)])
        self._wake()

    def _scatter(self, parts: list[_Part[In, Out]], results: Sequence[Out | Exception]) -> None:
        position = 0
        for call, start, stop in parts:
            call.settle(start, results[position : position + stop - start])
            position += stop - start

    # -- deadlines -----------------------------------------------------------------------------------------

    def _sweep_at(self, deadline: float) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_due = deadline
        self._sweep = self._loop.call_at(deadline + _SWEEP_GRID_S / 2, self._expire)

    def _expire(self) -> None:
        self._sweep = None
        now = self._loop.time()
        nearest = None
        for call in self._open_calls():
            if call.deadline <= now:
                call.expire()
            elif not call.future.done():
                nearest = call.deadline if nearest is None else min(nearest, call.deadline)
        if nearest is not None:
            self._sweep_at(max(nearest, now + _SWEEP_GRID_S / 2))

    def _open_calls(self, *, waiting_only: bool = False) -> Iterator[_Call[In, Out]]:
        yield from self._queue
        for parts in self._halves:
            yield from (call for call, _, _ in parts)
        if not waiting_only:
            for batch in self._running.values():
                yield from (call for call, _, _ in batch.parts)


def _wanted(call: _Call[In, Out], now: float) -> bool:
    """Whether anybody still waits for this call; tells its caller when its time is over."""
    if call.deadline <= now:
        call.expire()
    return not call.future.done()


def _halve(parts: list[_Part[In, Out]], rows: int) -> list[list[_Part[In, Out]]]:
    """Split a batch after ``rows`` items, through the middle of a call if need be."""
    left: list[_Part[In, Out]] = []
    right: list[_Part[In, Out]] = []
    for call, start, stop in parts:
        middle = min(stop, start + max(0, rows))
        rows -= stop - start
        if middle > start:
            left.append((call, start, middle))
        if stop > middle:
            right.append((call, middle, stop))
    return [left, right]


def _error_of(running: asyncio.Future[Sequence[Out]], rows: int) -> Exception | None:
    if running.cancelled():
        return NotReady("the model is being taken out of service")
    error = running.exception()
    if error is None:
        return _mismatch(running.result(), rows)
    return error if isinstance(error, Exception) else InferenceFailed(f"the model raised {type(error).__name__}")


def _mismatch(results: object, rows: int) -> InferenceFailed | None:
    if not isinstance(results, Sequence):
        return InferenceFailed(f"the model answered a {type(results).__name__} for {rows} rows")
    return None if len(results) == rows else InferenceFailed(f"the model answered {len(results)} rows for {rows}")


def _copy(error: Exception) -> Exception:
    """Give each caller an exception of its own: one raised in many tasks would collect all their tracebacks."""
    try:
        own = error.__class__.__new__(error.__class__)
        own.args = error.args
        own.__dict__.update(error.__dict__)
    except Exception:  # noqa: BLE001  # a class with a constructor of its own kind; no caller may be left waiting for it
        own = InferenceFailed(str(error))
    own.__cause__ = error.__cause__
    return own
