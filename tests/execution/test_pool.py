"""A pool keeps its replicas alive and in number, in virtual time: no test here waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from modelserve.errors import DeadlineExceeded, InferenceFailed, LoadFailed, NotReady, Overloaded, WorkerDied
from modelserve.events import CircuitClosed, CircuitOpened, Event, PoolScaled, WorkerLost
from modelserve.execution.pool import Pool, PoolOptions
from modelserve.execution.supervisor import Infer
from modelserve.ports import NotRun
from modelserve.testing.clock import VirtualTimeLoop
from modelserve.types import Json, Row, Scaling

POISON, HANG = -1.0, -2.0


class FakeReplica:
    """Doubles its rows, ten milliseconds a batch, one batch after the other; dies of poison and hangs when told to."""

    def __init__(self, world: World, place: int) -> None:
        self.world = world
        self.place = place
        self.number = len(world.replicas)
        world.replicas.append(self)
        self.batches: list[tuple[Sequence[Row], asyncio.Future[list[Json]]]] = []
        self.ran: list[Sequence[Row]] = []
        self.over: asyncio.Future[str] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.started = False

    async def start(self) -> None:
        self.over = asyncio.get_running_loop().create_future()
        await asyncio.sleep(self.world.start_s)
        if self.world.failing_starts:
            self.world.failing_starts -= 1
            raise LoadFailed("no weights")
        self.started = True

    def infer(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        answer: asyncio.Future[list[Json]] = asyncio.get_running_loop().create_future()
        if not self.alive:
            answer.set_exception(NotRun())
            return answer
        self.batches.append((rows, answer))
        if len(self.batches) == 1:
            self._begin()
        return answer

    def _begin(self) -> None:
        rows, _ = self.batches[0]
        self.ran.append(rows)
        if (HANG,) not in rows:
            self.timer = asyncio.get_running_loop().call_later(self.world.batch_s, self._end)

    def _end(self) -> None:
        rows, answer = self.batches[0]
        if not self.world.deadly.isdisjoint(x for (x,) in rows):
            self.kill("segmentation fault")
            return
        self.batches.pop(0)
        if not answer.done():
            answer.set_result([2 * x for (x,) in rows])
        if self.batches:
            self._begin()

    async def stop(self) -> None:
        self._be_over("it was stopped")

    def kill(self, reason: str) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for i, (_, answer) in enumerate(self.batches):
            if not answer.done():
                answer.set_exception(WorkerDied(reason) if i == 0 else NotRun())
        self.batches = []
        self._be_over(reason)

    def _be_over(self, reason: str) -> None:
        if self.over is not None and not self.over.done():
            self.over.set_result(reason)

    async def ended(self) -> str:
        assert self.over is not None
        return await asyncio.shield(self.over)

    @property
    def alive(self) -> bool:
        return self.started and self.over is not None and not self.over.done()

    def detail(self) -> Mapping[str, Json]:
        return {"number": self.number}


class World:
    """What the replicas of a test have in common, and what their pool told."""

    def __init__(self) -> None:
        self.replicas: list[FakeReplica] = []
        self.told: list[Event] = []
        self.start_s = 1.0
        self.batch_s = 0.01
        self.failing_starts = 0
        self.deadly: set[float] = {POISON}

    def pool(self, **options: Any) -> Pool:
        return Pool(
            lambda place: FakeReplica(self, place),
            PoolOptions(**options),
            model_name="m",
            version="1",
            tell=self.told.append,
            clock=asyncio.get_running_loop().time,
        )

    @property
    def living(self) -> int:
        return sum(replica.alive for replica in self.replicas)

    def told_of(self, kind: type) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]


async def prove(infer: Infer) -> None:
    """Warm up, so that the cost of batches is known."""
    for size in (1, 2, 4):
        await infer([(0.0,)] * size)


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    """Run a coroutine on a loop with virtual time, and fail if it leaves an unhandled error behind."""
    loop = VirtualTimeLoop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        yield runner.run
    assert unhandled == []


def now() -> float:
    return asyncio.get_running_loop().time()


async def ask(pool: Pool, *values: float, timeout_s: float = 10.0) -> list[Any]:
    return list(await pool.submit([(value,) for value in values], now() + timeout_s))


async def outcome(pool: Pool, value: float, timeout_s: float = 10.0) -> Any:
    """Return the answer to one row, or the error."""
    try:
        return (await ask(pool, value, timeout_s=timeout_s))[0]
    except Exception as error:
        return error


def test_waiting_is_not_advised_where_it_cannot_help(run: Callable[..., Any]) -> None:
    """A refusal names ``timeout_ms``, and no time to try again, where the model alone takes longer than is left."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 1.5
        pool = world.pool()
        await pool.start(prove)
        assert pool.at_least(1) == pytest.approx(1.5)
        first = asyncio.create_task(outcome(pool, 1.0, 1.0))
        await asyncio.sleep(0.01)  # an idle pool refuses nothing
        impossible, busy = await outcome(pool, 1.0, 1.0), await outcome(pool, 1.0, 2.0)
        assert isinstance(await first, DeadlineExceeded)
        assert isinstance(impossible, Overloaded)
        assert (impossible.retry_after, impossible.retryable) == (None, False)
        assert str(impossible) == "the model takes about 1.5 s for this alone, and timeout_ms leaves 1 s"
        assert isinstance(busy, Overloaded)
        assert busy.retry_after is not None
        assert "try again" in str(busy)
        await pool.stop()

    run(scenario())


def test_a_worker_that_dies_is_replaced_at_once(run: Callable[..., Any]) -> None:
    """One death is followed by a restart without a pause; the new worker is proven before it takes a row."""

    async def scenario() -> None:
        world = World()
        pool = world.pool()
        await pool.start(prove)
        world.replicas[0].kill("segmentation fault")
        await asyncio.sleep(0)
        assert not pool.alive
        await asyncio.sleep(world.start_s + 0.5)
        assert pool.alive
        assert [len(rows) for rows in world.replicas[1].ran] == [1, 2, 4]
        assert await ask(pool, 4.0) == [8.0]
        assert pool.status().restarts == 1
        assert world.told_of(WorkerLost) == [WorkerLost("m", "1", "segmentation fault", 0.0)]
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_batch_mates_of_a_poison_row_are_answered_by_another_worker(run: Callable[..., Any]) -> None:
    """The rows of a batch that killed its worker run again alone; the one that kills twice is refused from then on."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2)
        await pool.start(prove)
        answers = await asyncio.gather(*(outcome(pool, value) for value in (1.0, POISON, 3.0)))
        assert answers[0] == 2.0
        assert answers[2] == 6.0
        assert isinstance(answers[1], InferenceFailed)
        assert len(world.told_of(WorkerLost)) == 2
        mate, again = await ask(pool, 3.0, POISON)
        assert mate == 6.0
        assert isinstance(again, InferenceFailed)
        assert "twice" in str(again)
        assert pool.status().batches.quarantined == 1
        await asyncio.sleep(5)
        assert world.living == 2
        assert await ask(pool, 5.0) == [10.0]
        await pool.stop()

    run(scenario())


def test_a_suspect_never_runs_on_the_last_worker_while_another_starts(run: Callable[..., Any]) -> None:
    """Of two workers one always lives: rows that were there at a death wait for the replacement, others do not."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2)
        await pool.start(prove)
        fewest, over = 2, False

        async def watch() -> None:
            nonlocal fewest
            while not over:
                fewest = min(fewest, world.living)
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        began = now()
        suspects = [asyncio.create_task(outcome(pool, value)) for value in (1.0, POISON, 3.0)]
        await asyncio.sleep(0.1)
        assert world.living == 1
        assert await outcome(pool, 5.0) == 10.0
        assert not any(each.done() for each in suspects)
        answers = await asyncio.gather(*suspects)
        assert [answers[0], answers[2]] == [2.0, 6.0]
        assert isinstance(answers[1], InferenceFailed)
        assert now() - began > world.start_s
        over = True
        await watching
        assert fewest == 1
        await pool.stop()

    run(scenario())


def test_two_suspects_are_never_on_all_workers_at_once(run: Callable[..., Any]) -> None:
    """Of three workers that run suspects at the same time, one is always left for the others."""

    async def scenario() -> None:
        world = World()
        world.start_s = 0.1
        pool = world.pool(smallest=3, largest=3, max_rows=1)
        await pool.start(prove)
        rows = [outcome(pool, POISON - offset) for offset in (0.0, 10.0, 20.0)]
        world.deadly = {POISON, POISON - 10.0, POISON - 20.0}
        first = await asyncio.gather(*rows)
        assert all(isinstance(each, InferenceFailed | WorkerDied) for each in first)
        await asyncio.sleep(5)
        assert world.living == 3
        running = asyncio.gather(*(outcome(pool, POISON - offset) for offset in (0.0, 10.0, 20.0)))
        while not running.done():
            assert world.living >= 1
            await asyncio.sleep(0.001)
        assert all(isinstance(each, InferenceFailed) for each in await running)
        await pool.stop()

    run(scenario())


def test_a_suspect_that_would_wait_too_long_has_its_deadline(run: Callable[..., Any]) -> None:
    """While the replacement does not start, rows that were there at the death are not run; the others are served."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2)
        await pool.start(prove)
        world.start_s = 100.0
        suspect = asyncio.create_task(outcome(pool, POISON, timeout_s=1.0))
        await asyncio.sleep(0.1)
        for value in (1.0, 2.0, 3.0):
            assert await outcome(pool, value) == 2 * value
        assert isinstance(await suspect, DeadlineExceeded)
        assert isinstance(await outcome(pool, POISON, timeout_s=1.0), DeadlineExceeded)
        assert world.living == 1
        await pool.stop()

    run(scenario())


def test_the_second_death_of_one_suspect_does_not_count(run: Callable[..., Any]) -> None:
    """What kills a second time is refused from then on: its worker is replaced at once, the circuit stays closed."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2)
        await pool.start(prove)
        world.deadly = {POISON - 10 * i for i in range(4)}
        for killer in sorted(world.deadly):
            assert isinstance(await outcome(pool, killer), InferenceFailed)
            await asyncio.sleep(5)
        assert len(world.told_of(WorkerLost)) == 8
        assert [event.retry_s for event in world.told_of(WorkerLost)][1::2] == [0.0] * 4
        assert world.told_of(CircuitOpened) == []
        await pool.stop()

    run(scenario())


def test_without_another_worker_victims_are_told_at_once_and_convicted_when_they_come_back(
    run: Callable[..., Any],
) -> None:
    """The callers of the only worker hear of its death at once; those who come back run alone: one is found guilty."""

    async def scenario() -> None:
        world = World()
        pool = world.pool()
        await pool.start(prove)
        began = now()
        first = await asyncio.gather(*(outcome(pool, value) for value in (1.0, POISON, 3.0)))
        assert [type(error) for error in first] == [WorkerDied] * 3
        assert now() - began < 0.1
        await asyncio.sleep(2)
        again = await asyncio.gather(*(outcome(pool, value) for value in (1.0, 3.0, POISON, 7.0)))
        assert again[:2] == [2.0, 6.0]
        assert isinstance(again[2], InferenceFailed)
        assert again[3] == 14.0 or isinstance(again[3], WorkerDied)
        await asyncio.sleep(5)
        assert await ask(pool, 7.0) == [14.0]
        await pool.stop()

    run(scenario())


def test_a_staged_batch_survives_the_worker_it_was_handed_to(run: Callable[..., Any]) -> None:
    """Rows that were handed over but not begun are run elsewhere as if nothing had happened."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(max_rows=1)
        await pool.start(prove)
        victim, staged = (asyncio.create_task(outcome(pool, value)) for value in (1.0, 2.0))
        await asyncio.sleep(0.005)
        assert len(world.replicas[0].batches) == 2
        world.replicas[0].kill("killed")
        assert isinstance(await victim, WorkerDied)
        assert await staged == 4.0
        await pool.stop()

    run(scenario())


def test_a_worker_that_hangs_is_killed_after_its_callers_have_gone(run: Callable[..., Any]) -> None:
    """A batch that does not end is ended, and its worker with it, a while after the last deadline in it."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2, hang_limit_s=1.0)
        await pool.start(prove)
        with pytest.raises(DeadlineExceeded):
            await ask(pool, HANG, timeout_s=1.0)
        assert await ask(pool, 1.0) == [2.0]
        assert world.living == 2
        await asyncio.sleep(2)
        assert world.living == 1
        await asyncio.sleep(2)
        assert world.living == 2
        assert "did not end" in world.told_of(WorkerLost)[0].reason
        await pool.stop()

    run(scenario())


def test_a_host_that_stood_still_does_not_take_its_workers_for_hung(run: Callable[..., Any]) -> None:
    """After a machine was halted all deadlines are over at once; the workers had no time either, and live on."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.3
        pool = world.pool(hang_limit_s=1.0)
        await pool.start(prove)
        await asyncio.sleep(0.4)  # the next look at the workers comes before the end of the batch
        asking = asyncio.create_task(outcome(pool, 1.0))
        await asyncio.sleep(0.05)
        assert world.replicas[0].batches
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.jump(60)
        await asking
        await asyncio.sleep(3)
        assert world.told_of(WorkerLost) == []
        assert await ask(pool, 1.0) == [2.0]
        await pool.stop()

    run(scenario())


def test_a_slow_batch_is_not_a_hang(run: Callable[..., Any]) -> None:
    """A batch may outlive its callers by several times what batches are known to take."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 5.0
        pool = world.pool(hang_limit_s=0.1)
        await pool.start(prove)
        with pytest.raises(DeadlineExceeded):
            await ask(pool, 1.0, timeout_s=1.0)
        await asyncio.sleep(8)
        assert pool.alive
        assert pool.status().restarts == 0
        await pool.stop()

    run(scenario())


def test_workers_that_keep_dying_open_the_circuit(run: Callable[..., Any]) -> None:
    """After five deaths within a minute the version is not ready, restarts become rare, and calls fail at once."""

    async def scenario() -> None:
        world = World()
        world.start_s = 0.1
        pool = world.pool()
        await pool.start(prove)
        while pool.status().restarts < 4:
            world.replicas[-1].kill("again")
            await asyncio.sleep(2.5)
        world.replicas[-1].kill("again")
        await asyncio.sleep(0.01)
        assert len(world.told_of(CircuitOpened)) == 1
        assert pool.status().circuit_open
        with pytest.raises(NotReady, match="keep dying"):
            await ask(pool, 1.0)
        await asyncio.sleep(31)
        assert await ask(pool, 1.0) == [2.0]
        assert not pool.alive  # on probation
        await asyncio.sleep(31)
        assert pool.alive
        assert len(world.told_of(CircuitClosed)) == 1
        await pool.stop()

    run(scenario())


def test_a_restart_that_fails_is_tried_again(run: Callable[..., Any]) -> None:
    """A replacement that does not start counts as a death: a pause, and the next one."""

    async def scenario() -> None:
        world = World()
        pool = world.pool()
        await pool.start(prove)
        world.failing_starts = 2
        world.replicas[0].kill("gone")
        await asyncio.sleep(10)
        assert pool.alive
        assert [event.retry_s for event in world.told_of(WorkerLost)] == [0.0, 0.5, 1.0]
        assert "no weights" in world.told_of(WorkerLost)[1].reason
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_a_start_that_hangs_is_given_up(run: Callable[..., Any]) -> None:
    """A replica that does not start within its limit fails the pool's start, and nothing is left."""

    async def scenario() -> None:
        world = World()
        world.start_s = 1000.0
        pool = world.pool(smallest=2, largest=2, start_limit_s=5.0)
        with pytest.raises(LoadFailed, match="within 5 s"):
            await pool.start(prove)
        assert now() < 6
        assert all(replica.over is not None and replica.over.done() for replica in world.replicas)

    run(scenario())


def test_a_worker_that_dies_while_it_is_proven_fails_the_start(run: Callable[..., Any]) -> None:
    """A version whose warm-up kills its worker is one that does not load."""

    async def fatal(infer: Infer) -> None:
        await infer([(POISON,)])

    async def scenario() -> None:
        world = World()
        with pytest.raises(LoadFailed, match="lost while it was proven"):
            await world.pool().start(fatal)
        assert world.living == 0

    run(scenario())


def test_a_call_that_cannot_wait_for_the_restart_is_refused_with_the_time_left(run: Callable[..., Any]) -> None:
    """While no worker lives, a call with time to wait waits, and one without is told when to come back."""

    async def scenario() -> None:
        world = World()
        world.start_s = 2.0
        pool = world.pool()
        await pool.start(prove)
        world.replicas[0].kill("gone")
        await asyncio.sleep(0.5)
        with pytest.raises(Overloaded) as refused:
            await ask(pool, 1.0, timeout_s=1.0)
        assert refused.value.retry_after is not None
        assert 1.0 < refused.value.retry_after < 2.0
        assert await ask(pool, 1.0, timeout_s=5.0) == [2.0]
        await pool.stop()

    run(scenario())


SCALING = Scaling(out_above=50, out_after_s=2, in_below=5, in_after_s=180, cooldown_s=30)


async def crowd(pool: Pool, callers: int, seconds: float) -> None:
    """Have so many callers ask one row after the other, or be refused and come back."""
    end = now() + seconds

    async def caller() -> None:
        while now() < end:
            if isinstance(await outcome(pool, 1.0, timeout_s=60.0), Overloaded):
                await asyncio.sleep(0.05)

    await asyncio.gather(*(caller() for _ in range(callers)))


async def stream(pool: Pool, per_second: int, seconds: float) -> None:
    """Send so many rows a second, whatever becomes of the ones before."""
    calls = []
    for _ in range(int(per_second * seconds)):
        calls.append(asyncio.create_task(outcome(pool, 1.0, timeout_s=60.0)))
        await asyncio.sleep(1 / per_second)
    await asyncio.gather(*calls)


def test_a_pool_grows_under_load_and_shrinks_after_minutes_of_quiet(run: Callable[..., Any]) -> None:
    """More than 50 waiting rows bring a further replica, proven first; three quiet minutes take it away again."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.1
        pool = world.pool(smallest=1, largest=3, max_rows=8, scaling=SCALING)
        await pool.start(prove)
        await crowd(pool, 200, 10.0)
        assert world.living == 2
        assert [len(rows) for rows in world.replicas[1].ran[:3]] == [1, 2, 4]
        await crowd(pool, 200, 40.0)
        assert world.living == 3
        await asyncio.sleep(170)
        assert world.living == 3
        await asyncio.sleep(20)
        assert world.living == 2
        await asyncio.sleep(600)
        assert world.living == 1
        scaled = world.told_of(PoolScaled)
        assert [(event.before, event.after) for event in scaled] == [(1, 2), (2, 3), (3, 2), (2, 1)]
        assert all(event.depth > 50 for event in scaled[:2])
        status = pool.status()
        assert (status.scaled_out, status.scaled_in) == (2, 2)
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_a_replica_keeps_its_place_and_a_free_place_is_taken_again(run: Callable[..., Any]) -> None:
    """Places are numbered from 0 without gaps, so that devices dealt out by number stay evenly used."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.1
        pool = world.pool(smallest=2, largest=3, max_rows=8, scaling=SCALING)
        await pool.start(prove)
        assert [replica.place for replica in world.replicas] == [0, 1]
        world.replicas[0].kill("segmentation fault")
        await asyncio.sleep(world.start_s + 0.5)
        assert [replica.place for replica in world.replicas if replica.alive] == [1, 0]
        for _ in range(2):
            await crowd(pool, 200, 40.0)
            assert sorted(replica.place for replica in world.replicas if replica.alive) == [0, 1, 2]
            await asyncio.sleep(200)
            assert world.living == 2
        await pool.stop()

    run(scenario())


def test_a_confined_pool_gives_replicas_up_and_grows_back(run: Callable[..., Any]) -> None:
    """It answers with the replicas it keeps, does not scale meanwhile, and has its full number after the release."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.1
        pool = world.pool(smallest=3, largest=4, max_rows=8, scaling=SCALING)
        await pool.start(prove)
        await pool.confine(2)
        assert (world.living, pool.size) == (2, 2)
        await crowd(pool, 300, 20.0)
        assert world.living == 2
        await asyncio.sleep(5)
        pool.release()
        assert pool.size == 3
        await asyncio.sleep(world.start_s + 0.5)
        assert world.living == 3
        assert [len(rows) for rows in world.replicas[3].ran[:3]] == [1, 2, 4]
        assert sorted(replica.place for replica in world.replicas if replica.alive) == [0, 1, 2]
        assert await ask(pool, 4.0) == [8.0]
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_a_replica_that_gives_way_answers_what_it_has_in_hand(run: Callable[..., Any]) -> None:
    """Confining waits for the batch that runs; whoever stops waiting for that does not leave half a replica."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2, max_rows=1)
        await pool.start(prove)
        world.batch_s = 4.0
        answers = [asyncio.create_task(outcome(pool, value)) for value in (1.0, 2.0)]
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.confine(1), 1.0)
        assert await asyncio.gather(*answers) == [2.0, 4.0]
        await asyncio.sleep(0.1)
        assert (world.living, pool.size) == (1, 1)
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_replicas_that_do_not_answer_give_way_first(run: Callable[..., Any]) -> None:
    """One that is dead, and one that is only starting, go before one that serves."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=2, largest=2)
        await pool.start(prove)
        world.start_s = 100.0
        world.replicas[0].kill("gone")
        await asyncio.sleep(1)
        await pool.confine(1)
        assert pool.alive
        assert await ask(pool, 4.0) == [8.0]
        pool.release()
        await asyncio.sleep(1)
        assert pool.size == 2
        began = now()
        await pool.confine(1)
        assert now() - began < 1
        assert await ask(pool, 4.0) == [8.0]
        await pool.stop()
        assert all(replica.over is None or replica.over.done() for replica in world.replicas)

    run(scenario())


def test_a_pool_that_starts_with_fewer_grows_when_it_is_released(run: Callable[..., Any]) -> None:
    """Replicas that do not start then are tried again, with pauses, and what serves is not touched."""

    async def scenario() -> None:
        world = World()
        pool = world.pool(smallest=3, largest=3)
        await pool.start(prove, replicas=1)
        await asyncio.sleep(10)
        assert world.living == 1
        world.failing_starts = 3
        pool.release()
        await asyncio.sleep(1.1)
        assert (world.living, pool.size) == (1, 1)
        await asyncio.sleep(20)
        assert world.living == 3
        assert await ask(pool, 4.0) == [8.0]
        await pool.stop()
        pool.release()
        assert world.living == 0

    run(scenario())


def test_refused_calls_count_as_demand(run: Callable[..., Any]) -> None:
    """A queue that admission keeps short does not hide the need for another replica."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.05
        pool = world.pool(smallest=1, largest=2, max_rows=8, slo_s=0.1, scaling=SCALING)
        await pool.start(prove)
        await stream(pool, 400, 10.0)
        assert pool.status().batches.refused["late"] > 0
        assert world.living == 2
        await pool.stop()

    run(scenario())


def test_a_further_replica_that_does_not_start_leaves_the_pool_as_it_was(run: Callable[..., Any]) -> None:
    """Growing is tried again at a later decision; what serves is not touched."""

    async def scenario() -> None:
        world = World()
        world.batch_s = 0.1
        pool = world.pool(smallest=1, largest=2, max_rows=8, scaling=SCALING)
        await pool.start(prove)
        world.failing_starts = 1
        await crowd(pool, 200, 20.0)
        assert world.living == 1
        assert len(pool.status().replicas) == 1
        await crowd(pool, 200, 20.0)
        assert world.living == 2
        await pool.stop()

    run(scenario())


def test_shrinking_answers_what_the_leaving_replica_has_in_hand(run: Callable[..., Any]) -> None:
    """A replica that leaves finishes its batch first, and a pool that stops meanwhile waits for it."""

    async def scenario() -> None:
        world = World()
        quick = Scaling(in_after_s=3, cooldown_s=0)
        pool = world.pool(smallest=1, largest=2, max_rows=1, scaling=quick)
        await pool.start(prove)
        pool._history.clear()
        pool._supervisors.append(supervisor := pool._new_supervisor())
        await supervisor.open()
        world.batch_s = 4.0
        answers = [asyncio.create_task(outcome(pool, value)) for value in (1.0, 2.0)]
        await asyncio.sleep(3.7)
        assert [replica.state for replica in pool.status().replicas] == ["ready"]
        assert await asyncio.gather(*answers) == [2.0, 4.0]
        await pool.stop()
        assert world.living == 0

    run(scenario())


def test_whatever_dies_whenever_every_call_ends_and_nothing_is_left(run: Callable[..., Any]) -> None:
    """Workers that are killed at random moments cost nobody a wrong answer, and no call hangs."""

    async def scenario() -> None:
        for seed in range(20):
            chance = random.Random(seed)
            world = World()
            world.start_s = 0.2
            pool = world.pool(smallest=3, largest=3, max_rows=4)
            await pool.start(prove)

            async def caller(value: float, pool: Pool = pool, chance: random.Random = chance) -> None:
                for _ in range(20):
                    began = now()
                    answer = await outcome(pool, value, timeout_s=1.0)
                    assert answer == 2 * value or isinstance(
                        answer, WorkerDied | DeadlineExceeded | Overloaded | NotReady | InferenceFailed
                    )
                    assert now() - began < 1.01
                    await asyncio.sleep(chance.random() / 50)

            async def killer(world: World = world, chance: random.Random = chance) -> None:
                for _ in range(4):
                    await asyncio.sleep(chance.random() / 10)
                    chance.choice(world.replicas).kill("at random")

            await asyncio.gather(killer(), *(caller(float(i)) for i in range(1, 21)))
            await pool.stop()
            assert world.living == 0

    run(scenario())


def test_a_closed_pool_stops_a_start_that_is_under_way(run: Callable[..., Any]) -> None:
    """Stopping while a replacement starts leaves nothing behind, and does not wait for it."""

    async def scenario() -> None:
        world = World()
        pool = world.pool()
        await pool.start(prove)
        world.start_s = 100.0
        world.replicas[0].kill("gone")
        await asyncio.sleep(1)
        began = now()
        await pool.stop()
        assert now() - began < 2
        assert world.living == 0
        assert all(replica.over is not None and replica.over.done() for replica in world.replicas)

    run(scenario())
