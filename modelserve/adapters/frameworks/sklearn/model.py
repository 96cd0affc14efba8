"""An estimator behind the batch contract: columns in, columns out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.fitted_columns import fitted_names, in_fitted_order
from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.types import SOLE_OUTPUT, Array, Columns

USUAL_MARK: Final = "NaN"
"""What stands for a missing string where nothing else is known: what pandas reads, and scikit-learn's default."""


class SklearnModel:
    """An estimator behind the batch contract.

    One array input is passed as it is; scalar inputs become a DataFrame where the estimator was fitted on one (or
    holds strings), in the order of its columns, else a matrix of shape ``(rows, inputs)``. ``marks`` says by column
    what a missing string is to the estimator, one of :data:`modelserve.signature.MARKS`, ``other_mark`` for the rest.
    """

    def __init__(
        self, estimator: Any, method: str, *, marks: Mapping[str, str] | None = None, other_mark: str = USUAL_MARK
    ) -> None:
        call = None if method.startswith("_") else getattr(estimator, method, None)
        if not callable(call):
            raise InvalidInput("method", f"{type(estimator).__name__} has no method {method!r}")
        self._call = call
        self._fitted = fitted_names(estimator)
        self._takes_frames = hasattr(estimator, "feature_names_in_")
        self._order: tuple[list[str], list[str]] = ([], [])
        self._marks = marks or {}
        self._other_mark = other_mark

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch of columns, each of shape ``(rows, ...)``."""
        marked = {name: _marked(column, self._marks.get(name, self._other_mark)) for name, column in columns.items()}
        return _as_columns(self._call(self._assemble(marked)))

    def answer_as_given(self, example: Any) -> dict[str, Array]:
        """Answer rows in the form in which their owner has them: an array, a frame; columns and records as a frame."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a frame has names and the estimator none says nothing of the answers
            return _as_columns(self._call(self._as_owned(example)))

    def _assemble(self, columns: Columns) -> Any:
        arrays = list(columns.values())
        if len(arrays) == 1 and (arrays[0].ndim > 1 or (arrays[0].dtype == object and self._fitted is None)):
            return arrays[0]
        if any(array.ndim > 1 for array in arrays):
            raise InferenceFailed("scikit-learn takes either one array input or scalar inputs only")
        columns = self._in_order(columns)
        if self._takes_frames or any(array.dtype == object for array in arrays):
            return _frame(columns)
        return np.column_stack(list(columns.values()))

    def _in_order(self, columns: Columns) -> Columns:
        if self._fitted is None:
            return columns
        given, order = self._order
        if given != list(columns):
            given, order = list(columns), in_fitted_order(self._fitted, list(columns))
            self._order = given, order
        return {name: columns[name] for name in order}

    def _as_owned(self, example: Any) -> Any:
        if isinstance(example, Mapping) and len(example) == 1 and np.ndim(sole := next(iter(example.values()))) > 1:
            return np.asarray(sole)
        frame = _owned_frame(example)
        if frame is None:
            return example[:, np.newaxis] if _is_one_column(example) else example
        if self._fitted is not None:
            return frame[in_fitted_order(self._fitted, list(frame.columns))]
        is_text = len(frame.columns) == 1 and not plugins.require("pandas").api.types.is_numeric_dtype(
            frame.dtypes.iloc[0]
        )
        return frame.iloc[:, 0] if is_text else frame  # what was not fitted on a frame takes its texts bare


def _is_one_column(example: Any) -> bool:
    """Whether an array has a number per row, which scikit-learn takes as a matrix of one column."""
    return isinstance(example, np.ndarray) and example.ndim == 1 and example.dtype.kind in "biuf"


def _owned_frame(example: Any) -> Any:
    """Return a frame as it is, and columns or records as the frame that pandas makes of them; None for an array."""
    if hasattr(example, "columns") and hasattr(example, "iloc"):
        return example
    is_records = isinstance(example, list | tuple) and example and isinstance(example[0], Mapping)
    if isinstance(example, Mapping):
        return plugins.require("pandas").DataFrame(dict(example))
    return plugins.require("pandas").DataFrame(list(example)) if is_records else None


def _marked(column: Array, mark: str) -> Array:
    """Put what the estimator knows as a gap into a column of strings, in place of None."""
    if column.dtype != object or mark == "None":
        return column
    missing = np.equal(column, np.array(None, dtype=object))
    if not missing.any():
        return column
    marked = column.copy()
    marked[missing] = math.nan if mark == USUAL_MARK else plugins.require("pandas").NA
    return marked


def _frame(columns: Columns) -> Any:
    pandas = plugins.require("pandas")
    arrays = list(columns.values())
    if all(array.dtype == arrays[0].dtype and array.dtype != object for array in arrays):
        # One block instead of one per column: a tenth of the time for the common all-numeric frame.
        return pandas.DataFrame(np.column_stack(arrays), columns=list(columns))
    return pandas.DataFrame(dict(columns))


def _as_columns(result: Any) -> dict[str, Array]:
    if hasattr(result, "to_numpy"):
        result = result.to_numpy()
    if hasattr(result, "toarray"):
        raise InferenceFailed("the method returned a sparse matrix; wrap it so that it returns a dense one")
    if isinstance(result, Mapping):
        return {str(name): np.asarray(column) for name, column in result.items()}
    if isinstance(result, tuple | list) and result and all(isinstance(part, np.ndarray) for part in result):
        return {f"{SOLE_OUTPUT}_{i}": part for i, part in enumerate(result)}
    return {SOLE_OUTPUT: np.asarray(result)}
