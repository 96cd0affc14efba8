"""The contract of a framework adapter, as tests. Inherit :class:`FrameworkContract` and say what to run it on.

::

    class TestMyFramework(FrameworkContract):
        @pytest.fixture
        def framework(self) -> Framework:
            return MyFramework()

        @pytest.fixture(params=CASES, ids=str)
        def case(self, request) -> Case:
            return request.param
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelserve.errors import LoadError
from modelserve.ports import Framework, Model, SavedModel
from modelserve.signature import Signature, unstack

ROWS = (1, 2, 7, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A fitted model, at least 64 rows that it takes, and what the bare model answers to some of them.

    ``bare(model, rows)`` is called with a slice of ``rows`` as the user has them (array, DataFrame).
    """

    name: str
    model: Any
    rows: Any
    bare: Callable[[Any, Any], Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 0.0

    def __str__(self) -> str:
        return self.name

    def take(self, count: int) -> Any:
        """Return the first rows."""
        return self.rows.iloc[:count] if hasattr(self.rows, "iloc") else self.rows[:count]

    def expected(self, count: int) -> list[Any]:
        """Return what the bare model answers to the first rows, one value per row."""
        answer = np.asarray(self.bare(self.model, self.take(count)))
        values: list[Any] = answer.tolist()
        return values


class FrameworkContract:
    """What goes in comes out the same as from the bare model, and nothing unsafe is ever opened."""

    @pytest.fixture
    def saved(self, framework: Framework, case: Case, tmp_path: Path) -> SavedModel:
        """The case's model, written by the adapter."""
        return framework.save(case.model, tmp_path, case.options)

    @pytest.fixture
    def loaded(self, framework: Framework, saved: SavedModel) -> Model:
        """The same model, read again."""
        return framework.load(saved.path, saved.format, saved.load_options)

    @pytest.mark.parametrize("count", ROWS)
    def test_it_answers_as_the_bare_model_does(self, loaded: Model, case: Case, count: int) -> None:
        """After saving and loading, every batch size gives the bare model's answers in the same order."""
        self.assert_same(self.answers(loaded, case, count), case.expected(count), case.tolerance)

    def test_a_live_model_answers_as_the_loaded_one(self, framework: Framework, case: Case, saved: SavedModel) -> None:
        """What is proven at registration is what is served."""
        live = framework.wrap(case.model, saved.load_options)
        self.assert_same(self.answers(live, case, 7), case.expected(7), case.tolerance)

    def test_a_row_is_answered_alike_alone_and_in_company(self, loaded: Model, case: Case) -> None:
        """Batch-mates do not change a row's answer."""
        alone, together = self.answers(loaded, case, 1), self.answers(loaded, case, 7)
        self.assert_same(alone, together[:1], 0.0 if isinstance(alone[0], str) else 1e-6)

    def test_a_saved_file_can_be_registered_by_its_path(
        self, framework: Framework, case: Case, saved: SavedModel, tmp_path: Path
    ) -> None:
        """Saving a path takes the file as it is, with the same format and options."""
        again = framework.save(saved.path, tmp_path / "elsewhere", case.options)
        assert (again.path, again.format, again.load_options) == (saved.path, saved.format, saved.load_options)

    @pytest.mark.parametrize("junk", [b"", b"junk", b"\x80\x04N.", b"PK\x03\x04junk"], ids=repr)
    def test_junk_is_a_load_error(self, framework: Framework, saved: SavedModel, tmp_path: Path, junk: bytes) -> None:
        """Bytes that are not of the declared format are refused as a ``LoadError``, whatever they look like."""
        bad = tmp_path / "junk"
        bad.write_bytes(junk)
        with pytest.raises(LoadError):
            framework.load(bad, saved.format, saved.load_options)

    def test_an_unknown_format_is_a_load_error(self, framework: Framework, saved: SavedModel) -> None:
        """There is no fallback from one loader to another."""
        with pytest.raises(LoadError):
            framework.load(saved.path, "no-such-format", saved.load_options)

    @staticmethod
    def answers(model: Model, case: Case, count: int) -> list[Any]:
        """Send the first rows the way requests go: validated, stacked, inferred, unstacked."""
        signature = Signature.infer(case.rows)
        rows = signature.rows_of(case.take(count))
        return unstack(model.infer(signature.stack(rows)), len(rows))

    @staticmethod
    def assert_same(found: list[Any], expected: list[Any], tolerance: float) -> None:
        """Compare exactly, or within ``tolerance`` where the case allows one."""
        if tolerance:
            assert np.allclose(found, expected, rtol=tolerance, atol=tolerance)
        else:
            assert found == expected
