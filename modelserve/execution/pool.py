"""The dedicated pool of one model version: its replicas behind one batcher, kept alive and in number."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from typing import Any, Final

from modelserve.batching.batcher import Batcher
from modelserve.errors import NotReady, Overloaded
from modelserve.events import CircuitClosed, CircuitOpened, Event, PoolScaled, WorkerLost
from modelserve.execution.autoscale import Sample, decide, mean_depth
from modelserve.execution.restarts import RestartPolicy
from modelserve.execution.supervisor import Infer, Intact, Prove, ReplicaSupervisor
from modelserve.ports import Replica
from modelserve.types import Json, PoolStatus, Row, Scaling

_log = logging.getLogger("modelserve")
_TICK_S: Final = 0.5
_LONGEST_WAIT_S: Final = 60.0  # that a refused caller is told to wait
_FIRST_PAUSE_S: Final = 1.0  # before a missing replica that did not start is tried again
_LAST_PAUSE_S: Final = 60.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How a pool runs: ``smallest`` to ``largest`` replicas, how they batch, and the patience with them.

    ``adaptive`` makes ``max_rows`` an upper limit for a batch size that follows ``slo_s``. A replica that does not
    start within ``start_limit_s`` is killed, and so is one whose batch runs on ``hang_limit_s`` after the last of
    its callers has given up.
    """

    smallest: int = 1
    largest: int = 1
    max_rows: int = 256
    adaptive: bool = False
    queue_limit: int = 1024
    max_wait_s: float = 0.0
    slo_s: float = math.inf
    start_limit_s: float = 600.0
    hang_limit_s: float = 1.0
    scaling: Scaling = dataclasses.field(default_factory=Scaling)


class Pool:
    """Runs rows on a set of replicas. ``start`` before ``submit``; ``stop`` when the last request has gone.

    ``make_replica`` is given the number of the replica's place, counted from 0, which a successor takes over.
    ``fingerprint`` tells two rows apart, so that an input which kills its worker twice is refused, and for a while one
    on which the model fails. ``tell`` is called with what happens to the pool. ``intact`` surrounds each start of a
    replica (see :data:`Intact`).
    """

    def __init__(
        self,
        make_replica: Callable[[int], Replica],
        options: PoolOptions,
        *,
        fingerprint: Callable[[Row], Hashable] = hash,
        model_name: str = "",
        version: str = "",
        tell: Callable[[Event], None] = lambda _: None,
        intact: Intact = contextlib.nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make_replica = make_replica
        self._options = options
        self._name = (model_name, version)
        self._tell = tell
        self._intact = intact
        self._loop = asyncio.get_running_loop()
        self._batcher: Batcher[Row, Json] = Batcher(
            max_rows=options.max_rows,
            queue_limit=options.queue_limit,
            max_wait_s=options.max_wait_s,
            slo_s=options.slo_s,
            adaptive=options.adaptive,
            fingerprint=fingerprint,
            runners_expected=lambda: self.size,
            clock=clock,
        )
        self._clock = clock
        self._circuit = RestartPolicy()
        self._supervisors: list[ReplicaSupervisor] = []
        self._leaving: set[ReplicaSupervisor] = set()
        self._opening: dict[ReplicaSupervisor, asyncio.Task[None]] = {}
        self._confined = self._stopped = False
        self._fill_at, self._fill_pause_s = -math.inf, _FIRST_PAUSE_S
        self._restarts = 0  # of supervisors that are gone
        self._history: deque[Sample] = deque()
        self._refused = 0  # as of the last sample
        self._scaled_at = -math.inf
        self._scaled_out = self._scaled_in = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._prove: Prove
        self.measured: Mapping[int, float] = {}
        """The fastest seconds of the last warm-up, by rows in the batch."""

    async def start(self, prove: Prove, *, replicas: int | None = None) -> None:
        """Load every replica and ``prove`` it before it takes a row.

        With ``replicas`` it is so many, and no more until :meth:`release`.
        Raises what loading or proving raised, and leaves no replica behind, if one of them fails.
        """
        self._prove = prove
        self._confined = replicas is not None
        for _ in range(self._options.smallest if replicas is None else replicas):
            self._supervisors.append(self._new_supervisor())
        opened = await asyncio.gather(*(supervisor.open() for supervisor in self._supervisors), return_exceptions=True)
        for outcome in opened:
            if isinstance(outcome, BaseException):
                await self.stop()
                raise outcome
        self._in_background(self._watch())

    def submit(self, rows: Sequence[Row], deadline: float) -> asyncio.Future[Sequence[Json | Exception]]:
        """Queue the rows of one request; see :meth:`Batcher.submit`. Raises ``NotReady`` while no replica lives."""
        if not self._batcher.runners:
            self._refuse_unless_back_by(deadline)
        try:
            return self._batcher.submit(rows, deadline)
        except Overloaded as refusal:
            needed, left = self.at_least(len(rows)), deadline - self._loop.time()
            if needed <= left:
                raise
            problem = (
                f"the model takes about {needed:.3g} s for this alone, and timeout_ms leaves {max(0.0, left):.3g} s"
            )
            raise Overloaded(problem, retry_after=None) from refusal

    def at_least(self, rows: int) -> float:
        """Return the seconds that a request of so many rows takes at the very least, by the warm-up."""
        return max((seconds for size, seconds in self.measured.items() if size <= rows), default=0.0)

    async def stop(self) -> None:
        """Fail what waits, finish what runs, free the replicas."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._batcher.close()
        await asyncio.gather(*(supervisor.close() for supervisor in (*self._supervisors, *self._leaving)))

    def abandon(self) -> None:
        """Give up the replicas without the loop, which has ended."""
        for supervisor in (*self._supervisors, *self._leaving):
            with contextlib.suppress(RuntimeError):  # what would wake the loop; by then the replica has been given up
                supervisor.kill("its event loop has ended")

    async def confine(self, replicas: int) -> None:
        """Have at most so many replicas until :meth:`release`; return when the others have finished and are freed.

        Those that do not answer anyway go first.
        """
        self._confined = True
        by_worth = sorted(self._supervisors, key=lambda supervisor: (not supervisor.alive, supervisor.place))
        leaving = [self._dismiss(supervisor) for supervisor in by_worth[replicas:]]
        if leaving:
            await asyncio.wait(leaving)  # and whoever loses patience meanwhile does not stop them half-way

    def release(self) -> None:
        """Grow back to the smallest number of replicas, in the background, and scale again from there."""
        self._confined = False
        self._fill()

    @property
    def size(self) -> int:
        """How many replicas there are, those that start included."""
        return len(self._supervisors)

    @property
    def alive(self) -> bool:
        """Whether at least one replica can take a batch, and they do not keep dying."""
        return any(supervisor.alive for supervisor in self._supervisors) and not self._circuit.open

    @property
    def queue_depth(self) -> int:
        """Rows that wait for a replica."""
        return self._batcher.waiting

    def status(self) -> PoolStatus:
        """Return where the pool stands."""
        return PoolStatus(
            replicas=tuple(supervisor.status() for supervisor in self._supervisors),
            smallest=self._options.smallest,
            largest=self._options.largest,
            queue_depth=self.queue_depth,
            circuit_open=self._circuit.open,
            restarts=self._restarts + sum(supervisor.restarts for supervisor in self._supervisors),
            scaled_out=self._scaled_out,
            scaled_in=self._scaled_in,
            batches=self._batcher.stats(),
        )

    # -- replicas ------------------------------------------------------------------------------------------

    def _new_supervisor(self) -> ReplicaSupervisor:
        taken = {supervisor.place for supervisor in (*self._supervisors, *self._leaving)}
        place = next(number for number in itertools.count() if number not in taken)
        return ReplicaSupervisor(
            self._make_replica,
            place,
            self._batcher,
            prove=self._prove_and_learn,
            start_limit_s=self._options.start_limit_s,
            on_death=self._on_death,
            intact=self._intact,
        )

    async def _prove_and_learn(self, infer: Infer) -> None:
        """Prove a replica, and seed the cost of batches with the times that its warm-up took."""
        fastest: dict[int, float] = {}

        async def timed(rows: Sequence[Row]) -> list[Json]:
            began = self._clock()
            answers = await infer(rows)
            fastest[len(rows)] = min(self._clock() - began, fastest.get(len(rows), math.inf))
            return answers

        await self._prove(timed)
        self.measured = fastest
        if not self._batcher.admission.cost.known:
            self._batcher.admission.seed(fastest)

    def _on_death(self, reason: str, convicted: bool) -> float:  # noqa: FBT001  # as ReplicaSupervisor calls it
        was_open = self._circuit.open
        pause = 0.0 if convicted else self._circuit.died(self._loop.time())  # what is refused does not kill again
        _log.error("a worker of %s %s is lost, the next starts in %.1f s: %s", *self._name, pause, reason)
        self._tell(WorkerLost(*self._name, reason, pause))
        if self._circuit.open and not was_open:
            _log.error("the workers of %s %s keep dying; it is not ready", *self._name)
            self._tell(CircuitOpened(*self._name, self._circuit.deaths, reason))
        return pause

    def _refuse_unless_back_by(self, deadline: float) -> None:
        if self._circuit.open:
            raise NotReady("the workers of this model keep dying; it is being restarted now and then")
        back = min((supervisor.ready_at for supervisor in self._supervisors), default=math.inf)
        if back > deadline:
            left = min(_LONGEST_WAIT_S, max(0.01, back - self._loop.time()))
            raise Overloaded("no worker of this model is alive, one is being started", retry_after=left)

    # -- twice a second ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            began = self._loop.time()
            await asyncio.sleep(_TICK_S)
            # A host that stood still (suspended, migrated, throttled) finds every batch late, and none of them hung.
            stood_still = self._loop.time() - began > 2 * _TICK_S
            try:
                if not stood_still:
                    self._kill_hung()
                self._sample()
                self._fill()
                self._scale()
                if self._batcher.runners and self._circuit.lives(self._loop.time()):
                    self._tell(CircuitClosed(*self._name))
            except Exception:  # noqa: BLE001  # a watch that ended would leave a hung worker hanging for ever
                _log.exception("watching the pool of %s %s failed", *self._name)

    def _kill_hung(self) -> None:
        for lane in self._batcher.overdue(self._options.hang_limit_s):
            supervisor = next(
                (supervisor for supervisor in (*self._supervisors, *self._leaving) if supervisor.lane is lane), None
            )
            if supervisor is not None:
                supervisor.kill("a batch did not end, long after its last caller had given up")

    def _fill(self) -> None:
        """Start what is missing of the smallest number, unless it failed to start a moment ago."""
        if self._confined or self._stopped or self._loop.time() < self._fill_at:
            return
        while len(self._supervisors) < self._options.smallest:
            self._add()

    def _scale(self) -> None:
        if self._confined:
            return
        options, before = self._options, len(self._supervisors)
        change = decide(
            self._history,
            options.scaling,
            replicas=before,
            smallest=options.smallest,
            largest=options.largest,
            scaled_at=self._scaled_at,
        )
        if change == 0:
            return
        self._scaled_at = now = self._loop.time()
        scaled = PoolScaled(
            *self._name, before, before + change, mean_depth(self._history, since=now - options.scaling.out_after_s)
        )
        if change > 0:
            self._add(scaled)
        else:
            self._dismiss(self._supervisors[-1], scaled)

    def _sample(self) -> None:
        now, refused = self._loop.time(), self._batcher.refused
        self._history.append(Sample(now, self.queue_depth + refused - self._refused))
        self._refused = refused
        scaling = self._options.scaling
        while self._history[0].at < now - max(scaling.in_after_s, scaling.out_after_s) - 2 * _TICK_S:
            self._history.popleft()

    def _add(self, scaled: PoolScaled | None = None) -> None:
        supervisor = self._new_supervisor()
        self._supervisors.append(supervisor)
        self._opening[supervisor] = self._in_background(self._grow(supervisor, scaled))

    async def _grow(self, supervisor: ReplicaSupervisor, scaled: PoolScaled | None) -> None:
        try:
            await supervisor.open()
        except Exception as error:  # noqa: BLE001  # the pool goes on as it was; the next decision tries again
            _log.warning("a further replica of %s %s did not start: %s", *self._name, error)
            if supervisor in self._supervisors:  # it was not dismissed at this very moment
                self._supervisors.remove(supervisor)
            self._fill_at = self._loop.time() + self._fill_pause_s
            self._fill_pause_s = min(_LAST_PAUSE_S, 2 * self._fill_pause_s)
            return
        finally:
            self._opening.pop(supervisor, None)
        self._fill_pause_s = _FIRST_PAUSE_S
        if scaled is not None:
            self._scaled_out += 1
            self._tell(scaled)

    def _dismiss(self, supervisor: ReplicaSupervisor, scaled: PoolScaled | None = None) -> asyncio.Task[None]:
        self._supervisors.remove(supervisor)
        self._leaving.add(supervisor)
        return self._in_background(self._shrink(supervisor, scaled))

    async def _shrink(self, supervisor: ReplicaSupervisor, scaled: PoolScaled | None) -> None:
        """Take a replica away when it has finished what it has in hand; one that starts is given up."""
        opening = self._opening.pop(supervisor, None)
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        await supervisor.close()
        self._leaving.discard(supervisor)
        self._restarts += supervisor.restarts
        if scaled is not None:
            self._scaled_in += 1
            self._tell(scaled)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="modelserve-pool")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
