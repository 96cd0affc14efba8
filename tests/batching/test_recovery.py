"""Rows of batches that fail: as a policy, and as a service under a crowd in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.batching.batcher import Batcher
from modelserve.batching.calls import Call, fail, items_of, rows_of, scatter
from modelserve.batching.cost import CostModel
from modelserve.batching.recovery import Budget, Recovery, Trial
from modelserve.errors import DeadlineExceeded, InferenceFailed, OutOfMemory, Overloaded
from modelserve.testing.clock import VirtualTimeLoop

FAR = 1_000.0
Run: TypeAlias = Callable[..., Any]


@pytest.fixture
def run() -> Iterator[Run]:
    """Run a coroutine on a loop with virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        yield runner.run


# -- the policy alone --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=20),
    leaving=st.sets(st.integers(0, 19)),
    most=st.integers(1, 64),
    chance=st.randoms(use_true_random=False),
)
def test_each_row_is_answered_once_and_as_it_is(
    calls: list[list[bool]], leaving: set[int], most: int, chance: random.Random
) -> None:
    """Whichever rows are bad and leave: a good row is answered, a bad one fails, one that left is run no more."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        recovery: Recovery[tuple[int, int, bool], int] = Recovery()
        made = [
            Call([(i, j, bad) for j, bad in enumerate(rows)], FAR, float(i), loop.create_future())
            for i, rows in enumerate(calls)
        ]
        trial: Trial[Any, Any] | None = Trial([(call, 0, len(call.items)) for call in made], fresh=True)
        runs, gone = 0, set[int]()
        while trial is not None:
            items = items_of(trial.parts)
            runs += 1
            assert not gone & {i for i, _, _ in items}
            if any(bad for _, _, bad in items):
                fail(recovery.failed(trial), InferenceFailed("bad"))
            else:
                scatter(trial.parts, [100 * i + j for i, j, _ in items])
                recovery.passed(trial)
            if leaving and chance.random() < 0.3:
                leaver = leaving.pop()
                if leaver < len(made) and made[leaver].future.cancel():
                    gone.add(leaver)
            trial = recovery.next(0.0, most, waiting=0) or recovery.next_apart(
                0.0, CostModel(), most, waiting=0, deadly=False
            )
        assert recovery.rows == 0
        for i, (call, rows) in enumerate(zip(made, calls, strict=True)):
            if i not in gone:
                for j, (result, bad) in enumerate(zip(call.future.result(), rows, strict=True)):
                    assert isinstance(result, InferenceFailed) if bad else result == 100 * i + j
        total, failing = sum(map(len, calls)), sum(map(sum, calls))
        assert runs <= 1 + total + failing * (1 + total.bit_length())

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())


def test_the_budget_is_a_fifth_of_the_time_and_saves_a_second() -> None:
    """Four seconds of other work earn one; more than a second is not saved, and no larger debt is kept."""
    budget = Budget()
    budget.earn(1000.0)
    budget.spend(1.0)
    assert not budget.left
    budget.earn(1.0)
    budget.spend(0.2)
    assert budget.left
    budget.spend(1000.0)
    budget.earn(4.1)
    assert budget.left


def test_beyond_the_budget_a_full_batch_goes_first_until_the_search_is_pressing(run: Run) -> None:
    """A search has its turn within the budget, where no full batch waits, or once its rows have waited for long."""

    async def scenario() -> None:
        recovery: Recovery[int, int] = Recovery()
        call: Call[int, int] = Call([1, 2], 10.0, 0.0, asyncio.get_running_loop().create_future())

        def turn(now: float, waiting: int) -> bool:
            trial = recovery.next(now, 8, waiting=waiting)
            if trial is not None:
                recovery.put_back(trial)
                recovery.clear()
                recovery.release([(call, 0, 2)])
            return trial is not None

        recovery.release([(call, 0, 2)])
        assert turn(0.1, waiting=8)
        recovery.budget.spend(2.0)
        assert not turn(0.1, waiting=8)
        assert turn(0.1, waiting=7)
        assert turn(2.6, waiting=8)

    run(scenario())


def test_rows_that_left_do_not_hide_those_that_wait(run: Run) -> None:
    """Where all that was released has left, the group behind it is searched at once."""

    async def scenario() -> None:
        recovery: Recovery[int, int] = Recovery()
        gone, first, second = (
            Call([1], FAR, entered, asyncio.get_running_loop().create_future()) for entered in (0.0, 1.0, 1.0)
        )
        recovery.release([(gone, 0, 1)])
        recovery.failed(Trial([(first, 0, 1), (second, 0, 1)], fresh=True))
        gone.future.cancel()
        trial = recovery.next(2.0, 8, waiting=0)
        assert trial is not None
        assert trial.parts == [(first, 0, 1)]

    run(scenario())


def test_rows_of_a_call_with_a_bad_row_wait_until_nothing_else_does(run: Run) -> None:
    """The other rows of a call that had a bad one are likely to be bad: beyond the budget they go last."""

    async def scenario() -> None:
        recovery: Recovery[int, int] = Recovery()
        loop = asyncio.get_running_loop()
        one: Call[int, int] = Call([1, 2, 3], FAR, 0.0, loop.create_future())
        other: Call[int, int] = Call([4, 5], FAR, 0.0, loop.create_future())
        assert recovery.failed(Trial([(one, 0, 1)], [(one, 1, 3), (other, 0, 2)])) == [(one, 0, 1)]
        recovery.budget.spend(2.0)
        trial = recovery.next(0.0, 8, waiting=0)
        assert trial is not None
        assert items_of(trial.parts) == [4, 5]
        assert recovery.next_apart(0.0, CostModel(), 8, waiting=1, deadly=True) is None
        apart = recovery.next_apart(0.0, CostModel(), 8, waiting=0, deadly=True)
        assert apart is not None
        assert rows_of(apart.parts) == 2

    run(scenario())


# -- in a batcher ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Model:
    """Runs one batch at a time, in ``fixed`` seconds and so many a row; raises on rows below 0."""

    fixed: float
    per_row: float = 0.0
    broken: bool = False
    error: Callable[[str], InferenceFailed] = InferenceFailed
    batches: list[list[int]] = dataclasses.field(default_factory=list)
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    async def __call__(self, items: list[int]) -> list[int]:
        async with self.lock:
            self.batches.append(items)
            await asyncio.sleep(self.fixed + self.per_row * len(items))
        if bad := next((item for item in items if item < 0 or self.broken), None):
            raise self.error(f"unknown category {bad}")
        return [2 * item for item in items]

    def served(self) -> Batcher[int, int]:
        batcher: Batcher[int, int] = Batcher(
            max_rows=256,
            queue_limit=1024,
            slo_s=0.1,
            adaptive=True,
            fingerprint=hash,
            clock=asyncio.get_running_loop().time,
        )
        batcher.admission.seed({rows: self.fixed + self.per_row * rows for rows in (1, 8, 64)})
        batcher.add(self, depth=2)
        return batcher


@dataclasses.dataclass
class Crowd:
    """Sixty callers in a closed loop; ``draw`` makes each row, a bad one below 0."""

    model: Model
    draw: Callable[[random.Random, int], int]
    seconds: float = 10.0
    timeout_s: float = 1.0
    latencies: list[float] = dataclasses.field(default_factory=list)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    settled: int = 0
    runs: int = 0

    async def visit(self, warm_up_s: float = 0.0) -> Crowd:
        batcher, loop = self.model.served(), asyncio.get_running_loop()
        chance = random.Random(1)
        numbers = iter(range(1, 10_000_000))
        begin = loop.time() + warm_up_s
        end = begin + self.seconds
        loop.call_at(begin, self.model.batches.clear)

        async def caller() -> None:
            await asyncio.sleep(chance.random() / 20)
            while (began := loop.time()) < end:
                row = self.draw(chance, next(numbers))
                answer = await self._ask(batcher, row)
                took = loop.time() - began
                assert took <= self.timeout_s + 0.01
                assert isinstance(answer, Exception) or answer == 2 * row
                assert not (row > 0 and isinstance(answer, InferenceFailed))
                if began >= begin:
                    self._note(row, answer, took)
                await asyncio.sleep((answer.retry_after or 0.0) if isinstance(answer, Overloaded) else 0.0005)

        await asyncio.gather(*(caller() for _ in range(60)))
        self.runs = len(self.model.batches)
        await batcher.close()
        return self

    async def _ask(self, batcher: Batcher[int, int], row: int) -> int | Exception:
        try:
            (answer,) = await batcher.submit([row], asyncio.get_running_loop().time() + self.timeout_s)
        except (Overloaded, DeadlineExceeded) as error:
            return error
        return answer

    def _note(self, row: int, answer: int | Exception, took: float) -> None:
        kind = "answered" if not isinstance(answer, Exception) else type(answer).__name__
        self.settled += kind in {"answered", "InferenceFailed"}
        if row > 0:
            self.outcomes[kind] += 1
            if kind == "answered":
                self.latencies.append(took)

    @property
    def p99(self) -> float:
        return sorted(self.latencies)[int(0.99 * len(self.latencies))]


def clean(_: random.Random, number: int) -> int:
    return number


def ten_bad_ones(chance: random.Random, number: int) -> int:
    return -chance.randrange(1, 11) if chance.random() < 0.02 else number


def ever_new_bad_ones(chance: random.Random, number: int) -> int:
    return -number if chance.random() < 0.02 else number


@pytest.mark.promise("P1")
@pytest.mark.parametrize(("fixed", "per_row"), [(0.06, 0.0), (0.0002, 0.001)], ids=["60 ms a batch", "1 ms a row"])
def test_ten_bad_rows_that_repeat_are_soon_no_burden(run: Run, fixed: float, per_row: float) -> None:
    """At 2 % bad rows of ten kinds: once they are known, p99 is at most twice that without them."""
    bare = run(Crowd(Model(fixed, per_row), clean).visit())
    crowd = run(Crowd(Model(fixed, per_row), ten_bad_ones).visit(warm_up_s=15.0))
    assert crowd.p99 <= 2 * bare.p99
    assert crowd.outcomes["answered"] >= 0.9 * bare.outcomes["answered"]
    assert crowd.outcomes["DeadlineExceeded"] == 0


@pytest.mark.promise("P1")
def test_ever_new_bad_rows_cost_little_where_small_batches_cost_little(run: Run) -> None:
    """At 2 % distinct bad rows and 1 ms a row: p99 is at most twice, throughput at least 0.6 of that without them."""
    bare = run(Crowd(Model(0.0002, 0.001), clean).visit())
    crowd = run(Crowd(Model(0.0002, 0.001), ever_new_bad_ones).visit())
    assert crowd.p99 <= 2 * bare.p99
    assert crowd.outcomes["answered"] >= 0.6 * bare.outcomes["answered"]
    assert crowd.outcomes["DeadlineExceeded"] == 0


@pytest.mark.promise("P1")
def test_ever_new_bad_rows_are_found_in_few_runs_where_each_run_is_dear(run: Run) -> None:
    """At 2 % distinct bad rows and 60 ms a batch: five rows a run at least, and hardly a good one too late."""
    crowd = run(Crowd(Model(0.06), ever_new_bad_ones, seconds=60.0).visit(warm_up_s=2.0))
    assert crowd.settled >= 5 * crowd.runs
    assert crowd.outcomes["DeadlineExceeded"] <= 0.02 * crowd.outcomes["answered"]


def test_a_bad_row_that_comes_again_is_refused_without_a_run(run: Run) -> None:
    """The same error comes at once, in its place among rows that are run; after a minute the row is tried, alone."""

    async def scenario() -> None:
        model = Model(0.01)
        batcher = model.served()
        first = await batcher.submit([1, -5, 3], FAR)
        assert [str(each) for each in first] == ["2", "unknown category -5", "6"]
        seen = len(model.batches)
        (again,) = await batcher.submit([-5], FAR)
        assert isinstance(again, InferenceFailed)
        assert str(again) == "unknown category -5"
        assert again is not first[1]
        assert len(model.batches) == seen
        assert [str(each) for each in await batcher.submit([7, -5, 9], FAR)] == ["14", "unknown category -5", "18"]
        assert all(-5 not in batch for batch in model.batches[seen:])
        assert batcher.stats().quarantined == 1
        await asyncio.sleep(61)
        tried, mate = await asyncio.gather(batcher.submit([-5], FAR), batcher.submit([4], FAR))
        assert [type(each) for each in (*tried, *mate)] == [InferenceFailed, int]
        assert [-5] in model.batches[seen:]
        await batcher.close()

    run(scenario())


def test_a_row_that_failed_once_for_no_fault_of_its_own_is_run_again(run: Run) -> None:
    """A single failure of a row alone refuses nothing."""

    async def scenario() -> None:
        model = Model(0.01, broken=True)
        batcher = model.served()
        assert isinstance((await batcher.submit([1], FAR))[0], InferenceFailed)
        model.broken = False
        assert await batcher.submit([1], FAR) == [2]
        assert not batcher.quarantine
        await batcher.close()

    run(scenario())


def test_what_fails_for_want_of_memory_is_not_remembered(run: Run) -> None:
    """A row that found no memory is run again each time; that it failed says nothing of it."""

    async def scenario() -> None:
        model = Model(0.01, error=OutOfMemory)
        batcher = model.served()
        for _ in range(3):
            answers = await batcher.submit([1, -5], FAR)
            assert [type(each) for each in answers] == [int, OutOfMemory]
        assert not batcher.quarantine
        await batcher.close()

    run(scenario())


def test_a_model_that_fails_on_everything_costs_one_run_a_row_and_is_forgiven(run: Run) -> None:
    """Each row fails alone, in hardly more runs than rows; when the model is well again, so are all rows."""

    async def scenario() -> None:
        model = Model(0.001, broken=True)
        batcher = model.served()
        for turn in range(5):
            rows = range(1 + 60 * turn, 61 + 60 * turn)
            answers = await asyncio.gather(*(batcher.submit([i], FAR) for i in rows))
            assert all(isinstance(error, InferenceFailed) for [error] in answers)
        assert len(model.batches) < 340
        model.broken = False
        answers = await asyncio.gather(*(batcher.submit([i], FAR) for i in range(1, 301)))
        assert answers == [[2 * i] for i in range(1, 301)]
        await batcher.close()

    run(scenario())


def test_a_call_of_many_bad_rows_does_not_hold_up_the_others(run: Run) -> None:
    """A hundred bad rows in one call take a part of the time; callers of single good rows go on meanwhile."""

    async def scenario() -> None:
        model = Model(0.06)
        batcher, loop = model.served(), asyncio.get_running_loop()
        poison = batcher.submit([-i for i in range(1, 101)], 30.0)
        latencies = []

        async def caller(number: int) -> None:
            while not poison.done():
                began = loop.time()
                assert await batcher.submit([number], FAR) == [2 * number]
                latencies.append(loop.time() - began)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(caller(i) for i in range(1, 41)))
        assert all(isinstance(each, InferenceFailed) for each in await poison)
        assert sorted(latencies)[int(0.95 * len(latencies))] < 0.3
        await batcher.close()

    run(scenario())


def test_suspects_leave_with_their_callers(run: Run) -> None:
    """Rows that wait to be searched are not run once their callers have gone, and their deadlines hold."""

    async def scenario() -> None:
        model = Model(0.1)
        batcher, loop = model.served(), asyncio.get_running_loop()
        calls = [batcher.submit([row], 0.25 if row == 7 else FAR) for row in (-1, 2, 3, 4, 5, 6, 7, 8)]
        await asyncio.sleep(0.15)
        calls[7].cancel()
        with pytest.raises(DeadlineExceeded):
            await calls[6]
        assert loop.time() < 0.26
        assert await asyncio.gather(*calls[1:6]) == [[4], [6], [8], [10], [12]]
        assert all(not {7, 8} & set(batch) for batch in model.batches[1:])
        await batcher.close()

    run(scenario())


def test_closing_answers_those_that_are_searched(run: Run) -> None:
    """Rows in hand, rows set aside and rows of the other half all get an answer when a batcher is closed."""

    async def scenario() -> None:
        batcher = Model(0.1).served()
        calls = [batcher.submit([row], FAR) for row in (-1, 2, 3, 4)]
        await asyncio.sleep(0.15)
        await batcher.close()
        assert len(await asyncio.gather(*calls, return_exceptions=True)) == 4

    run(scenario())
