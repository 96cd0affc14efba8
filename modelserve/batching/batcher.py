"""Collect concurrent calls, run them as one, hand each its own result.

The one batching primitive of modelserve. It belongs to one event loop and needs neither lock nor task per call:
a call goes to the end of a queue, and at the end of the loop's present turn every idle runner takes what waits, up
to a batch. While all runners are busy the queue grows, and with it the next batch. A lone call therefore waits for
nothing, and a crowd is batched without a timer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar

from modelserve.batching.admission import Admission, Wait
from modelserve.batching.calls import Call, Parts, calls_of, error_of, fail, items_of, rows_of, scatter, shutting_down
from modelserve.batching.quarantine import Care, Judgement, Quarantine
from modelserve.batching.recovery import Recovery, Trial
from modelserve.errors import InferenceFailed, OutOfMemory, Overloaded, WorkerDied
from modelserve.ports import NotRun
from modelserve.types import BatchStats

In = TypeVar("In")
Out = TypeVar("Out")
Runner: TypeAlias = Callable[[list[In]], Awaitable[Sequence[Out]]]
"""Runs one batch at a time and answers one result per item, in order.

It may return a future that is done already. It fails with :class:`NotRun` for a batch that it never began, and
with ``WorkerDied`` for the one that it died of; it is given none after either.
"""

_SWEEP_GRID_S: Final = 0.005
_CLOSE_S: Final = 1.0  # for batches that no caller waits for: those with callers end before a batcher is closed
_SLOW: Final = 4.0  # a batch within so many times its expected time may still end by itself


class _Batch(Generic[In, Out]):
    """Rows in the hands of a runner."""

    __slots__ = ("began", "held", "rows", "running", "trial")

    def __init__(self, trial: Trial[In, Out], rows: int, began: float, running: asyncio.Future[Sequence[Out]]) -> None:
        self.trial = trial
        self.rows = rows
        self.held = rows + rows_of(trial.rest or ())  # with those whose turn depends on how it ends
        self.began = began  # by the batcher's clock; for a staged batch: when the one before it ended
        self.running = running


class Lane(Generic[In, Out]):
    """A runner and the batches in its hands: the first one runs, a second may be staged behind it."""

    __slots__ = ("batches", "convicted", "depth", "drained", "free_at", "run")

    def __init__(self, run: Runner[In, Out], depth: int) -> None:
        self.run = run
        self.depth = depth
        self.batches: deque[_Batch[In, Out]] = deque()
        self.free_at = 0.0  # when it is expected to have ended what is in its hands, by the loop's time
        self.drained: asyncio.Future[None] | None = None
        self.convicted = False
        """Whether it died of an input that is refused from now on."""

    @property
    def at_risk(self) -> bool:
        """Whether it holds a row that may end it."""
        return any(batch.trial.deadly for batch in self.batches)


class Batcher(Generic[In, Out]):
    """Queues calls for a set of runners and batches them.

    ``max_rows`` bounds a batch (with ``adaptive``: the batch size follows its learned cost below that bound, see
    :class:`Admission`) and ``queue_limit`` the waiting items, both counted in items, not calls; a call of more items
    than a batch is split. A call that is foreseen to miss its deadline, or in a growing queue ``slo_s``, is refused.
    ``max_wait_s`` holds a partial batch back for that long, counted from its oldest call, and never longer than half
    of any waiting call's time limit. A batch that fails with ``InferenceFailed`` is searched for the item at fault, see
    :mod:`modelserve.batching.recovery`; one whose worker died is run again item by item, never on the last runner of
    several that are expected. With a ``fingerprint`` an item that failed is known again for a while, and so is in any
    case one that was there when a worker died, see :mod:`modelserve.batching.quarantine`.
    A deadline is enforced ``grid_s`` late at most: a finer grid sweeps the queue more often.
    Times are ``loop.time()``, except that the duration of batches is read from ``clock``.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        queue_limit: int,
        max_wait_s: float = 0.0,
        slo_s: float = math.inf,
        adaptive: bool = False,
        grid_s: float = _SWEEP_GRID_S,
        fingerprint: Callable[[In], Hashable] | None = None,
        runners_expected: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._queue_limit = queue_limit
        self._grid_s = grid_s
        self._max_wait_s = max_wait_s
        self._queue: deque[Call[In, Out]] = deque()
        self._lanes: list[Lane[In, Out]] = []
        self._idle = 0  # lanes with nothing in their hands
        self._leaving: set[Lane[In, Out]] = set()
        self._turn: asyncio.Handle | None = None
        self._window: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0  # beside the handle, because uvloop's does not always know
        self._running = 0  # items in the hands of runners
        self._held = 0  # with those whose turn depends on how these batches end
        self._left_at = self._loop.time()  # when a batch last ended, or the first one began after a rest
        self._closed = False
        self._sizes: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self.admission = Admission(max_rows=max_rows, slo_s=slo_s, adaptive=adaptive)
        self.recovery: Recovery[In, Out] = Recovery()
        self.quarantine: Quarantine[In] = Quarantine(fingerprint or hash, self._loop.time)
        self._remembers = fingerprint is not None
        self._runners_expected = runners_expected
        self.waiting = 0
        """Items in the queue."""

    # -- runners -------------------------------------------------------------------------------------------

    def add(self, runner: Runner[In, Out], *, depth: int = 1) -> Lane[In, Out]:
        """Give the batcher one more runner, to which it may hand ``depth`` batches: one to run, the others to follow.

        A second batch is handed over while the first runs if waiting for more company would gain it little.
        """
        lane = Lane(runner, depth)
        self._lanes.append(lane)
        self._idle += 1
        self._wake()
        return lane

    def remove(self, lane: Lane[In, Out]) -> asyncio.Future[None]:
        """Give a runner no more batches; the future is done when it has ended those in its hands."""
        if lane in self._lanes:
            self._lanes.remove(lane)
            self._idle -= not lane.batches
            lane.drained = self._loop.create_future()
            self._leaving.add(lane)
        drained = lane.drained
        assert drained is not None  # a lane that is not here any more has left through these lines
        if not lane.batches:
            self._leave(lane)
        return drained

    @property
    def refused(self) -> int:
        """How many calls were refused so far."""
        return self._refused.total()

    @property
    def runners(self) -> int:
        """How many runners take batches."""
        return len(self._lanes)

    def overdue(self, grace_s: float) -> list[Lane[In, Out]]:
        """Return the runners whose batch runs on, ``grace_s`` after the last of its callers has given up.

        A batch is also given four times the time that it is expected to take: slow is not hung.
        """
        now, clock = self._loop.time(), self._clock()
        found = []
        for lane in (*self._lanes, *self._leaving):
            if lane.batches:
                batch = lane.batches[0]
                last = max(call.deadline for call in calls_of(batch.trial.parts))
                slow = _SLOW * self.admission.cost.seconds(batch.rows)
                if now > last + grace_s and clock > batch.began + slow + grace_s:
                    found.append(lane)
        return found

    # -- calls ---------------------------------------------------------------------------------------------

    def submit(self, items: Sequence[In], deadline: float) -> asyncio.Future[Sequence[Out | Exception]]:
        """Queue one call; the future gives one result or exception per item, in order.

        The future itself fails with ``DeadlineExceeded`` once ``deadline`` has passed, run or not; cancelling it
        takes the call out of the queue. An item that is in quarantine has ``InferenceFailed`` for its result, and is
        not run. Raises ``Overloaded`` when the queue is full or the deadline will not be met, and ``NotReady`` after
        closing.
        """
        if self._closed:
            raise shutting_down()
        now = self._loop.time()
        call = Call(items, deadline, now, self._loop.create_future())
        if not items:
            call.settle(0, [])
        elif not deadline > now:  # over already, or no time at all (NaN)
            call.expire()
        elif judged := self.quarantine.judge(items) if self.quarantine else {}:
            self._separate(call, judged, now)
        else:
            self._admit(len(items), deadline, now)
            self._queue.append(call)
            self.waiting += len(items)
            self._await(call)
        return call.future

    def _separate(self, call: Call[In, Out], judged: Mapping[int, Judgement], now: float) -> None:
        """Refuse those of a call's items that are known to fail, and run the others apart."""
        refused = {i: each for i, each in judged.items() if isinstance(each, InferenceFailed)}
        if len(refused) < len(call.items):
            self._admit(len(call.items) - len(refused), call.deadline, now)
        for i, error in refused.items():
            fail([(call, i, i + 1)], error)
        for i in range(len(call.items)):
            part = [(call, i, i + 1)]
            if i not in judged:
                self.recovery.run_apart(part)
            elif i not in refused:
                self.recovery.run_alone(part, deadly=judged[i] is Care.DEADLY)
        self._await(call)

    def _await(self, call: Call[In, Out]) -> None:
        """See to it that a call is run, or answered when its time is over."""
        if self._sweep is None or call.deadline < self._sweep_due - self._grid_s:
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
        self.recovery.clear()
        self.waiting = 0
        for handle in (self._turn, self._window, self._sweep):
            if handle is not None:
                handle.cancel()
        running = [batch.running for batch in self._batches()]
        if running:
            _, hanging = await asyncio.wait(running, timeout=_CLOSE_S)
            for each in hanging:
                each.cancel()
            if hanging:
                await asyncio.wait(hanging)

    # -- admission -----------------------------------------------------------------------------------------

    def _admit(self, rows: int, deadline: float, now: float) -> None:
        """Raise ``Overloaded`` unless there is room and time. Whoever finds a runner idle is always let in."""
        if self.waiting + self.recovery.rows + rows > self._queue_limit:
            self._make_room(rows, now)
        growing = self.admission.flow.enters(self.waiting + self.recovery.rows + self._held + rows, now)
        if self._idle or not self._lanes:
            return
        left = deadline - now
        foreseen = self._foreseen(rows, now, growing=growing)
        searching_s = self._beyond_search(rows, left, growing=growing)
        if searching_s <= 0.0 and foreseen <= self.admission.limit(left, growing=growing):
            return
        if growing:
            self.admission.flow.refuses(now)
        if searching_s > 0.0:
            problem = f"rows fail, and it would take {searching_s:.2g} s too long to find them"
            self._refuse("late", problem, searching_s)
        self._refuse("late", f"it would take {foreseen:.2g} s to answer, which is too late", foreseen)

    def _make_room(self, rows: int, now: float) -> None:
        """Drop abandoned calls, or refuse."""
        self._queue = deque(call for call in self._queue if not call.future.done())
        self.waiting = sum(len(call.items) - call.taken for call in self._queue)
        self.recovery.prune(now)
        waiting = self.waiting + self.recovery.rows
        if waiting + rows > self._queue_limit:
            problem = f"the queue is full ({waiting} of {self._queue_limit} rows)"
            self._refuse("full", problem, self._foreseen(rows, now, growing=True))

    def _refuse(self, reason: str, problem: str, retry_after: float) -> None:
        """Say when the queue as it stands will have been answered: then there is room again."""
        self._refused[reason] += 1
        raise Overloaded(problem, retry_after=max(0.01, retry_after))

    def _foreseen(self, rows: int, now: float, *, growing: bool) -> float:
        """Return in how many seconds a call that joins the queue now will be answered."""
        busy_s = max(0.0, min((lane.free_at for lane in self._lanes), default=now) - now)
        wait = Wait(rows, self.waiting, self._running, len(self._lanes), busy_s, now - self._left_at, growing)
        return self.admission.foreseen(wait)

    def _beyond_search(self, rows: int, left: float, *, growing: bool) -> float:
        """Return how many seconds too late a call would be, once the bad rows before it and beside it are found.

        That it meets its deadline has to be almost certain; in a growing queue that it meets the objective, likely,
        unless the search of the next batch alone takes that long.
        """
        grouping, admission = self.recovery.grouping, self.admission
        if not (grouping.failing and admission.cost.known):
            return 0.0
        rows += self.waiting + self.recovery.ahead + self._held
        settle = partial(grouping.seconds_to_settle, cost=admission.cost, together=admission.max_rows)
        beyond = settle(rows) / len(self._lanes) - admission.limit(left, growing=False)
        if growing:
            limit = admission.limit(left, growing=True, batch_s=settle(admission.max_rows, sure=False))
            beyond = max(beyond, settle(rows, sure=False) / len(self._lanes) - limit)
        return beyond

    # -- from queue to runner ------------------------------------------------------------------------------

    def _wake(self) -> None:
        # At the end of this turn of the loop, not now: calls made in the same turn belong in one batch.
        if self._turn is None and not self._closed and (self._idle or self.waiting >= self.admission.stage_rows):
            self._turn = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._turn = None
        while (self._queue or self.recovery.rows) and (lane := self._free_lane()) is not None:
            trial = self._take(lane)
            if trial is None:
                return
            if trial.parts and self._run(lane, trial):
                self._wake()  # it ran within this turn of the loop; the next one is for others first
                return

    def _free_lane(self) -> Lane[In, Out] | None:
        """Return an idle runner, else the busy one that may be handed its next batch and ends first."""
        staging: Lane[In, Out] | None = None
        for lane in self._lanes:
            if not lane.batches:
                return lane
            if len(lane.batches) < lane.depth and (staging is None or lane.free_at < staging.free_at):
                staging = lane
        return staging if self.waiting >= self.admission.stage_rows else None

    def _held_back(self) -> bool:
        """Whether a partial batch should wait for company; sets the timer that ends the wait."""
        if self._max_wait_s == 0.0 or self.waiting >= self.admission.max_rows:
            return False
        until = min(min(call.entered + self._max_wait_s, (call.entered + call.deadline) / 2) for call in self._queue)
        if until <= self._loop.time():
            return False
        if self._window is not None:
            self._window.cancel()
        self._window = self._loop.call_at(until, self._dispatch)
        return True

    def _take(self, lane: Lane[In, Out]) -> Trial[In, Out] | None:
        """Take the next batch: of what is to be run again as far as that has its turn, else of the queue."""
        self._set_tainted_apart()
        return (self._take_again(lane) if self.recovery.rows else None) or self._take_fresh()

    def _take_again(self, lane: Lane[In, Out]) -> Trial[In, Out] | None:
        most, waiting, now = self.admission.max_rows, self.waiting, self._loop.time()
        return self.recovery.next(now, most, waiting=waiting) or self.recovery.next_apart(
            now, self.admission.cost, most, waiting=waiting, deadly=self._may_risk(lane)
        )

    def _may_risk(self, lane: Lane[In, Out]) -> bool:
        """Whether a row that may end its runner may have this one: never the last one of several."""
        if self._runners_expected() <= 1 and len(self._lanes) == 1:
            return True
        return any(other is not lane and not other.at_risk for other in self._lanes)

    def _set_tainted_apart(self) -> None:
        """Take what is left of a call with a bad row out of the queue; only of the first call can rows have run."""
        if self._queue and self._queue[0].tainted:
            call = self._queue.popleft()
            self.waiting -= len(call.items) - call.taken
            self.recovery.run_apart([(call, call.taken, len(call.items))])

    def _take_fresh(self) -> Trial[In, Out] | None:
        if not self._queue or self._held_back():
            return None
        return Trial(self._take_queued(), fresh=True)

    def _take_queued(self) -> Parts[In, Out]:
        """Take a batch from the head of the queue, without the calls for which nothing waits any more."""
        now = self._loop.time()
        room = self._share()
        if self.waiting <= room:  # the ordinary case: all that waits goes
            calls, self._queue, self.waiting = self._queue, deque(), 0
            return [(call, call.taken, len(call.items)) for call in calls if call.wanted(now)]
        parts: Parts[In, Out] = []
        while self._queue and room:
            call = self._queue[0]
            start, left = call.taken, len(call.items) - call.taken
            rows = min(left, room) if call.wanted(now) else 0
            if rows:
                call.taken += rows
                room -= rows
                parts.append((call, start, call.taken))
            if rows in (0, left):
                self._queue.popleft()
            self.waiting -= rows or left
        return parts

    def _share(self) -> int:
        """Return how many rows may go: a batch, or an equal share where several runners are free and that is cheap."""
        most = self.admission.max_rows
        if self._idle < 2:  # noqa: PLR2004  # this runner is the only one
            return most
        return min(most, max(self.admission.stage_rows, -(-self.waiting // self._idle)))

    def _run(self, lane: Lane[In, Out], trial: Trial[In, Out]) -> bool:
        """Hand a batch to a runner; return whether it is done already."""
        items = items_of(trial.parts)
        rows = len(items)
        self._sizes[(rows - 1).bit_length()] += 1
        self._reasons["staged" if lane.batches else "full" if rows >= self.admission.max_rows else "idle"] += 1
        now = self._loop.time()
        self._idle -= not lane.batches
        if not self._running:
            self._left_at = now
        self._running += rows
        batch = _Batch(trial, rows, self._clock(), self._begin(lane, items))
        self._held += batch.held
        lane.batches.append(batch)
        lane.free_at = max(lane.free_at, now) + self.admission.cost.seconds(rows)
        if batch.running.done():
            self._finish(lane, batch, batch.running)
            return True
        batch.running.add_done_callback(partial(self._finish, lane, batch))
        return False

    def _begin(self, lane: Lane[In, Out], items: list[In]) -> asyncio.Future[Sequence[Out]]:
        try:
            return asyncio.ensure_future(lane.run(items))
        except Exception as error:  # noqa: BLE001  # whatever it is, the callers of this batch wait for it
            failed: asyncio.Future[Sequence[Out]] = self._loop.create_future()
            failed.set_exception(error)
            return failed

    # -- from result to callers ----------------------------------------------------------------------------

    def _finish(self, lane: Lane[In, Out], batch: _Batch[In, Out], running: asyncio.Future[Sequence[Out]]) -> None:
        if not running.cancelled() and isinstance(running.exception(), NotRun | WorkerDied):
            self.remove(lane)
        self._hand_back(lane, batch)
        error = error_of(running, batch.rows)
        if error is None:
            self._succeed(batch.trial, running.result())
        elif self._closed:
            fail(batch.trial.parts, shutting_down() if isinstance(error, NotRun) else error)
        else:
            self._recover(lane, batch.trial, error)
        self.admission.restrict(self.recovery.grouping)
        self._wake()

    def _hand_back(self, lane: Lane[In, Out], batch: _Batch[In, Out]) -> None:
        """Take an ended batch out of the runner's hands, and learn from how long it took."""
        now = self._clock()
        if batch is lane.batches[0] and not batch.running.cancelled():
            self._learn(batch, now - batch.began)
        lane.batches.remove(batch)
        self._running -= batch.rows
        self._held -= batch.held
        answered = not batch.running.cancelled() and batch.running.exception() is None
        self._note_left(batch.rows if answered else 0)  # what failed is inside still, or says nothing of the pace
        if lane.batches:
            lane.batches[0].began = now
            # Not what was foreseen when they were handed over: one that took longer has put off all behind it.
            rest = sum(self.admission.cost.seconds(each.rows) for each in lane.batches)
            lane.free_at = self._left_at + rest
        else:
            lane.free_at = 0.0
            self._idle += lane.drained is None
            self._leave(lane)

    def _learn(self, batch: _Batch[In, Out], seconds: float) -> None:
        """Learn from how long a batch took; one that failed says nothing of how long those take that run."""
        if batch.running.exception() is None:
            self.admission.observe(batch.rows, seconds)
        elif isinstance(batch.running.exception(), InferenceFailed):
            self.recovery.grouping.took(seconds, self.admission.cost.seconds(batch.rows))
        (self.recovery.budget.earn if batch.trial.fresh else self.recovery.budget.spend)(seconds)

    def _note_left(self, rows: int) -> None:
        now = self._loop.time()
        self.admission.flow.leave(rows, now - self._left_at)
        self._left_at = now

    def _leave(self, lane: Lane[In, Out]) -> None:
        if lane.drained is not None and not lane.drained.done():
            lane.drained.set_result(None)
        self._leaving.discard(lane)

    def _succeed(self, trial: Trial[In, Out], results: Sequence[Out]) -> None:
        scatter(trial.parts, results)
        self.recovery.passed(trial)
        if self.quarantine and len(results) == 1:
            self.quarantine.clear(items_of(trial.parts)[0])

    def _recover(self, lane: Lane[In, Out], trial: Trial[In, Out], error: Exception) -> None:
        """See to the rows of a batch that failed: answer them, or have them run again."""
        if isinstance(error, NotRun):
            self.recovery.put_back(trial)
        elif isinstance(error, WorkerDied):
            self._inquire(lane, trial, error)
        elif isinstance(error, InferenceFailed):
            self._search(trial, error)
        else:
            fail(trial.parts, error)
            self.recovery.release(trial.rest or [])

    def _inquire(self, lane: Lane[In, Out], trial: Trial[In, Out], error: WorkerDied) -> None:
        """A worker died: whatever it ran is under suspicion, and the second time convicted."""
        verdict = self.quarantine.accuse(items_of(trial.parts))
        lane.convicted = verdict is not None
        self.recovery.release(trial.rest or [])
        if verdict is not None or not self._lanes:
            fail(trial.parts, verdict or error)
        else:
            self.recovery.run_alone(trial.parts, deadly=True)

    def _search(self, trial: Trial[In, Out], error: InferenceFailed) -> None:
        """The model failed: the row at fault is answered, and remembered unless it is the model that is at fault."""
        found = self.recovery.failed(trial)
        if not found:
            return
        fail(found, error)
        if self.recovery.grouping.broken:
            self.quarantine.forgive()
        elif self._remembers and not isinstance(error, OutOfMemory):
            self.quarantine.failed(items_of(found)[0], error, twice=trial.rest is not None)

    # -- deadlines -----------------------------------------------------------------------------------------

    def _sweep_at(self, deadline: float) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_due = deadline
        self._sweep = self._loop.call_at(deadline + self._grid_s / 2, self._expire)

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
            self._sweep_at(max(nearest, now + self._grid_s / 2))

    def _open_calls(self, *, waiting_only: bool = False) -> Iterator[Call[In, Out]]:
        yield from self._queue
        yield from self.recovery.calls()
        for batch in self._batches():
            yield from calls_of(batch.trial.rest or ()) if waiting_only else batch.trial.calls()

    def _batches(self) -> Iterator[_Batch[In, Out]]:
        for lane in (*self._lanes, *self._leaving):
            yield from lane.batches

    # -- what happened so far ------------------------------------------------------------------------------

    def stats(self) -> BatchStats:
        """Return counts since the start, and what batches cost as far as it was learned."""
        return BatchStats(
            batches=sum(self._sizes.values()),
            sizes={2**bits: count for bits, count in sorted(self._sizes.items())},
            reasons=dict(self._reasons),
            refused=dict(self._refused),
            quarantined=self.quarantine.refused,
            max_rows=self.admission.max_rows,
            fixed_s=self.admission.cost.fixed if self.admission.cost.known else None,
            per_row_s=self.admission.cost.per_row if self.admission.cost.known else None,
        )
