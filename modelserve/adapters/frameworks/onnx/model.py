"""A graph behind the batch contract: columns in, columns out."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelserve.adapters.frameworks.onnx.feeds import bind
from modelserve.adapters.frameworks.onnx.graph import Input, column_names, first_line
from modelserve.errors import InferenceFailed
from modelserve.signature import columns_of
from modelserve.types import SOLE_OUTPUT, Array, Columns

_DTYPES: Final = {"float": "float32", "double": "float64", "string": "object"}


class OnnxModel:
    """A session behind the batch contract. A sole output is answered bare, several by the names in the graph."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = [_input(each) for each in session.get_inputs()]
        self._column_names = column_names(session.get_modelmeta().custom_metadata_map)
        names = [each.name for each in session.get_outputs()]
        self._outputs = [SOLE_OUTPUT] if len(names) == 1 else names

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch of columns, each of shape ``(rows, ...)``."""
        feeds = bind(self._inputs, columns, self._column_names)
        try:
            results = self._session.run(None, feeds)
        except Exception as error:
            raise InferenceFailed(f"ONNX Runtime failed: {first_line(error)}") from error
        return {name: _column(result) for name, result in zip(self._outputs, results, strict=True)}

    def answer_as_given(self, example: Any) -> dict[str, Array]:
        """Answer arrays of the example's own types and order."""
        columns = columns_of(example).items()
        return self.infer({name: array.astype(object) if array.dtype.kind == "U" else array for name, array in columns})


def _input(argument: Any) -> Input:
    kind = argument.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else None for size in argument.shape)
    return Input(argument.name, np.dtype(_DTYPES.get(kind, kind)), shape)


def _column(result: Any) -> Array:
    """Return a tensor as it is, and a sequence of maps (scores by their labels) as one object per row."""
    if not isinstance(result, list):
        return np.asarray(result)
    column = np.empty(len(result), dtype=object)
    column[:] = [{str(label): score for label, score in row.items()} for row in result]
    return column
