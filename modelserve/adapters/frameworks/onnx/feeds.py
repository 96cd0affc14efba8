"""Which column of a batch goes to which input of a graph, and in what form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelserve.adapters.fitted_columns import in_fitted_order
from modelserve.adapters.frameworks.onnx.graph import Input
from modelserve.errors import InvalidInput
from modelserve.types import Array, Columns


def bind(inputs: Sequence[Input], columns: Columns, names: Sequence[str] = ()) -> dict[str, Array]:
    """Return what to feed a graph with.

    Columns go to inputs of the same name, a sole column to a sole input, and several columns of numbers side by side
    to a sole input that takes a matrix, in the order of the ``names`` that the graph has for them. Raises
    ``InvalidInput`` naming what does not fit, and the fix.
    """
    if len(inputs) == 1:
        (sole,) = inputs
        if len(columns) == 1:
            name, column = next(iter(columns.items()))
            return {sole.name: _fitted(sole, name, column)}
        if sole.rank == 2 and all(column.ndim == 1 for column in columns.values()):  # noqa: PLR2004  # (rows, inputs)
            order = in_fitted_order(names, list(columns)) if names else columns
            return {sole.name: _matrix(sole, {name: columns[name] for name in order})}
    _check_names(inputs, columns)
    return {each.name: _fitted(each, each.name, columns[each.name]) for each in inputs}


def _check_names(inputs: Sequence[Input], columns: Columns) -> None:
    names = [each.name for each in inputs]
    for name in names:
        if name not in columns:
            raise InvalidInput(
                name, f"missing: the graph takes {', '.join(names)}; name the example's columns like that"
            )
    for name in columns:
        if name not in names:
            raise InvalidInput(name, f"the graph has no such input; it takes {', '.join(names)}")


def _matrix(given: Input, columns: Columns) -> Array:
    for name, column in columns.items():
        _check_dtype(given, name, column)
    matrix = np.column_stack(list(columns.values()))
    wanted = given.shape[1] if given.shape else None
    if wanted not in {None, len(columns)}:
        raise InvalidInput(given.name, f"the graph takes {wanted} columns, got {len(columns)}: {', '.join(columns)}")
    return matrix


def _fitted(given: Input, name: str, column: Array) -> Array:
    _check_dtype(given, name, column)
    if column.ndim == 1 and given.rank == 2:  # noqa: PLR2004  # as exporters type a column of single values
        column = column.reshape(-1, 1)
    if given.shape is not None and not _fits(given.shape[1:], column.shape[1:]):
        wanted = "×".join("?" if size is None else str(size) for size in given.shape[1:]) or "a single value"
        found = "×".join(map(str, column.shape[1:])) or "a single value"
        raise InvalidInput(name, f"the graph takes rows of {wanted} here, got {found}")
    return column


def _fits(wanted: tuple[int | None, ...], found: tuple[int, ...]) -> bool:
    return len(wanted) == len(found) and all(a is None or a == b for a, b in zip(wanted, found, strict=True))


def _check_dtype(given: Input, name: str, column: Array) -> None:
    if column.dtype != given.dtype:
        wanted, found = _named(given.dtype), _named(column.dtype)
        fix = f'astype("{wanted}")' if wanted != "string" else "astype(str)"
        raise InvalidInput(name, f"the graph takes {wanted} here, got {found}; give the example as {fix}")
    if column.dtype.kind == "O" and any(type(value) is not str for value in column.flat):
        # ONNX Runtime would take the text "None" for it.
        raise InvalidInput(name, "a graph has no missing strings; fill them in before they are sent")


def _named(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "O" else dtype.name
