"""Batches of few sizes, for models that have to be prepared for each size they meet."""

from __future__ import annotations

import numpy as np

from modelserve.ports import Model
from modelserve.types import Array, Columns, row_count


class Padded:
    """Runs every batch as one whose number of rows is the next power of two, by repeating its last row.

    Batches of up to ``most_rows`` rows are never made larger than that. The warm-up runs each of these sizes, so no
    request meets one that the model has not seen.
    """

    def __init__(self, model: Model, most_rows: int) -> None:
        self._model = model
        self._most_rows = most_rows

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch; what the model answers for the rows that were added is dropped."""
        rows = row_count(columns)
        bucket = max(rows, min(self._most_rows, 1 << max(0, rows - 1).bit_length()))
        if rows in {0, bucket}:
            return dict(self._model.infer(columns))
        index = np.minimum(np.arange(bucket), rows - 1)
        outputs = self._model.infer({name: column[index] for name, column in columns.items()})
        return {name: _first(column, rows, bucket) for name, column in outputs.items()}


def _first(column: Array, rows: int, bucket: int) -> Array:
    """Cut a column that has the length asked for; another length is a fault of the model, and is left to be seen."""
    is_whole = isinstance(column, np.ndarray) and column.ndim and len(column) == bucket
    return column[:rows] if is_whole else column
