"""A request and the cache, in virtual time: one execution for all who ask, and an answer for each of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.caching.memory import MemoryCache
from modelserve.caching.predictions import PredictionCache
from modelserve.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from modelserve.signature import AT_ONCE, Field, Signature
from modelserve.testing.clock import VirtualTimeLoop
from tests.caching.doubles import FaultyCache, Target, Turns

T = TypeVar("T")


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work())


def ask(cache: PredictionCache, target: Target, *values: Any, within_s: float = 1.0) -> asyncio.Task[Any]:
    """Ask for some rows as a request does."""
    deadline = asyncio.get_running_loop().time() + within_s
    return asyncio.create_task(cache.answer(target.loaded, [(value,) for value in values], deadline))


def test_the_second_time_it_is_known() -> None:
    """What was computed once is answered from memory, at once, and says so."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        assert await ask(cache, target, 1) == ([[1]], [False])
        assert await ask(cache, target, 1) == ([[1]], [True])
        assert target.runs == [(1,)]
        assert +cache.counts == {("m", "miss"): 1, ("m", "local"): 1}

    run(work)


def test_only_the_rows_that_are_not_known_run() -> None:
    """Of a request of five rows, two known and two the same, two are run; all are answered at their place."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        await ask(cache, target, 1, 2)
        results, cached = await ask(cache, target, 3, 1, 4, 3, 2)
        assert results == [[3], [1], [4], [3], [2]]
        assert cached == [False, True, False, False, True]
        assert target.runs == [(1,), (2,), (3,), (4,)]

    run(work)


def test_five_hundred_callers_on_a_cold_key_are_one_execution() -> None:
    """However many ask for the same, whether something is shared or not, it is run once, also when it has expired."""

    async def work(far: FaultyCache | None) -> None:
        now = 0.0
        near = MemoryCache(clock=lambda: now)
        cache, target = PredictionCache.over(near if far is None else far), Target(ttl_s=60.0)
        for runs in (1, 2):
            target.gate.clear()
            asking = [ask(cache, target, 7) for _ in range(500)]
            await Turns.until(lambda runs=runs: len(target.runs) == runs)
            asking += [ask(cache, target, 7) for _ in range(100)]
            for _ in range(20):
                await asyncio.sleep(0)
            target.gate.set()
            answers = await asyncio.gather(*asking)
            assert [results for results, _ in answers] == [[[7]]] * 600
            assert len(target.runs) == runs
            if far is not None:
                break
            now += 61.0
        await cache.close()

    run(lambda: work(None))
    run(lambda: work(FaultyCache()))


def test_whoever_began_it_may_go() -> None:
    """The first caller is cancelled while its execution runs: the others are answered, by that execution."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        target.gate.clear()
        first, *others = [ask(cache, target, 7) for _ in range(5)]
        await Turns.until(lambda: target.runs)
        first.cancel()
        await asyncio.wait([first])
        target.gate.set()
        assert await asyncio.gather(*others) == [([[7]], [False])] * 4
        assert target.runs == [(7,)]

    run(work)


def test_who_joined_a_version_that_goes_is_answered_by_the_one_that_stays() -> None:
    """A version that was replaced and promoted again has the same keys, and a pool of its own."""

    async def work() -> None:
        cache, before, now = PredictionCache.over(None), Target(), Target()
        before.gate.clear()
        blocking = ask(cache, before, 1)
        await Turns.until(lambda: before.runs)
        waiting = ask(cache, before, 7)
        await asyncio.sleep(0)
        joining = ask(cache, now, 7)
        await asyncio.sleep(0)
        assert now.runs == []
        closing = asyncio.create_task(before.pool.close())
        with pytest.raises(NotReady):
            await waiting
        assert await joining == ([[7]], [False])
        assert now.runs == [(7,)]
        before.gate.set()
        await asyncio.gather(blocking, closing)

    run(work)


def test_each_caller_has_its_own_deadline() -> None:
    """The one who began it with 10 ms is told after 10 ms, one with 50 after 50, one with a second is answered."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        cache, target = PredictionCache.over(None), Target(timeout_s=1.0)
        target.gate.clear()
        asking = [ask(cache, target, 7, within_s=limit) for limit in (0.010, 0.050, 1.0)]
        told = []
        for i in (0, 1):
            with pytest.raises(DeadlineExceeded):
                await asking[i]
            told.append(loop.time())
        assert told == pytest.approx([0.010, 0.050], abs=0.001)
        target.gate.set()
        assert await asking[2] == ([[7]], [False])
        assert target.runs == [(7,)]

    run(work)


def test_a_cache_of_the_hosts_that_raises_leaves_nobody_waiting() -> None:
    """When keeping an answer fails for whatever reason, those who wait for it have it all the same."""

    class Full(MemoryCache):
        def put(self, key: str, value: bytes, ttl_s: float) -> None:
            raise OSError(f"no room for {key}, {len(value)} bytes, {ttl_s} s")

    async def work() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        cache, target = PredictionCache.over(Full()), Target()
        assert await asyncio.gather(*(ask(cache, target, 7) for _ in range(3))) == [([[7]], [False])] * 3
        assert [type(each) for each in complaints] == [OSError]

    run(work)


def test_a_caller_with_more_time_outlives_an_execution_with_less() -> None:
    """One that joins with ten seconds an execution that may take one is not told after one: it is run again."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target(timeout_s=1.0)
        target.gate.clear()
        short = ask(cache, target, 7, within_s=1.0)
        await Turns.until(lambda: target.runs)
        patient = ask(cache, target, 7, within_s=10.0)
        with pytest.raises(DeadlineExceeded):
            await short
        target.gate.set()
        assert await patient == ([[7]], [False])

    run(work)


@pytest.mark.parametrize("no_time", [0.0, -1.0, math.nan])
def test_no_time_is_exceeded_at_once_but_what_is_known_is_answered(no_time: float) -> None:
    """Without time nothing is run; an answer that is there needs none."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        with pytest.raises(DeadlineExceeded):
            await ask(cache, target, 1, within_s=no_time)
        assert target.runs == []
        await ask(cache, target, 1)
        assert await ask(cache, target, 1, within_s=no_time) == ([[1]], [True])

    run(work)


def test_what_nobody_waits_for_is_not_run() -> None:
    """When all who asked have gone before it began, it leaves the queue; asked again, it is run for whoever asks."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        target.gate.clear()
        busy = ask(cache, target, 0)
        await Turns.until(lambda: target.runs)
        gone = [ask(cache, target, 7) for _ in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        for each in gone:
            each.cancel()
        await asyncio.wait(gone)
        assert len(cache._flights) == 1
        target.gate.set()
        await busy
        assert target.runs == [(0,)]
        assert await ask(cache, target, 7) == ([[7]], [False])

    run(work)


def test_errors_are_told_to_all_who_wait_and_never_kept() -> None:
    """Each gets an error of its own, and the next request runs the row again."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        target.fails = True
        answers = await asyncio.gather(*(ask(cache, target, 7) for _ in range(3)))
        errors = [results[0] for results, _ in answers]
        assert all(isinstance(error, InferenceFailed) for error in errors)
        assert len(set(map(id, errors))) == 3
        target.fails = False
        assert await ask(cache, target, 7) == ([[7]], [False])

    run(work)


def test_what_the_pool_refuses_is_told_and_leaves_nothing_behind() -> None:
    """A full queue is ``Overloaded`` for who began it; nobody joins an execution that never was."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        with pytest.raises(Overloaded):
            await ask(cache, target, *range(2000))
        assert len(cache._flights) == 0
        await target.pool.close()
        with pytest.raises(Exception, match="taken out of service"):
            await ask(cache, target, 7)
        assert len(cache._flights) == 0

    run(work)


def test_answers_that_json_would_change_are_computed_each_time() -> None:
    """NaN comes back as NaN, because it is not kept."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        for _ in range(2):
            ((value,), cached) = await ask(cache, target, math.nan)
            assert math.isnan(value[0])
            assert cached == [False]
        assert len(target.runs) == 2

    run(work)


def test_what_a_caller_does_to_its_answer_reaches_nobody() -> None:
    """Lists are the caller's own, whether computed, joined or known."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        answers = [*await asyncio.gather(*(ask(cache, target, 7) for _ in range(3))), await ask(cache, target, 7)]
        for results, _ in answers:
            assert results == [[7]]
            results[0].append("mine")
        assert await ask(cache, target, 7) == ([[7]], [True])

    run(work)


def test_another_model_and_no_time_to_live_are_not_mixed_up() -> None:
    """Two models with the same input have an answer each."""

    async def work() -> None:
        cache, one, other = PredictionCache.over(None), Target(name="one"), Target(name="other")
        await asyncio.gather(ask(cache, one, 7), ask(cache, other, 7))
        assert (one.runs, other.runs) == ([(7,)], [(7,)])

    run(work)


def test_another_process_computed_it_meanwhile() -> None:
    """What a shared cache has is answered from there without running, and from memory the next time."""

    async def work() -> None:
        far = FaultyCache()
        here, there, target, other = PredictionCache.over(far), PredictionCache.over(far), Target(), Target()
        await ask(here, target, 7)
        await Turns.until(lambda: len(far))
        assert await ask(there, other, 7) == ([[7]], [True])
        assert await ask(there, other, 7) == ([[7]], [True])
        assert other.runs == []
        assert len(far.reads) == 2
        assert +there.counts == {("m", "shared"): 1, ("m", "local"): 1}
        await asyncio.gather(here.close(), there.close())

    run(work)


class Crowd:
    """Requests that come and go, over a model and caches that fail, and a look at what they got."""

    def __init__(self, *, shared: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.near, self.far, self.target = MemoryCache(), FaultyCache(), Target(timeout_s=0.5)
        self.cache = PredictionCache.over(self.far if shared else self.near)
        self.asked: list[tuple[asyncio.Task[Any], list[int], float]] = []
        self.ended: dict[asyncio.Task[Any], float] = {}

    async def ask(self, values: list[int], within_s: float) -> None:
        task = ask(self.cache, self.target, *values, within_s=within_s)
        task.add_done_callback(lambda _: self.ended.setdefault(task, self.loop.time()))
        self.asked.append((task, values, self.loop.time() + within_s))

    async def cancel(self, number: int) -> None:
        if number < len(self.asked):
            self.asked[number][0].cancel()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def model(self, state: str) -> None:
        self.target.fails = state == "fails"
        self.target.gate.clear() if state == "stalls" else self.target.gate.set()

    async def redis(self, state: str) -> None:
        self.far.error = OSError() if state == "fails" else None
        self.far.flows.clear() if state == "stalls" else self.far.flows.set()

    async def forget(self) -> None:
        await self.near.clear("")

    async def judge(self) -> None:
        """Wait for every request; each has its own answer, or a typed error, in time; nothing is left."""
        if self.asked:
            await asyncio.wait([task for task, _, _ in self.asked])
        for task, values, deadline in self.asked:
            assert self.ended[task] <= deadline + 0.01
            if not task.cancelled():
                assert_right(task, values)
        assert len(self.cache._flights) == 0
        await self.model("well")
        await self.redis("well")
        await self.cache.close()
        await self.target.pool.close()


def assert_right(task: asyncio.Task[Any], values: list[int]) -> None:
    error = task.exception()
    if error is not None:
        assert isinstance(error, DeadlineExceeded | Overloaded)
        return
    for result, value in zip(task.result()[0], values, strict=True):
        assert isinstance(result, InferenceFailed) or result == [value]


STATES = st.sampled_from(["well", "fails", "stalls"])
STEPS = st.one_of(
    st.tuples(st.just(Crowd.ask), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.floats(0.001, 3.0)),
    st.tuples(st.just(Crowd.cancel), st.integers(0, 30)),
    st.tuples(st.just(Crowd.wait), st.floats(0.0, 0.7)),
    st.tuples(st.just(Crowd.model), STATES),
    st.tuples(st.just(Crowd.redis), STATES),
    st.tuples(st.just(Crowd.forget)),
)


@pytest.mark.promise("P1")
@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), shared=st.booleans())
def test_whatever_happens_each_gets_its_own_answer_in_time(*, steps: list[Any], shared: bool) -> None:
    """Requests that come, go, run out of time and fail in any order: right or a typed error, and nothing left."""

    async def work() -> None:
        crowd = Crowd(shared=shared)
        for do, *arguments in steps:
            await do(crowd, *arguments)
        await crowd.judge()

    run(work)


def test_a_degraded_row_that_is_refused_leaves_nothing_behind() -> None:
    """Where there is no room for the rows that go past the cache, the request fails as others do, and is over."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        target.gate.clear()
        waiting = target.pool.submit([(0,)] * 1024, asyncio.get_running_loop().time() + 9)
        deadline = asyncio.get_running_loop().time() + 1
        with pytest.raises(Overloaded):
            await cache.answer(target.loaded, [(1,), (2,)], deadline, None, [(), ("spend",)])
        assert not cache.counts
        target.gate.set()
        await waiting

    run(work)


def test_the_keys_of_many_strings_are_made_in_turns() -> None:
    """While the keys of 20 rows of many strings are made, the loop has its turn every so many strings."""

    async def work() -> None:
        cache, target = PredictionCache.over(None), Target()
        target.signature = Signature([Field("x", "string", (AT_ONCE // 4,))])
        turns, seen = 0, []

        def key_of(row: int) -> str:
            seen.append(turns)
            return str(row)

        looking = asyncio.create_task(cache.look(target.loaded, key_of, range(20), 1.0))
        while not looking.done():
            await asyncio.sleep(0)
            turns += 1
        assert looking.result().keys == list(map(str, range(20)))
        assert max(seen.count(turn) for turn in seen) == 4

    run(work)
