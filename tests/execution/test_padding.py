"""Batches padded to powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import InferenceFailed
from modelserve.execution.padding import Padded
from modelserve.signature import unstack


class Recorder:
    """Answers its input and the rows beside it, and remembers how many rows it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def infer(self, columns: Any) -> dict[str, Any]:
        self.sizes.append(len(columns["x"]))
        return {"x": columns["x"], "words": columns["words"]}


@given(rows=st.integers(1, 300))
def test_a_batch_runs_at_the_next_power_of_two_and_answers_its_own_rows(rows: int) -> None:
    """Whatever its size, a batch of n rows gets its n answers in order, from a run of the next power of two, or 300."""
    model = Recorder()
    columns = {"x": np.arange(rows * 3.0).reshape(rows, 3), "words": np.array([f"w{i}" for i in range(rows)], object)}
    outputs = Padded(model, 300).infer(columns)
    (size,) = model.sizes
    assert size.bit_count() == 1 or size == 300
    assert rows <= size < 2 * rows
    for name, column in columns.items():
        assert outputs[name].tolist() == column.tolist()


def test_no_rows_are_not_padded() -> None:
    """There is no last row to repeat; the model is asked for none."""
    model = Recorder()
    assert len(Padded(model, 8).infer({"x": np.empty((0, 3)), "words": np.empty(0, object)})["x"]) == 0
    assert model.sizes == [0]


def test_a_model_that_answers_another_number_of_rows_is_found_out() -> None:
    """Padding does not hide a model that answers one value for a whole batch."""

    class Mean:
        def infer(self, columns: Any) -> dict[str, Any]:
            return {"output": columns["x"].mean(keepdims=True)}

    with pytest.raises(InferenceFailed, match="1 rows for 3"):
        unstack(Padded(Mean(), 8).infer({"x": np.ones(3)}), 3)
