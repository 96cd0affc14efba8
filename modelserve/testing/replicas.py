"""The contract of a replica, as tests. Inherit :class:`ReplicaContract` and say how one is made.

::

    class TestMyReplica(ReplicaContract):
        @pytest.fixture
        def make(self) -> Make:
            return lambda model, signature, **options: MyReplica(...)

``make`` loads the model named ``model`` of :class:`modelserve.testing.misbehaving.Misbehaving`, with ``options`` as its
load options.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from modelserve.errors import ArtifactUnsafe, InferenceFailed, LoadError, LoadFailed, WorkerDied
from modelserve.ports import NotRun, Replica
from modelserve.signature import Field, Signature
from modelserve.types import Json, Row

NUMBER = Signature([Field("x", "float64")])
EVERYTHING = Signature(
    [
        Field("flag", "bool"),
        Field("small", "int8"),
        Field("large", "uint64"),
        Field("single", "float32"),
        Field("double", "float64", nullable=True),
        Field("name", "string", nullable=True),
        Field("vector", "float32", (3,)),
        Field("matrix", "int64", (2, 2)),
        Field("words", "string", (2,), nullable=True),
    ]
)
GATED = Signature([Field("x", "float64"), Field("gate", "string"), Field("started", "string")])
IMAGE = Signature([Field("x", "float32", (3, 64, 64))])
_LIMIT_S = 30.0


class Make(Protocol):
    """How the contract gets a replica."""

    def __call__(self, model: str, signature: Signature, **options: Json) -> Replica:
        """Return a replica that was not started."""
        ...


@contextlib.asynccontextmanager
async def started(replica: Replica) -> AsyncIterator[Replica]:
    """Start a replica and stop it in the end."""
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop()


def rows_of(signature: Signature, records: Sequence[dict[str, Any]]) -> list[Row]:
    """Validate records as a server would."""
    return [signature.validate(record) for record in records]


def numbers(*values: float) -> list[Row]:
    """Return rows of the one number that most models here take."""
    return [(value,) for value in values]


async def exists(path: Path) -> None:
    """Wait until a model has made a file."""
    async with asyncio.timeout(_LIMIT_S):
        while not path.exists():  # noqa: ASYNC110, ASYNC240  # it is made by another process or thread
            await asyncio.sleep(0.001)


class ReplicaContract:
    """What every replica has to do, wherever its model runs."""

    @pytest.mark.parametrize("count", [1, 2, 7, 64])
    async def test_values_of_every_type_arrive_and_come_back(self, make: Make, count: int) -> None:
        """Booleans, integers, floats, strings, missing values and tensors survive the way there and back."""
        records: list[dict[str, Any]] = [
            {
                "flag": i % 2 == 0,
                "small": -i,
                "large": 2**64 - 1 - i,
                "single": i / 3,
                "double": None if i % 3 == 0 else i / 3,
                "name": None if i % 4 == 0 else f"naïve {i} \N{SNOWMAN}",
                "vector": [i, i + 0.5, -i],
                "matrix": [[i, -i], [2**62, 0]],
                "words": [f"{i}\0", None],
            }
            for i in range(count)
        ]
        async with started(make("echo", EVERYTHING)) as replica:
            answers = await replica.infer(rows_of(EVERYTHING, records))
        assert len(answers) == count
        for record, answer in zip(records, answers, strict=True):
            double = answer.pop("double")
            assert np.isnan(double) if record["double"] is None else double == record["double"]
            assert answer.pop("single") == np.float32(record["single"])
            assert answer == {name: record[name] for name in answer}

    async def test_answers_come_in_every_form(self, make: Make) -> None:
        """Strings, objects and several outputs are plain Python values, one per row."""
        async with started(make("strings", NUMBER)) as replica:
            assert await replica.infer(numbers(1, 2)) == ["<1.0>", "<2.0>"]
        async with started(make("objects", NUMBER)) as replica:
            assert await replica.infer(numbers(5)) == [{"value": 5.0, "none": None, "many": [1, "two"]}]
        async with started(make("several", NUMBER)) as replica:
            assert await replica.infer(numbers(1, -2)) == [
                {"double": 2.0, "label": "up", "pair": [1.0, -1.0]},
                {"double": -4.0, "label": "down", "pair": [-2.0, 2.0]},
            ]

    async def test_large_inputs_and_batches_that_grow(self, make: Make) -> None:
        """Tensors of any size keep their values bit by bit, from one batch to a larger one and back to a small one."""
        chance = np.random.default_rng(7)
        async with started(make("double", IMAGE)) as replica:
            for count in (1, 5, 16, 2):
                images = chance.standard_normal((count, 3, 64, 64), dtype=np.float32)
                answers = await replica.infer([(image,) for image in images])
                assert np.array_equal(np.array(answers, dtype=np.float32), images * 2)

    @pytest.mark.promise("P2")
    async def test_batches_are_answered_in_the_order_they_were_handed_over(self, make: Make) -> None:
        """Two batches at hand at once, large ones too, do not touch each other."""
        async with started(make("in place", IMAGE)) as replica:
            for _ in range(5):
                first, second = (np.full((4, 3, 64, 64), value, dtype=np.float32) for value in (1, 2))
                running = [replica.infer([(image,) for image in images]) for images in (first, second)]
                answers = [np.array(await each) for each in running]
                for images, answer in zip((first, second), answers, strict=True):
                    assert np.all(answer == images * 2)

    async def test_a_model_may_work_on_its_inputs(self, make: Make) -> None:
        """Inputs are the model's own: changing them harms nobody."""
        row = NUMBER.validate({"x": 3.0})
        async with started(make("in place", NUMBER)) as replica:
            assert await replica.infer([row, row]) == [6.0, 6.0]
            assert await replica.infer([row]) == [6.0]

    async def test_an_error_fails_its_batch_and_nothing_else(self, make: Make) -> None:
        """Whatever a model raises, even to exit, is an ``InferenceFailed``; the next batch runs as ever."""
        async with started(make("touchy", NUMBER)) as replica:
            with pytest.raises(InferenceFailed, match="ValueError: a bad row"):
                await replica.infer(numbers(1, -1))
            with pytest.raises(InferenceFailed, match="SystemExit"):
                await replica.infer(numbers(-5))
            assert await replica.infer(numbers(4)) == [8.0]
            assert replica.alive

    @pytest.mark.parametrize(("model", "complaint"), [("one more", "2 rows for 1"), ("complex", "no JSON form")])
    async def test_an_answer_that_is_none_is_refused(self, make: Make, model: str, complaint: str) -> None:
        """Another number of rows, or values that have no JSON form, are the model's failure."""
        async with started(make(model, NUMBER)) as replica:
            with pytest.raises(InferenceFailed, match=complaint):
                await replica.infer(numbers(1))
            assert replica.alive

    @pytest.mark.parametrize("first", ["fail", "exit"])
    async def test_whatever_loading_raises_is_a_load_failure(self, make: Make, first: str) -> None:
        """A model that does not load is a ``LoadFailed`` that says why, and nothing is left."""
        replica = make("double", NUMBER, first=first)
        with pytest.raises(LoadFailed, match="no weights" if first == "fail" else "SystemExit"):
            await replica.start()
        assert not replica.alive
        await replica.stop()
        await asyncio.wait_for(replica.ended(), _LIMIT_S)

    async def test_an_unsafe_artifact_stays_one(self, make: Make) -> None:
        """The kind of a load error survives the way back."""
        replica = make("double", NUMBER, first="refuse")
        with pytest.raises(ArtifactUnsafe, match="allow_pickle") as refused:
            await replica.start()
        assert isinstance(refused.value, LoadError)
        await replica.stop()

    async def test_a_caller_who_leaves_disturbs_nobody(self, make: Make) -> None:
        """A cancelled batch is dropped; the one behind it gets its own answer."""
        async with started(make("touchy", NUMBER)) as replica:
            left, stays = replica.infer(numbers(1)), replica.infer(numbers(2))
            left.cancel()
            assert await stays == [4.0]
            assert await replica.infer(numbers(3)) == [6.0]

    async def test_stopping_finishes_the_batch_at_hand(self, make: Make, tmp_path: Path) -> None:
        """On stop the batches at hand are answered first; later ones are not run; stopping twice is safe."""
        replica = make("gated", GATED)
        await replica.start()
        running = replica.infer([(1.0, str(tmp_path / "gate"), str(tmp_path / "started"))])
        await exists(tmp_path / "started")
        stopping = asyncio.create_task(replica.stop())
        await asyncio.sleep(0)
        assert not replica.alive
        with pytest.raises(NotRun):
            await replica.infer([(2.0, "", "")])
        (tmp_path / "gate").touch()
        assert await running == [2.0]
        await stopping
        await replica.stop()
        assert "it was stopped" in await asyncio.wait_for(replica.ended(), _LIMIT_S)

    async def test_killing_tells_who_waits_at_once(self, make: Make, tmp_path: Path) -> None:
        """The batch that runs fails with ``WorkerDied``, the one behind it with ``NotRun``; its end may come later."""
        replica = make("gated", GATED)
        await replica.start()
        row = (1.0, str(tmp_path / "gate"), str(tmp_path / "started"))
        running, staged = replica.infer([row]), replica.infer([row])
        await exists(tmp_path / "started")
        replica.kill("a test says so")
        with pytest.raises(WorkerDied, match="a test says so"):
            await running
        with pytest.raises(NotRun):
            await staged
        assert not replica.alive
        (tmp_path / "gate").touch()  # so that also what cannot be killed comes to an end
        assert "a test says so" in await asyncio.wait_for(replica.ended(), _LIMIT_S)
        await replica.stop()

    async def test_it_is_alive_between_start_and_end(self, make: Make) -> None:
        """``alive`` says whether a batch can be handed over."""
        replica = make("double", NUMBER)
        assert not replica.alive
        await replica.start()
        assert replica.alive
        assert isinstance(replica.detail(), dict)
        await replica.stop()
        assert not replica.alive

    async def test_one_that_never_started_can_be_stopped(self, make: Make) -> None:
        """Stopping and killing are safe at any time."""
        replica = make("double", NUMBER)
        replica.kill("nobody wants it")
        await replica.stop()
        assert not replica.alive
