"""Which calls are let in, and how large batches may be: as rules, and as a service under load in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelserve.batching.admission import Admission
from modelserve.batching.batcher import Batcher
from modelserve.errors import InferenceFailed, Overloaded
from modelserve.testing.clock import VirtualTimeLoop

FIXED_S, PER_ROW_S, SLO_S = 0.005, 0.0002, 0.1


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    """Run a coroutine on a loop with virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        yield runner.run


def admission(fixed: float, per_row: float, **options: Any) -> Admission:
    found = Admission(**{"max_rows": 256, "slo_s": SLO_S, "adaptive": True} | options)
    found.seed({rows: fixed + per_row * rows for rows in (1, 16, 256)})
    return found


def test_a_batch_takes_at_most_its_share_of_the_objective() -> None:
    """The batch size in force follows the cost, between one row and the limit."""
    assert admission(0.005, 0.0002).max_rows == 175
    assert admission(0.0001, 0.000001).max_rows == 256
    assert admission(0.001, 0.03).max_rows == 2
    assert admission(0.005, 0.0002, adaptive=False).max_rows == 256


def test_a_model_too_slow_for_the_objective_still_gets_batches() -> None:
    """Where one row takes longer than the objective, a batch may take twice as long as one row."""
    assert admission(0.3, 0.001).max_rows == 256
    assert admission(0.3, 0.01).max_rows == 32


def test_staging_follows_the_share_of_the_fixed_cost() -> None:
    """The next batch is handed over early only where batches of that size waste little."""
    assert admission(0.0001, 0.001).stage_rows == 1
    assert admission(0.005, 0.005).stage_rows == admission(0.005, 0.005).max_rows
    assert Admission(max_rows=8).stage_rows == 8


@dataclasses.dataclass
class Outcome:
    """What the calls of a run came to."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    failures: int = 0
    refusals: list[Overloaded] = dataclasses.field(default_factory=list)
    slowest_refusal: float = 0.0

    @property
    def p99(self) -> float:
        return sorted(self.latencies)[int(len(self.latencies) * 0.99)]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a batch takes in truth: noisy, with one in fifty late, and more where many callers keep the loop busy."""

    fixed: float = FIXED_S
    per_row: float = PER_ROW_S
    noise: float = 0.0
    contention: float = 0.0

    def seconds(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    def drawn(self, rows: int, chance: random.Random) -> float:
        if not self.noise:
            return self.seconds(rows)
        late = 3.0 if chance.random() < 0.02 else 1.0
        return self.seconds(rows) * late * chance.lognormvariate(0, self.noise) + self.contention * chance.random()


class Service:
    """A batcher in front of runners that take a fixed time and a time per row, and fail on a share of ``bad`` rows."""

    def __init__(
        self,
        *,
        seeded: bool = True,
        runners: int = 1,
        costs: Costs = Costs(),
        slo_s: float = SLO_S,
        bad: float = 0.0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.bad, self.faults = bad, random.Random(2)
        self.costs, self.chance = costs, random.Random(1)
        self.slower = 1.0
        self.batcher: Batcher[int, int] = Batcher(
            max_rows=256, queue_limit=10_000, slo_s=slo_s, adaptive=True, clock=self.loop.time
        )
        if seeded:
            self.batcher.admission.seed({rows: costs.seconds(rows) for rows in (1, 16, 256)})
        self.full_rows = self.batcher.admission.max_rows if seeded else 175
        for _ in range(runners):
            lock = asyncio.Lock()
            self.batcher.add(lambda items, lock=lock: self.infer(items, lock), depth=2)  # type: ignore[misc]

    async def infer(self, items: list[int], lock: asyncio.Lock) -> list[int]:
        async with lock:
            await asyncio.sleep(self.slower * self.costs.drawn(len(items), self.chance))
        if min(items) < 0:
            raise InferenceFailed("unknown category")
        return items

    @property
    def capacity(self) -> float:
        return self.full_rows / self.costs.seconds(self.full_rows) / self.slower

    async def under(self, rate: float, seconds: float) -> Outcome:
        """Send calls at random moments, with a deadline of a second each."""
        outcome, chance, tasks = Outcome(), random.Random(3), []
        end = self.loop.time() + seconds
        while self.loop.time() < end:
            await asyncio.sleep(chance.expovariate(rate))
            tasks.append(asyncio.create_task(self.call(outcome)))
        await asyncio.gather(*tasks)
        return outcome

    async def closed_loop(self, callers: int, seconds: float) -> Outcome:
        """Let so many callers ask one call after the other."""
        outcome, end = Outcome(), self.loop.time() + seconds

        async def caller() -> None:
            while self.loop.time() < end:
                refused = len(outcome.refusals)
                await self.call(outcome)
                if len(outcome.refusals) > refused:
                    await asyncio.sleep(0.001)

        await asyncio.gather(*(caller() for _ in range(callers)))
        return outcome

    async def call(self, outcome: Outcome) -> None:
        began = self.loop.time()
        try:
            (answer,) = await self.batcher.submit([-1 if self.faults.random() < self.bad else 1], began + 1.0)
        except Overloaded as error:
            outcome.refusals.append(error)
            outcome.slowest_refusal = max(outcome.slowest_refusal, self.loop.time() - began)
        else:
            if isinstance(answer, InferenceFailed):
                outcome.failures += 1
            else:
                outcome.latencies.append(self.loop.time() - began)


@pytest.mark.parametrize("seeded", [True, False], ids=["warmed up", "from cold"])
@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_below_capacity_nobody_is_refused(run: Callable[..., Any], load: float, seeded: bool) -> None:  # noqa: FBT001
    """A service that has time for everybody answers everybody, also before it knows what batches cost."""

    async def scenario() -> None:
        service = Service(seeded=seeded)
        outcome = await service.under(load * service.capacity, 3.0)
        assert outcome.refusals == []
        assert outcome.p99 <= SLO_S

    run(scenario())


@pytest.mark.parametrize("runners", [1, 3])
@pytest.mark.parametrize("load", [1.5, 2.0, 3.0])
def test_overload_keeps_the_answered_within_the_objective(run: Callable[..., Any], load: float, runners: int) -> None:
    """Under several times the capacity the answered are in time, the rest hear at once, and no capacity is wasted."""

    async def scenario() -> None:
        service = Service(runners=runners)
        capacity = runners * service.capacity
        outcome = await service.under(load * capacity, 3.0)
        assert outcome.p99 <= SLO_S
        assert sum(latency <= SLO_S for latency in outcome.latencies) >= 0.9 * capacity * 3.0
        assert outcome.slowest_refusal == 0.0
        assert all(0.0 < (error.retry_after or 0.0) < 1.0 for error in outcome.refusals)

    run(scenario())


SHAPES = {
    "small": Costs(0.002, 0.00001),
    "high fixed": Costs(0.02, 0.0001),
    "mixed": Costs(),
    "linear": Costs(0.0001, 0.001),
}


@pytest.mark.parametrize("slo_s", [SLO_S, 0.005])
@pytest.mark.parametrize("contention", [0.0, 0.003], ids=["quiet", "contended"])
@pytest.mark.parametrize("shape", SHAPES)
def test_closed_loops_one_after_the_other_are_never_refused(
    run: Callable[..., Any], shape: str, contention: float, slo_s: float
) -> None:
    """Below capacity no caller of a closed loop is refused, whatever the objective, the noise and the loops before."""
    costs = dataclasses.replace(SHAPES[shape], noise=0.15, contention=contention)

    async def scenario() -> None:
        service = Service(costs=costs, slo_s=slo_s)
        for callers in (1, 8, 64, 256, 8, 64):
            outcome = await service.closed_loop(callers, 0.3)
            assert outcome.refusals == [], callers
            if 3 * callers / service.capacity < SLO_S == slo_s:
                assert sum(latency <= slo_s for latency in outcome.latencies) >= 0.97 * len(outcome.latencies)

    run(scenario())


def test_callers_who_join_a_closed_loop_are_not_refused(run: Callable[..., Any]) -> None:
    """Two hundred callers who come at once to a queue that stands for longer than the objective are a burst."""

    async def scenario() -> None:
        service = Service(costs=SHAPES["linear"])
        first = asyncio.create_task(service.closed_loop(100, 3.0))
        await asyncio.sleep(1.5)
        joined = await service.closed_loop(200, 1.5)
        assert (await first).refusals == joined.refusals == []

    run(scenario())


@pytest.mark.parametrize("noise", [0.0, 0.15], ids=["steady", "noisy"])
@pytest.mark.parametrize("load", [0.5, 0.8, 0.95, 1.25, 2.5])
@pytest.mark.parametrize("shape", ["mixed", "linear"])
def test_open_loops_get_what_there_is(run: Callable[..., Any], shape: str, load: float, noise: float) -> None:
    """From second 0 on, what is answered in time is all of the load or nearly all of the capacity."""

    async def scenario() -> None:
        service = Service(costs=dataclasses.replace(SHAPES[shape], noise=noise))
        capacity = service.capacity / (1.05 if noise else 1.0)  # what the late batches cost
        outcome = await service.under(load * capacity, 1.5)
        in_time = sum(latency <= SLO_S for latency in outcome.latencies)
        if load < 0.9:
            assert outcome.refusals == []
        assert in_time >= (0.88 if noise else 0.95) * min(load, 1.0) * capacity * 1.5
        assert noise or outcome.p99 <= 1.1 * SLO_S

    run(scenario())


@pytest.mark.parametrize("callers", [8, 64, 256])
@pytest.mark.parametrize("shape", ["mixed", "linear", "small"])
def test_bad_rows_in_a_closed_loop_refuse_no_caller(run: Callable[..., Any], shape: str, callers: int) -> None:
    """Two rows of a hundred at fault: rows that are searched are inside as well, and no queue grows."""

    async def scenario() -> None:
        service = Service(costs=SHAPES[shape], bad=0.02)
        outcome = await service.closed_loop(callers, 1.0)
        assert outcome.refusals == []
        assert outcome.failures

    run(scenario())


@pytest.mark.parametrize("load", [1.25, 2.5])
@pytest.mark.parametrize("shape", ["mixed", "linear"])
def test_overload_with_bad_rows_gets_what_their_search_leaves(run: Callable[..., Any], shape: str, load: float) -> None:
    """One row of a hundred at fault: in time is answered most of what a closed loop of callers gets answered."""

    async def scenario() -> None:
        possible = len((await Service(costs=SHAPES[shape], bad=0.01).closed_loop(64, 4.0)).latencies)
        service = Service(costs=SHAPES[shape], bad=0.01)
        outcome = await service.under(load * service.capacity, 4.0)
        in_time = sum(latency <= SLO_S for latency in outcome.latencies)
        assert in_time >= 0.75 * possible
        assert sorted(outcome.latencies)[len(outcome.latencies) // 2] <= SLO_S
        assert outcome.slowest_refusal == 0.0

    run(scenario())


def test_a_burst_before_an_overload_is_worked_off(run: Callable[..., Any]) -> None:
    """A burst may use the time its callers have; the overload that follows it does not keep its queue."""

    async def scenario() -> None:
        service, burst = Service(), Outcome()
        crowd = asyncio.gather(*(service.call(burst) for _ in range(2000)))
        await service.under(1.5 * service.capacity, 1.5)
        outcome = await service.under(1.5 * service.capacity, 2.0)
        assert sum(latency <= SLO_S for latency in outcome.latencies) >= 0.95 * service.capacity * 2.0
        await crowd

    run(scenario())


def test_a_cost_learned_at_another_load_refuses_no_call_that_will_be_in_time(run: Callable[..., Any]) -> None:
    """Batches believed to take ten times as long as they do: the pace at which rows leave says better."""

    async def scenario() -> None:
        service = Service()
        service.batcher.admission.seed({rows: 10 * service.costs.seconds(rows) for rows in (1, 16, 256)})
        outcome = await service.under(0.6 * service.capacity, 2.0)
        assert outcome.refusals == []
        assert outcome.p99 <= SLO_S

    run(scenario())


def test_a_model_that_becomes_slower_is_noticed(run: Callable[..., Any]) -> None:
    """When batches suddenly take three times as long, the answered are soon within the objective again."""

    async def scenario() -> None:
        service = Service()
        await service.under(service.capacity, 1.0)
        service.slower = 3.0
        await service.under(2 * service.capacity, 3.0)
        outcome = await service.under(2 * service.capacity, 3.0)
        assert outcome.p99 <= SLO_S
        assert outcome.refusals

    run(scenario())


def test_a_burst_at_an_idle_service_may_use_the_time_its_callers_have(run: Callable[..., Any]) -> None:
    """Two thousand calls at once take half a second; none is refused, since each has a whole one."""

    async def scenario() -> None:
        service = Service()
        outcome = Outcome()
        await asyncio.gather(*(service.call(outcome) for _ in range(2000)))
        assert len(outcome.latencies) == 2000

    run(scenario())


def test_what_cannot_be_answered_before_its_deadline_is_refused_at_once(run: Callable[..., Any]) -> None:
    """Behind a batch of 40 ms a call with 10 ms left hears that it is too late, and when to come back."""

    async def scenario() -> None:
        service = Service()
        loop = asyncio.get_running_loop()
        running = service.batcher.submit([1] * 175, loop.time() + 1.0)
        await asyncio.sleep(0.001)
        with pytest.raises(Overloaded) as refused:
            service.batcher.submit([1], loop.time() + 0.01)
        assert refused.value.retry_after is not None
        assert 0.03 < refused.value.retry_after < 0.06
        await running
        assert list(await service.batcher.submit([1], loop.time() + 0.01)) == [1]  # a free runner refuses nobody

    run(scenario())
