"""Every type, in every shape, both ways: a model gets and gives the same in a thread and in a process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from modelserve.errors import InferenceFailed
from modelserve.execution import wire
from modelserve.execution.process import ProcessReplica
from modelserve.execution.thread import ThreadReplica
from modelserve.signature import DTYPES, Field, Signature
from modelserve.testing.replicas import NUMBER, numbers
from modelserve.types import Json, Row
from tests.execution.answers import CASES, Answering, Case, Described, Refused
from tests.execution.hosting import process_replica, thread_replica

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (2, 2))
NULLABLE = ("float16", "float32", "float64", "string")
STRINGS = ["", "a", "naïve", "\N{SNOWMAN}\U0001f600", "\0", "a\0b\0", '"\\\n\u2028', "null", "x" * 1000]
ROWS = 16


def edges(dtype: str) -> list[Any]:
    """Return the values of a type that are easily lost."""
    if dtype == "string":
        return STRINGS
    if dtype == "bool":
        return [True, False]
    if dtype.startswith("float"):
        limits = np.finfo(dtype)
        return [0.0, -0.0, 0.1, float(limits.max), float(limits.min), float(limits.smallest_subnormal)]
    bounds = np.iinfo(dtype)
    return [0, 1, int(bounds.min), int(bounds.max)]


FIELDS = [
    Field(f"{dtype} {shape} {nullable}", dtype, shape, nullable)
    for dtype in DTYPES
    for shape in SHAPES
    for nullable in ((False, True) if dtype in NULLABLE else (False,))
]
SIGNATURE = Signature(FIELDS)


def _column(field: Field) -> list[Any]:
    """Return what callers ask of one field, a value for each row: scalars, or nested lists."""
    values = itertools.cycle([*edges(field.dtype), None] if field.nullable else edges(field.dtype))
    size = int(np.prod(field.shape))
    rows = [np.array(list(itertools.islice(values, size)), dtype=object).reshape(field.shape) for _ in range(ROWS)]
    return [row.tolist() for row in rows]


COLUMNS = {field.name: _column(field) for field in FIELDS}
RECORDS = [{name: column[i] for name, column in COLUMNS.items()} for i in range(ROWS)]


def bare(field: Field, count: int) -> np.ndarray[Any, Any]:
    """Return the array that a caller would hand the model itself; a number that is missing is NaN."""
    values = COLUMNS[field.name][:count]
    if field.dtype == "string":
        return np.array(values, dtype=object)
    return np.array(values, dtype=object if not field.nullable else "float64").astype(field.dtype)


class Replicas:
    """Both kinds of replicas of each model, on one loop."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._pairs: dict[str, list[ThreadReplica | ProcessReplica]] = {}

    def start(self, model: str, signature: Signature) -> None:
        async def start() -> None:
            self._pairs[model] = [
                make(model, signature, framework=Answering) for make in (thread_replica, process_replica)
            ]
            await asyncio.gather(*(replica.start() for replica in self._pairs[model]))

        self._runner.run(start())

    def infer(self, model: str, rows: Sequence[Row]) -> list[list[Json] | str]:
        """Return the answers of both, or what their ``InferenceFailed`` says."""

        async def ask(replica: ThreadReplica | ProcessReplica) -> list[Json] | str:
            try:
                return await replica.infer(rows)
            except InferenceFailed as error:
                return str(error)

        async def ask_both() -> list[list[Json] | str]:
            answers = [await ask(replica) for replica in self._pairs[model]]
            assert all(replica.alive for replica in self._pairs[model])
            return answers

        return self._runner.run(ask_both())

    def close(self) -> None:
        for replica in itertools.chain.from_iterable(self._pairs.values()):
            self._runner.run(replica.stop())


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    """Every model once in a thread and once in a process, for all tests."""
    with asyncio.Runner() as runner, contextlib.closing(Replicas(runner)) as made:
        for model in ("echo", "described"):
            made.start(model, SIGNATURE)
        made.start("cases", NUMBER)
        yield made


class Asked(NamedTuple):
    """What both replicas of both models answered to the rows of the matrix."""

    echo: list[Any]
    described: list[Any]


@pytest.fixture(scope="module", params=[1, ROWS], ids=["one row", "many rows"])
def asked(replicas: Replicas, request: pytest.FixtureRequest) -> Asked:
    """Ask both models for all rows at once, or for one after the other."""
    rows = [SIGNATURE.validate(record) for record in RECORDS]
    answers = []
    for model in Asked._fields:
        batches = [replicas.infer(model, rows[i : i + request.param]) for i in range(0, ROWS, request.param)]
        answers.append([list(itertools.chain.from_iterable(each)) for each in zip(*batches, strict=True)])
    return Asked(*answers)


@pytest.mark.promise("P2")
@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_inputs_arrive_as_their_callers_gave_them(field: Field, asked: Asked) -> None:
    """The model's answer to a row is its answer to the caller's own array, in every type, shape and kind of replica."""
    given = bare(field, ROWS)
    described = Described().infer({field.name: given})[field.name].tolist()
    for answers in asked.described:
        assert [answer[field.name] for answer in answers] == described
    for answers in asked.echo:
        assert repr([answer[field.name] for answer in answers]) == repr(given.tolist())


@pytest.mark.promise("P2")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_answers_are_the_same_in_a_thread_and_in_a_process(number: int, rows: int, replicas: Replicas) -> None:
    """Every form of an answer is one plain value per row, or one error that says why not; the replica lives on."""
    case: Case = CASES[number]
    in_thread, in_process = replicas.infer("cases", numbers(*[number] * rows))
    assert repr(in_process) == repr(in_thread)
    if isinstance(case.expected, Refused):
        assert isinstance(in_thread, str)
        assert re.search(case.expected.problem, in_thread)
    else:
        assert repr(in_thread) == repr([case.expected] * rows)


def test_text_beyond_what_a_frame_carries_fails_its_batch(monkeypatch: pytest.MonkeyPatch, replicas: Replicas) -> None:
    """More text than a frame can carry is the failure of its batch, on the way there as on the way back."""
    rows = [SIGNATURE.validate(RECORDS[0])]
    with monkeypatch.context() as patch:
        patch.setattr(wire, "MAX_TEXT", 100)
        in_thread, in_process = replicas.infer("echo", rows)
        with pytest.raises(InferenceFailed, match="bytes of text"):
            wire.outputs_of({"output": np.array(["x" * 100], dtype=object)})
    assert isinstance(in_thread, list)
    assert re.search("at most 100", str(in_process))
    assert repr(replicas.infer("echo", rows)[1]) == repr(in_thread)
