"""The thread replica, and the pool on it."""

from __future__ import annotations

import asyncio
import decimal
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from modelserve.batching import batcher
from modelserve.errors import DeadlineExceeded, InferenceFailed, LoadFailed, NotReady, WorkerDied
from modelserve.execution import thread
from modelserve.execution.pool import Pool, PoolOptions
from modelserve.execution.supervisor import Infer
from modelserve.execution.thread import ThreadReplica
from modelserve.ports import NotRun
from modelserve.signature import Field, Signature
from modelserve.types import Columns, Row

SIGNATURE = Signature([Field("x", "float64")])


class Model:
    """Doubles its input; does first what it is told to."""

    def __init__(self, before: Callable[[Columns], None] = lambda _: None) -> None:
        self.before = before
        self.threads: set[int] = set()

    def infer(self, columns: Columns) -> Columns:
        self.threads.add(threading.get_ident())
        self.before(columns)
        return {"output": columns["x"] * 2}


async def no_proof(_: Infer) -> None:
    """Take a replica as it is."""


def rows(*values: float) -> Sequence[Row]:
    return [(value,) for value in values]


def pool_of(*models: Model, **options: Any) -> Pool:
    supply = iter(models)
    return Pool(
        lambda _: ThreadReplica(lambda: next(supply), SIGNATURE),
        PoolOptions(**{"smallest": len(models), "largest": len(models), "max_rows": 8, "queue_limit": 100} | options),
    )


def later(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_replica_answers_in_its_own_thread(no_blocking: None) -> None:
    """The model runs in the replica's thread, never on the loop."""
    model = Model()
    replica = ThreadReplica(lambda: model, SIGNATURE)
    assert not replica.alive
    await replica.start()
    assert replica.alive
    answer = await replica.infer(rows(1.0, 2.0))
    assert answer == [2.0, 4.0]
    assert model.threads.isdisjoint({threading.get_ident()})
    await replica.stop()
    await replica.stop()
    assert not replica.alive
    with pytest.raises(NotRun):
        await replica.infer(rows(1.0))


async def test_a_model_that_does_not_load_is_one_typed_error() -> None:
    """Whatever loading raises becomes ``LoadFailed``, and no thread is left."""
    before = threading.active_count()

    def load() -> Model:
        raise RuntimeError("no weights")

    pool = Pool(lambda _: ThreadReplica(load, SIGNATURE), PoolOptions(smallest=2, largest=2))
    with pytest.raises(LoadFailed, match="RuntimeError: no weights"):
        await pool.start(no_proof)
    await asyncio.to_thread(_join_replicas)
    assert threading.active_count() <= before + 1  # the executor's own thread, if it was not there before


def _join_replicas() -> None:
    for each in threading.enumerate():
        if each.name.startswith("modelserve-replica"):
            each.join(5)


@pytest.mark.parametrize("raised", [ValueError("bad"), SystemExit(1), StopIteration(), KeyboardInterrupt()], ids=repr)
async def test_whatever_a_model_raises_is_an_inference_failure(raised: BaseException) -> None:
    """A model that raises, even to exit, fails its row and nothing else; the replica lives on."""

    def misbehave(columns: Columns) -> None:
        if columns["x"][0] == 0:
            raise raised

    pool = pool_of(Model(misbehave))
    await pool.start(no_proof)
    (failure,) = await pool.submit(rows(0.0), later())
    assert isinstance(failure, InferenceFailed)
    assert type(raised).__name__ in str(failure)
    assert await pool.submit(rows(1.0), later()) == [2.0]
    await pool.stop()


async def test_one_batch_at_a_time_per_replica() -> None:
    """A replica never runs two batches at once, and two replicas run side by side."""
    at_once, most = 0, 0
    both = threading.Barrier(2)
    lock = threading.Lock()

    def watch(_: Columns) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        both.wait(5)  # broken, and so a failure, unless two replicas are in it together
        with lock:
            at_once -= 1

    pool = pool_of(Model(watch), Model(watch), max_rows=1)
    await pool.start(no_proof)
    answers = await asyncio.gather(*(pool.submit(rows(float(i)), later()) for i in range(10)))
    assert answers == [[2.0 * i] for i in range(10)]
    assert most == 2
    await pool.stop()


async def test_a_hanging_model_does_not_hold_its_callers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers are told at their deadline; stopping leaves the thread behind with a warning instead of hanging."""
    release = threading.Event()
    pool = pool_of(Model(lambda _: (release.wait(30), None)[1]))
    await pool.start(no_proof)
    with pytest.raises(DeadlineExceeded):
        await pool.submit(rows(1.0), later(0.05))
    monkeypatch.setattr(thread, "_STOP_S", 0.01)
    monkeypatch.setattr(batcher, "_CLOSE_S", 0.01)
    with caplog.at_level(logging.WARNING):
        await pool.stop()
    assert "left behind" in caplog.text
    release.set()


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), RuntimeError("no weights")], ids=repr)
async def test_whatever_loading_raises_is_a_load_failure(raised: BaseException) -> None:
    """A model that exits while it is loaded is refused like any other that does not load; nothing hangs."""

    def load() -> Model:
        raise raised

    replica = ThreadReplica(load, SIGNATURE)
    with pytest.raises(LoadFailed, match=type(raised).__name__):
        await replica.start()
    await replica.stop()
    assert not replica.alive


async def test_an_answer_that_is_no_mapping_is_an_inference_failure() -> None:
    """An adapter that answers nonsense fails its rows with a typed error."""

    class Nonsense(Model):
        def infer(self, columns: Columns) -> Columns:
            return [1.0]  # type: ignore[return-value]

    pool = pool_of(Nonsense())
    await pool.start(no_proof)
    (failure,) = await pool.submit(rows(1.0), later())
    assert isinstance(failure, InferenceFailed)
    await pool.stop()


async def test_a_stopped_pool_finishes_its_batch_and_refuses_the_rest() -> None:
    """On stop the batches at hand are answered, and what waits gets ``NotReady``."""
    started, release = threading.Event(), threading.Event()

    def hold(_: Columns) -> None:
        started.set()
        release.wait(10)

    pool = pool_of(Model(hold), max_rows=1)
    await pool.start(no_proof)
    running = pool.submit(rows(1.0), later())
    await asyncio.to_thread(started.wait, 10)
    staged = pool.submit(rows(2.0), later())
    await asyncio.sleep(0)
    waiting = pool.submit(rows(3.0), later())
    assert pool.queue_depth == 1
    stopping = asyncio.create_task(pool.stop())
    with pytest.raises(NotReady):
        await waiting
    release.set()
    assert await running == [2.0]
    assert await staged == [4.0]
    await stopping
    assert not pool.alive


@pytest.mark.parametrize(
    "answer",
    [{"output": np.zeros(3)}, {"output": np.float64(1)}, {"a": np.zeros(1), "b": np.zeros(2)}],
    ids=["too many", "a scalar", "ragged"],
)
async def test_an_answer_that_does_not_match_its_rows_is_refused(answer: Columns) -> None:
    """A model that answers another number of rows than it was asked gets nobody a wrong answer."""

    class Lying(Model):
        def infer(self, columns: Columns) -> Columns:
            return answer

    pool = pool_of(Lying())
    await pool.start(no_proof)
    (failure,) = await pool.submit(rows(1.0), later())
    assert isinstance(failure, InferenceFailed)
    await pool.stop()


async def proof(infer: Infer) -> None:
    """Run a few batches of several sizes, as a warm-up does."""
    for size in (1, 2, 4, 8, 16):
        for _ in range(4):
            await infer(rows(*range(size)))


async def test_a_batch_cheaper_than_the_way_to_the_thread_runs_in_place() -> None:
    """Once a model is known to take microseconds, its batches run on the event loop itself, and the status says so."""
    model = Model()
    pool = pool_of(model, max_rows=16)
    await pool.start(proof)
    for i in range(100):
        assert await pool.submit(rows(float(i)), later()) == [2.0 * i]
    assert threading.get_ident() in model.threads
    assert pool.status().replicas[0].detail["in_place"] > 0
    await pool.stop()


async def test_a_batch_dearer_than_the_way_to_the_thread_never_runs_in_place() -> None:
    """A model of a millisecond stays in its thread."""
    model = Model(lambda _: time.sleep(0.001))
    pool = pool_of(model, max_rows=16)
    await pool.start(proof)
    for i in range(50):
        assert await pool.submit(rows(float(i)), later()) == [2.0 * i]
    assert model.threads.isdisjoint({threading.get_ident()})
    assert pool.status().replicas[0].detail == {"in_place": 0, "over_cap": 0}
    await pool.stop()


async def test_batches_in_place_starve_nobody() -> None:
    """With 256 callers whose batches run in place, each gets its share, and other work of the loop gets its turns."""
    pool = pool_of(Model(), max_rows=256, queue_limit=1024)
    await pool.start(proof)
    counts = [0] * 256
    turns = 0
    done = asyncio.Event()

    async def caller(number: int) -> None:
        while not done.is_set():
            assert await pool.submit(rows(float(number)), later()) == [2.0 * number]
            counts[number] += 1
            if sum(counts) > 20_000:
                done.set()

    async def other_work() -> None:
        nonlocal turns
        while not done.is_set():
            await asyncio.sleep(0)
            turns += 1

    await asyncio.gather(other_work(), *(caller(number) for number in range(256)))
    status = pool.status()
    assert status.replicas[0].detail["in_place"] > 0
    assert min(counts) > max(counts) / 2
    assert turns >= status.batches.batches - len((1, 2, 4, 8, 16)) * 4
    await pool.stop()


async def test_an_error_in_place_is_an_inference_failure_like_any_other() -> None:
    """A row that a model raises on fails alone, wherever its batch runs."""

    def refuse_sevens(columns: Columns) -> None:
        if 7.0 in columns["x"] and len(columns["x"]) < 4:
            raise ValueError("seven")

    pool = pool_of(Model(refuse_sevens), max_rows=16)
    await pool.start(proof)
    answers = await asyncio.gather(*(pool.submit(rows(float(i)), later()) for i in (6, 7)))
    assert answers[0] == [12.0]
    assert isinstance(answers[1][0], InferenceFailed)
    await pool.stop()


async def test_a_killed_thread_gives_up_its_batch_and_is_over_when_it_ends() -> None:
    """A thread cannot be killed: its callers are told at once, it takes nothing more, and it ends with its batch."""
    started, release = threading.Event(), threading.Event()

    def hold(_: Columns) -> None:
        started.set()
        release.wait(10)

    replica = ThreadReplica(lambda: Model(hold), SIGNATURE)
    await replica.start()
    running, staged = replica.infer(rows(1.0)), replica.infer(rows(2.0))
    await asyncio.to_thread(started.wait, 10)
    replica.kill("it hangs")
    with pytest.raises(WorkerDied, match="it hangs"):
        await running
    with pytest.raises(NotRun):
        await staged
    assert not replica.alive
    over = asyncio.create_task(replica.ended())
    await asyncio.sleep(0)
    assert not over.done()
    release.set()
    assert await over == "it hangs"
    await replica.stop()


async def test_a_model_is_the_same_in_its_thread_and_in_place() -> None:
    """What a caller has set for its own context (NumPy's errors, decimal precision) is nothing to the model."""
    seen = set()

    def look(_: Columns) -> None:
        seen.add((decimal.getcontext().prec, np.geterr()["over"]))

    pool = pool_of(Model(look), max_rows=16)
    await pool.start(proof)
    with np.errstate(all="raise"), decimal.localcontext(prec=5):
        for _ in range(50):
            assert await pool.submit(rows(0.0), later()) == [0.0]
    assert pool.status().replicas[0].detail["in_place"] > 0
    assert seen == {(28, "warn")}
    await pool.stop()


async def test_a_thread_that_is_ended_from_outside_wakes_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer of the host that raises ends the thread of a replica: its callers are woken."""

    def tracer(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name == "_work":
            raise RuntimeError("a tracer of the host")
        return None

    replica = ThreadReplica(Model, SIGNATURE)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        patch.setattr(threading, "_trace_hook", tracer)
        with pytest.raises(LoadFailed, match="its thread ended"):
            await asyncio.wait_for(replica.start(), 30)
        replica._thread.join(30)
    assert await asyncio.wait_for(replica.ended(), 30) == "its thread ended"
    assert not replica.alive
