"""The batching primitive, in virtual time: no test here waits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Self

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.batching.batcher import Batcher
from modelserve.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from modelserve.testing.clock import VirtualTimeLoop

FAR = 1_000.0


class Recorder:
    """A runner that doubles its items after ``seconds`` and remembers every batch; items in ``bad`` fail it."""

    def __init__(self, seconds: float = 0.01, bad: Sequence[int] = ()) -> None:
        self.seconds = seconds
        self.bad = set(bad)
        self.batches: list[list[int]] = []
        self.started: list[float] = []
        self.running = 0
        self.most_at_once = 0

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if self.bad & set(items):
            raise InferenceFailed(f"bad row among {items}")
        return [item * 2 for item in items]


def batcher_of(*runners: Callable[[list[int]], Awaitable[Sequence[int]]], **options: Any) -> Batcher[int, int]:
    batcher: Batcher[int, int] = Batcher(**{"max_rows": 8, "queue_limit": 100} | options)
    for runner in runners:
        batcher.add(runner)
    return batcher


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    """Run a coroutine on a loop with virtual time, and fail if it leaves an unhandled error behind."""
    loop = VirtualTimeLoop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        yield runner.run
    assert unhandled == []


def test_a_lone_call_is_dispatched_at_once(run: Callable[..., Any]) -> None:
    """A lone call waits for nothing: it runs at the time it came."""

    async def scenario() -> None:
        runner = Recorder()
        assert await batcher_of(runner).submit([3], FAR) == [6]
        assert runner.started == [0.0]

    run(scenario())


def test_calls_of_one_turn_become_one_batch(run: Callable[..., Any]) -> None:
    """Calls made in the same turn of the loop share a batch, and each gets its own results in order."""

    async def scenario() -> None:
        runner = Recorder()
        batcher = batcher_of(runner)
        answers = await asyncio.gather(*(batcher.submit([i, i + 10], FAR) for i in range(4)))
        assert answers == [[2 * i, 2 * i + 20] for i in range(4)]
        assert runner.batches == [[0, 10, 1, 11, 2, 12, 3, 13]]

    run(scenario())


def test_the_batch_grows_while_the_runner_is_busy(run: Callable[..., Any]) -> None:
    """What comes while the only runner is busy goes into the next batch, and never into a second one at once."""

    async def scenario() -> None:
        runner = Recorder(seconds=1.0)
        batcher = batcher_of(runner)
        first = batcher.submit([0], FAR)
        await asyncio.sleep(0.5)
        rest = [batcher.submit([i], FAR) for i in range(1, 6)]
        await asyncio.gather(first, *rest)
        assert runner.batches == [[0], [1, 2, 3, 4, 5]]
        assert runner.most_at_once == 1

    run(scenario())


def test_two_runners_work_side_by_side(run: Callable[..., Any]) -> None:
    """A second runner takes what the first has no room for."""

    async def scenario() -> None:
        one, two = Recorder(), Recorder()
        batcher = batcher_of(one, two, max_rows=2)
        await asyncio.gather(*(batcher.submit([i], FAR) for i in range(4)))
        assert one.batches == [[0, 1]]
        assert two.batches == [[2, 3]]

    run(scenario())


def test_a_large_call_is_split(run: Callable[..., Any]) -> None:
    """A call of more rows than a batch holds is answered whole, from several batches."""

    async def scenario() -> None:
        runner = Recorder()
        assert await batcher_of(runner, max_rows=4).submit(list(range(10)), FAR) == [2 * i for i in range(10)]
        assert [len(batch) for batch in runner.batches] == [4, 4, 2]

    run(scenario())


def test_only_the_bad_row_fails(run: Callable[..., Any]) -> None:
    """A failing batch is run again in halves, so that only the row at fault gets the error."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(bad=[5]))
        answers = await asyncio.gather(*(batcher.submit([i], FAR) for i in range(8)))
        assert [a for [a] in answers if not isinstance(a, Exception)] == [0, 2, 4, 6, 8, 12, 14]
        assert isinstance(answers[5][0], InferenceFailed)

    run(scenario())


def test_a_bad_row_is_found_inside_a_call(run: Callable[..., Any]) -> None:
    """Within one call of several rows, the good rows keep their results and the bad one says so at its place."""

    async def scenario() -> None:
        results = await batcher_of(Recorder(bad=[2])).submit([1, 2, 3], FAR)
        assert [type(result) for result in results] == [int, InferenceFailed, int]

    run(scenario())


@pytest.mark.parametrize(("rows", "bad"), [(3, {2}), (5, {1}), (8, {2, 3}), (7, {7})])
def test_a_split_call_with_a_bad_row_is_answered_when_all_of_it_ran(
    run: Callable[..., Any], rows: int, bad: set[int]
) -> None:
    """What is left in the queue of a call with a bad row is run although nothing else comes."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(bad=list(bad)), max_rows=2)
        results = await batcher.submit(range(1, rows + 1), FAR)
        assert [i for i, each in enumerate(results, 1) if isinstance(each, InferenceFailed)] == sorted(bad)
        assert asyncio.get_running_loop().time() < 0.2

    run(scenario())


def test_other_errors_are_not_bisected_and_not_shared(run: Callable[..., Any]) -> None:
    """An error that is not the model's goes to every row at once, as an exception of its own for each."""

    async def broken(items: list[int]) -> list[int]:
        raise ConnectionError("gone")

    async def scenario() -> None:
        batcher = batcher_of(broken)
        answers = await asyncio.gather(*(batcher.submit([i], FAR) for i in range(3)))
        assert {str(error) for [error] in answers} == {"gone"}
        assert len({id(error) for [error] in answers}) == 3
        assert batcher.stats().batches == 1

    run(scenario())


def test_an_answer_of_the_wrong_length_is_refused(run: Callable[..., Any]) -> None:
    """A runner that answers fewer rows than it got never has its rows matched to the wrong callers."""

    async def short(items: list[int]) -> list[int]:
        return items[1:]

    async def scenario() -> None:
        answers = await asyncio.gather(*(batcher_of(short).submit([i], FAR) for i in range(3)))
        assert all(isinstance(error, InferenceFailed) for [error] in answers)

    run(scenario())


def test_an_expired_row_is_answered_and_never_run(run: Callable[..., Any]) -> None:
    """A row whose deadline passes in the queue gets ``DeadlineExceeded`` in time, and the runner never sees it."""

    async def scenario() -> None:
        runner = Recorder(seconds=1.0)
        batcher = batcher_of(runner)
        first = batcher.submit([1], FAR)
        await asyncio.sleep(0)
        late = batcher.submit([2], 0.3)
        with pytest.raises(DeadlineExceeded, match="300 ms"):
            await late
        assert 0.3 <= asyncio.get_running_loop().time() <= 0.31
        assert await first == [2]
        await asyncio.sleep(2)
        assert runner.batches == [[1]]

    run(scenario())


def test_a_finer_grid_enforces_deadlines_sooner(run: Callable[..., Any]) -> None:
    """Calls of a few milliseconds are answered within the grid that was asked for, whatever waits beside them."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(seconds=1.0), grid_s=0.001)
        batcher.submit([1], FAR)
        await asyncio.sleep(0)
        for i in range(20):
            deadline = asyncio.get_running_loop().time() + 0.005 + i * 0.0003
            with pytest.raises(DeadlineExceeded):
                await batcher.submit([2], deadline)
            assert deadline <= asyncio.get_running_loop().time() <= deadline + 0.0011

    run(scenario())


def test_a_running_row_is_answered_at_its_deadline_and_keeps_its_slot(run: Callable[..., Any]) -> None:
    """A batch that outlasts a deadline answers its caller in time, but its runner stays taken until the work ends."""

    async def scenario() -> None:
        runner = Recorder(seconds=5.0)
        batcher = batcher_of(runner)
        slow = batcher.submit([1], 1.0)
        await asyncio.sleep(0.5)
        later = batcher.submit([2], FAR)
        with pytest.raises(DeadlineExceeded):
            await slow
        assert runner.batches == [[1]]
        assert await later == [4]
        assert runner.most_at_once == 1

    run(scenario())


def test_a_cancelled_row_leaves_the_queue(run: Callable[..., Any]) -> None:
    """A caller who goes away while waiting is not run, and the others are not disturbed."""

    async def scenario() -> None:
        runner = Recorder(seconds=1.0)
        batcher = batcher_of(runner)
        calls = [batcher.submit([i], FAR) for i in range(1)]
        await asyncio.sleep(0.1)
        calls += [batcher.submit([i], FAR) for i in range(1, 5)]
        calls[2].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[2], asyncio.CancelledError)
        assert runner.batches == [[0], [1, 3, 4]]

    run(scenario())


def test_a_caller_who_leaves_mid_batch_disturbs_nobody(run: Callable[..., Any]) -> None:
    """Cancelling one call of a running batch leaves its batch-mates their results."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(seconds=1.0))
        calls = [batcher.submit([i], FAR) for i in range(3)]
        await asyncio.sleep(0.5)
        calls[1].cancel()
        assert await calls[0] == [0]
        assert await calls[2] == [4]

    run(scenario())


def test_a_full_queue_refuses_with_a_hint(run: Callable[..., Any]) -> None:
    """Beyond ``queue_limit`` rows a call is refused at once and told when to try again."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(seconds=1.0), queue_limit=3)
        running = batcher.submit([0], FAR)
        await asyncio.sleep(0.1)
        waiting = [batcher.submit([1], FAR), batcher.submit([2, 3], FAR)]
        with pytest.raises(Overloaded) as refusal:
            batcher.submit([4], FAR)
        assert refusal.value.retry_after is not None
        assert refusal.value.retry_after > 0
        assert refusal.value.retryable
        await asyncio.gather(running, *waiting)
        assert await batcher.submit([4], FAR) == [8]

    run(scenario())


def test_abandoned_rows_do_not_fill_the_queue(run: Callable[..., Any]) -> None:
    """Rows whose callers have gone give their place in the queue to new ones."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(seconds=1.0), queue_limit=2)
        running = batcher.submit([0], FAR)
        await asyncio.sleep(0.1)
        for _ in range(5):
            batcher.submit([1, 2], FAR).cancel()
        assert await batcher.submit([3, 4], FAR) == [6, 8]
        assert await running == [0]
        assert batcher.waiting == 0

    run(scenario())


def test_a_window_waits_for_company_counted_from_the_oldest(run: Callable[..., Any]) -> None:
    """With a window, a partial batch is held until its oldest row has waited that long."""

    async def scenario() -> None:
        runner = Recorder()
        batcher = batcher_of(runner, max_wait_s=0.05)
        first = batcher.submit([1], FAR)
        await asyncio.sleep(0.03)
        second = batcher.submit([2], FAR)
        await asyncio.gather(first, second)
        assert runner.batches == [[1, 2]]
        assert runner.started == [pytest.approx(0.05)]

    run(scenario())


def test_a_full_batch_ends_the_window(run: Callable[..., Any]) -> None:
    """A batch that is full is not held back."""

    async def scenario() -> None:
        runner = Recorder()
        batcher = batcher_of(runner, max_wait_s=5.0, max_rows=2)
        await asyncio.gather(batcher.submit([1], FAR), batcher.submit([2], FAR))
        assert runner.started == [0.0]

    run(scenario())


def test_a_deadline_cuts_the_window_short(run: Callable[..., Any]) -> None:
    """The window never eats more than half of a row's time limit."""

    async def scenario() -> None:
        runner = Recorder()
        assert await batcher_of(runner, max_wait_s=5.0).submit([1], 0.1) == [2]
        assert runner.started == [pytest.approx(0.05)]

    run(scenario())


def test_closing_answers_everybody(run: Callable[..., Any]) -> None:
    """On close the running batch finishes, what waits fails with ``NotReady``, and new calls are refused."""

    async def scenario() -> None:
        runner = Recorder(seconds=1.0)
        batcher = batcher_of(runner)
        running = batcher.submit([1], FAR)
        await asyncio.sleep(0.1)
        waiting = batcher.submit([2], FAR)
        await batcher.close()
        assert await running == [2]
        with pytest.raises(NotReady):
            await waiting
        with pytest.raises(NotReady):
            batcher.submit([3], FAR)
        assert runner.batches == [[1]]

    run(scenario())


def test_a_batch_that_does_not_end_does_not_hold_up_closing(run: Callable[..., Any]) -> None:
    """A hanging runner is given up after a while, and whoever still waits for it is told."""

    async def scenario() -> None:
        batcher = batcher_of(Recorder(seconds=1e9))
        hanging = batcher.submit([1], FAR)
        await asyncio.sleep(0.1)
        await batcher.close()
        assert asyncio.get_running_loop().time() < 2
        assert isinstance((await hanging)[0], NotReady)

    run(scenario())


def test_a_deadline_in_the_past_is_told_at_once_and_disturbs_nobody() -> None:
    """On every loop, a call whose time is over is never queued, and those beside it are answered."""

    async def scenario() -> None:
        now = asyncio.get_running_loop().time()
        batcher = batcher_of(Recorder(seconds=0))
        over = [batcher.submit([i], deadline) for i, deadline in enumerate((now - 5, now, math.nan))]
        good = batcher.submit([4], now + 30)
        for call in over:
            with pytest.raises(DeadlineExceeded):
                await call
        assert await good == [8]
        assert batcher.waiting == 0
        await batcher.close()

    for factory in (VirtualTimeLoop, asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario())


def test_a_call_of_no_items_is_answered_with_none(run: Callable[..., Any]) -> None:
    """An empty call has its empty answer at once."""

    async def scenario() -> None:
        assert await batcher_of(Recorder()).submit([], FAR) == []

    run(scenario())


class Particular(InferenceFailed):
    """An error that cannot be made from its class alone."""

    def __new__(cls, reason: str) -> Self:
        return super().__new__(cls, reason)


@pytest.mark.parametrize("answer", [None, 3, "ab"], ids=repr)
def test_an_answer_that_is_no_list_of_rows_is_refused(run: Callable[..., Any], answer: Any) -> None:
    """Whatever a runner answers, its callers are answered too."""

    async def odd(items: list[int]) -> list[int]:
        return answer  # type: ignore[no-any-return]

    async def raises(items: list[int]) -> list[int]:
        raise Particular("of its own kind")

    async def scenario() -> None:
        for runner in (odd, raises):
            (failure,) = await batcher_of(runner).submit([1], FAR)
            assert isinstance(failure, InferenceFailed)

    run(scenario())


call = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(0, 40), min_size=1, max_size=7),
        "at": st.floats(0, 1, allow_nan=False),
        "timeout": st.one_of(st.just(FAR), st.floats(0.001, 0.5)),
        "leaves_after": st.one_of(st.none(), st.floats(0, 0.5)),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(call, min_size=1, max_size=25),
    bad=st.sets(st.integers(0, 40), max_size=3),
    runners=st.integers(1, 3),
    max_rows=st.integers(1, 9),
    window=st.sampled_from([0.0, 0.02]),
    fingerprint=st.sampled_from([None, hash]),
    seconds=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_every_call_gets_exactly_its_own_answer(
    calls: list[dict[str, Any]],
    bad: set[int],
    runners: int,
    max_rows: int,
    window: float,
    fingerprint: Any,
    seconds: float,
) -> None:
    """Whatever comes, leaves, expires or fails: each call ends in time, with its own results or a typed error."""
    recorders = [Recorder(seconds, list(bad)) for _ in range(runners)]

    async def one(batcher: Batcher[int, int], spec: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(spec["at"])
        arrived = loop.time()
        future = batcher.submit(spec["rows"], arrived + spec["timeout"])
        if spec["leaves_after"] is not None:
            loop.call_later(spec["leaves_after"], future.cancel)
        try:
            results = await future
        except asyncio.CancelledError:
            assert spec["leaves_after"] is not None
        except DeadlineExceeded:
            assert loop.time() >= arrived + spec["timeout"]
            assert spec["timeout"] < FAR  # there is time to run each row alone
        else:
            for row, result in zip(spec["rows"], results, strict=True):
                assert isinstance(result, InferenceFailed) if row in bad else result == 2 * row
        assert loop.time() <= arrived + spec["timeout"] + 0.02

    async def scenario() -> None:
        options = {"max_rows": max_rows, "queue_limit": 10_000, "max_wait_s": window, "fingerprint": fingerprint}
        batcher = batcher_of(*recorders, **options)
        await asyncio.gather(*(one(batcher, spec) for spec in calls))
        await batcher.close()
        assert batcher.waiting == 0
        assert all(recorder.most_at_once <= 1 for recorder in recorders)
        assert all(len(batch) <= max_rows for recorder in recorders for batch in recorder.batches)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())


def test_a_runner_that_raises_at_once_fails_its_batch_and_nothing_else(run: Callable[..., Any]) -> None:
    """A runner that does not even begin is an error of that batch; the batcher goes on and can be closed."""

    async def scenario() -> None:
        def broken(items: list[int]) -> Awaitable[Sequence[int]]:
            raise RuntimeError("no such thing")

        batcher = batcher_of(broken)
        (error,) = await batcher.submit([1], FAR)
        assert isinstance(error, RuntimeError)
        await batcher.close()

    run(scenario())


def test_what_waits_is_shared_among_idle_runners_where_small_batches_are_cheap(run: Callable[..., Any]) -> None:
    """Two free runners take half each of rows that dominate the cost, and one takes all where the fixed part does."""

    async def scenario(seen: dict[int, float]) -> list[int]:
        runners = [Recorder(), Recorder()]
        batcher = batcher_of(*runners, max_rows=16)
        batcher.admission.seed(seen)
        await asyncio.gather(*(batcher.submit([i], FAR) for i in range(8)))
        return [len(batch) for runner in runners for batch in runner.batches]

    assert run(scenario({1: 0.001, 16: 0.016})) == [4, 4]
    assert run(scenario({1: 0.016, 16: 0.017})) == [8]


def test_a_second_batch_is_handed_over_where_waiting_would_gain_little(run: Callable[..., Any]) -> None:
    """A runner of depth two gets its next batch while it runs one: when it is full, or when small ones are cheap."""

    async def scenario(seen: dict[int, float], waiting: int) -> float:
        runner = Recorder(seconds=1.0)
        began = asyncio.get_running_loop().time()
        batcher: Batcher[int, int] = Batcher(max_rows=8, queue_limit=100)
        batcher.admission.seed(seen)
        batcher.add(runner, depth=2)
        first = batcher.submit([0], FAR)
        await asyncio.sleep(0.1)
        rest = [batcher.submit([i], FAR) for i in range(waiting)]
        await asyncio.gather(first, *rest)
        return round(runner.started[1] - began, 1)

    costly, cheap = {1: 0.9, 8: 1.0}, {1: 0.1, 8: 0.8}
    assert run(scenario(costly, 3)) == 1.0
    assert run(scenario(costly, 8)) == 0.1
    assert run(scenario(cheap, 1)) == 0.1
