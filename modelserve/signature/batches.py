"""Rows to columns, and a model's columns back to one value per row."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from modelserve.errors import InferenceFailed
from modelserve.signature.fields import Field
from modelserve.types import SOLE_OUTPUT, Array, Columns, Json


def stack_column(field: Field, values: tuple[Any, ...]) -> Array:
    """Turn the validated values of n rows into one array of shape ``(n, *field.shape)``."""
    if not field.shape:
        return np.array(values, dtype=field.numpy_dtype)
    if len(values) == 1:
        array: Array = values[0][np.newaxis]
        return array.copy()  # a model may work in place, and the row is still to be logged
    return np.concatenate(values).reshape(len(values), *field.shape)


def unstack(outputs: Columns, rows: int) -> list[Json]:
    """Turn a model's output columns into one plain Python value per row.

    A sole output gives bare values (lists where it has a shape), several give mappings by name. Raises
    ``InferenceFailed`` where :func:`check_outputs` does.
    """
    check_outputs(outputs, rows)
    lists: dict[str, list[Json]] = {name: column.tolist() for name, column in outputs.items()}
    if len(lists) == 1 and SOLE_OUTPUT in lists:
        return lists[SOLE_OUTPUT]
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def check_outputs(outputs: Columns, rows: int) -> None:
    """Raise ``InferenceFailed`` unless every column is an array of ``rows`` rows, of a dtype that has a JSON form."""
    if not outputs:
        raise InferenceFailed("the model answered nothing: no column")
    for name, column in outputs.items():
        if not isinstance(column, np.ndarray):
            raise InferenceFailed(f"the model answered a {type(column).__name__} in {name!r}, not an array")
        if column.ndim == 0 or len(column) != rows:
            found = "a single value" if column.ndim == 0 else f"{len(column)} rows"
            raise InferenceFailed(f"the model answered {found} for {rows} in {name!r}")
        if column.dtype.kind not in "biufUO":
            raise InferenceFailed(f"the model answered {column.dtype} in {name!r}, which has no JSON form")
        if column.dtype.kind == "O":
            _require_json(name, column)


def _require_json(name: str, column: Array) -> None:
    try:
        orjson.dumps(column.tolist(), option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise InferenceFailed(f"the model's answer in {name!r} has no JSON form: {error}") from error
