"""The contract of a framework adapter, as tests. Inherit :class:`FrameworkContract` and say what to run it on.

::

    class TestMyFramework(FrameworkContract):
        @pytest.fixture
        def framework(self) -> Framework:
            return MyFramework()

        @pytest.fixture(params=CASES, ids=str)
        def case(self, request) -> Case:
            return request.param

The adapter has to be known by its name: through the entry point that its package declares. One of the tests is a
coroutine, so pytest-asyncio is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from modelserve.config import ModelOptions
from modelserve.errors import InvalidInput, LoadError
from modelserve.ports import AnswersAsGiven, Framework, Model, SavedModel
from modelserve.registry import Registry
from modelserve.server import AsyncModelServer
from modelserve.signature import Signature, unstack
from modelserve.types import SAFE, SOLE_OUTPUT, Json, Runtime

ROWS = (1, 2, 7, 64)
_EXAMPLE_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A fitted model, at least 64 rows that it takes, and what the bare model answers to some of them.

    ``rows`` is an array, a DataFrame or a mapping of columns. ``bare(model, rows)`` is called with the first of them,
    as the user has them, and returns an array, or a mapping of arrays where the model has several outputs. ``options``
    is what the user would tell :meth:`modelserve.Registry.register`, ``runtime`` what has to be allowed to load it.
    ``tolerance`` is by how much a number may differ, relatively or absolutely: 0 where the kernels are the same.
    """

    name: str
    model: Any
    rows: Any
    bare: Callable[[Any, Any], Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 0.0
    runtime: Runtime = SAFE

    def __str__(self) -> str:
        return self.name

    @property
    def signature(self) -> Signature:
        """The signature of the rows."""
        return Signature.infer(self.rows)

    def take(self, count: int) -> Any:
        """Return the first rows."""
        if isinstance(self.rows, Mapping):
            return {name: column[:count] for name, column in self.rows.items()}
        return self.rows.iloc[:count] if hasattr(self.rows, "iloc") else self.rows[:count]

    def records(self, count: int) -> list[dict[str, Json]]:
        """Return the first rows as requests carry them."""
        signature = self.signature
        return [signature.record(row) for row in signature.rows_of(self.take(count))]

    def columns(self, count: int) -> Mapping[str, Any]:
        """Return the first rows as an adapter gets them: validated and stacked."""
        signature = self.signature
        return signature.stack(signature.rows_of(self.take(count)))

    def expected(self, count: int) -> list[Json]:
        """Return what the bare model answers to the first rows, one value per row."""
        answer = self.bare(self.model, self.take(count))
        outputs = answer if isinstance(answer, Mapping) else {SOLE_OUTPUT: np.asarray(answer)}
        return unstack(outputs, count)


class FrameworkContract:
    """What goes in comes out the same as from the bare model, and nothing unsafe is ever opened."""

    @pytest.fixture
    def saved(self, framework: Framework, case: Case, tmp_path: Path) -> SavedModel:
        """The case's model, written by the adapter."""
        return framework.save(case.model, tmp_path, case.options, case.columns(_EXAMPLE_ROWS))

    @pytest.fixture
    def loaded(self, framework: Framework, case: Case, saved: SavedModel) -> Model:
        """The same model, read again."""
        return framework.load(saved.path, saved.format, saved.load_options, case.runtime)

    def test_it_answers_as_the_bare_model_does(self, loaded: Model, case: Case) -> None:
        """After saving and loading, every batch size gives the bare model's answers in the same order."""
        for count in ROWS:
            self.assert_same(self.answers(loaded, case, count), case.expected(count), case.tolerance)

    def test_a_live_model_answers_as_the_loaded_one(self, framework: Framework, case: Case, saved: SavedModel) -> None:
        """What is proven at registration is what is served."""
        live = framework.wrap(case.model, saved.load_options)
        self.assert_same(self.answers(live, case, 7), case.expected(7), case.tolerance)

    def test_a_live_model_answers_rows_as_they_are_given(
        self, framework: Framework, case: Case, saved: SavedModel
    ) -> None:
        """What registration compares a served model with is the bare model's own answer."""
        live = framework.wrap(case.model, saved.load_options)
        if not isinstance(live, AnswersAsGiven):
            pytest.skip("the adapter's models are not asked without the batch contract")
        self.assert_same(unstack(live.answer_as_given(case.take(7)), 7), case.expected(7), case.tolerance)

    def test_a_row_is_answered_alike_alone_and_in_company(self, loaded: Model, case: Case) -> None:
        """Batch-mates do not change a row's answer."""
        alone, together = self.answers(loaded, case, 1), self.answers(loaded, case, 7)
        self.assert_same(alone, together[:1], max(case.tolerance, 1e-6))

    def test_a_saved_file_can_be_registered_by_its_path(
        self, framework: Framework, case: Case, saved: SavedModel, tmp_path: Path
    ) -> None:
        """Saving a path takes the file as it is, in the same format; what is loaded again answers."""
        again = framework.save(saved.path, tmp_path / "elsewhere", case.options, case.columns(_EXAMPLE_ROWS))
        assert (again.path, again.format, again.runs_code) == (saved.path, saved.format, saved.runs_code)
        loaded = framework.load(again.path, again.format, again.load_options, case.runtime)
        assert len(self.answers(loaded, case, 2)) == 2  # noqa: PLR2004

    @pytest.mark.parametrize("junk", [b"", b"junk", b"\x80\x04N.", b"PK\x03\x04junk"], ids=repr)
    def test_junk_is_a_load_error(
        self, framework: Framework, case: Case, saved: SavedModel, tmp_path: Path, junk: bytes
    ) -> None:
        """Bytes that are not of the declared format are refused as a ``LoadError``, whatever they look like."""
        bad = tmp_path / "junk"
        bad.write_bytes(junk)
        for runtime in (SAFE, case.runtime):
            with pytest.raises(LoadError):
                framework.load(bad, saved.format, saved.load_options, runtime)

    def test_an_unknown_format_is_a_load_error(self, framework: Framework, saved: SavedModel) -> None:
        """There is no fallback from one loader to another."""
        with pytest.raises(LoadError):
            framework.load(saved.path, "no-such-format", saved.load_options)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("executor", ["thread", "process"])
    async def test_it_is_registered_and_served(
        self, framework: Framework, case: Case, tmp_path: Path, executor: Literal["thread", "process"]
    ) -> None:
        """By a thread or by a process, requests get the bare model's answers, and wrong ones are refused by name."""
        options = ModelOptions(
            executor=executor,
            replicas=3 if executor == "thread" else 1,  # which are loaded at the same time
            allow_pickle=case.runtime.allow_pickle,
            allow_code=case.runtime.allow_code,
            factories=tuple(case.runtime.factories),
            timeout_ms=30_000,
        )
        with Registry(f"sqlite:///{tmp_path}/models.db") as registry:
            example = case.take(_EXAMPLE_ROWS)
            registry.register("m", "1", case.model, example=example, framework=framework.name, **case.options)
            registry.promote("m", "1")
            async with AsyncModelServer(registry, {"m": options}, cache_dir=tmp_path / "cache") as server:
                assert await server.predict_many("m", []) == []
                for count in ROWS:
                    found = [answer.prediction for answer in await server.predict_many("m", case.records(count))]
                    self.assert_same(found, case.expected(count), case.tolerance)
                record = case.records(1)[0]
                for name in record:
                    with pytest.raises(InvalidInput) as refused:
                        await server.predict("m", record | {name: {"not": "a value"}})
                    assert refused.value.field == name

    @staticmethod
    def answers(model: Model, case: Case, count: int) -> list[Json]:
        """Send the first rows the way requests go: validated, stacked, inferred, unstacked."""
        return unstack(model.infer(case.columns(count)), count)

    @staticmethod
    def assert_same(found: Json, expected: Json, tolerance: float) -> None:
        """Compare exactly, or numbers within ``tolerance`` where the case allows one."""
        if not tolerance:
            assert found == expected
        elif isinstance(expected, Mapping):
            assert found.keys() == expected.keys()
            for name in expected:
                FrameworkContract.assert_same(found[name], expected[name], tolerance)
        elif isinstance(expected, list) and expected and isinstance(expected[0], str | Mapping):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                FrameworkContract.assert_same(one, other, 0.0 if isinstance(other, str) else tolerance)
        else:
            assert np.allclose(found, expected, rtol=tolerance, atol=tolerance)
