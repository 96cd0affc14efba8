"""Reading example rows: their columns, and the type of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelserve.errors import InvalidInput
from modelserve.signature.examination import is_missing, plain
from modelserve.signature.fields import DTYPES, Field
from modelserve.signature.forms import are_records, is_frame
from modelserve.types import Array, Json


def columns_of(example: Any, *, least: int = 1) -> dict[str, Array]:
    """Return the columns of an example in any form that :meth:`Signature.infer` takes.

    Raises ``InvalidInput`` unless they are columns of ``least`` rows or more, all of the same length.
    """
    columns = _columns_of(example)
    if not columns or any(column.ndim == 0 or len(column) < least for column in columns.values()):
        raise InvalidInput("example", "give at least one row: an array, a DataFrame or columns with rows along axis 0")
    rows = len(next(iter(columns.values())))
    for name, column in columns.items():
        if len(column) != rows:
            raise InvalidInput(str(name), f"this column of the example has {len(column)} rows, the first has {rows}")
    return columns


def _columns_of(example: Any) -> dict[str, Array]:
    if isinstance(example, Mapping):
        return {name: _column(name, column) for name, column in example.items()}
    if is_frame(example):
        return _frame_columns(example)
    if are_records(example):
        return {name: _column(name, _of_records(name, example)) for name in example[0]}
    return {"x": _column("example", example)}


def _frame_columns(frame: Any) -> dict[str, Array]:
    if not frame.columns.is_unique:
        repeated = frame.columns[frame.columns.duplicated()][0]
        raise InvalidInput("example", f"two columns are named {repeated!r}")
    return {name: _column(name, frame[name]) for name in frame.columns}


def _of_records(name: str, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    for record in records:
        if not isinstance(record, Mapping):
            raise InvalidInput("example", f"not every row is a mapping: {record!r:.40}")
        if record.keys() != records[0].keys():
            odd = next(iter(record.keys() ^ records[0].keys()))
            raise InvalidInput("example", f"not every row has {odd!r}")
    return [record[name] for record in records]


def _column(name: Any, values: Any) -> Array:
    if np.ma.is_masked(values):
        raise InvalidInput(str(name), "a masked array; fill in what is masked: array.filled(np.nan)")
    try:
        if hasattr(values, "isna") and not isinstance(values.dtype, np.dtype):
            return _extension_column(values)
        array = np.asarray(values)
        if isinstance(values, list | tuple) and _would_mix(array, values):
            array = np.asarray(values, dtype=object)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(str(name), f"cannot be read as rows along axis 0: {error}") from error
    return array


def _would_mix(array: Array, values: Sequence[Any]) -> bool:
    """Whether NumPy would settle on one type for elements of several: 1 and "a" become strings, True and 2 numbers."""
    return array.dtype.kind in "US" or (array.ndim == 1 and len(set(map(type, values))) > 1)


def _extension_column(series: Any) -> Array:
    """Read a column of pandas' own dtypes: numbers keep their width, the rest become objects with pandas' gaps."""
    dtype = getattr(series.dtype, "numpy_dtype", None)
    missing = bool(series.isna().any())
    if isinstance(dtype, np.dtype) and dtype.kind in "iufb" and (not missing or dtype.kind == "f"):
        return np.asarray(series.to_numpy(dtype=dtype, na_value=np.nan) if missing else series.to_numpy(dtype=dtype))
    return np.asarray(series.astype(object), dtype=object)


def marks_in(column: Array) -> frozenset[str]:
    """Return what stands for missing values in a column of an example: any of :data:`MARKS`; numbers have none."""
    if column.dtype.kind != "O":
        return frozenset()
    return frozenset(_mark(value) for value in column.ravel().tolist() if is_missing(value))


def with_mark(field: Field, column: Array) -> Field:
    """Return the input with what stands for its missing strings, where a column of an example has one such mark."""
    marks = marks_in(column)
    return dataclasses.replace(field, missing=min(marks)) if field.dtype == "string" and len(marks) == 1 else field


def _mark(missing: Any) -> str:
    if missing is None:
        return "None"
    return "NaN" if isinstance(missing, float) else "NA"


# -- the type of a column ----------------------------------------------------------------------------------


def infer_field(name: Any, column: Array) -> Field:
    """Return the input that a column of an example stands for. Raises ``InvalidInput`` naming it if there is none."""
    if not isinstance(name, str):
        raise InvalidInput("example", f"column {name!r} must be named by a string")
    shape = column.shape[1:]
    if column.dtype.kind == "O":
        return _infer_object_field(name, column, shape)
    if column.dtype.kind in "UT":
        return Field(name, "string", shape)
    if column.dtype.name not in DTYPES:
        hint = "; pass dates as numbers or ISO strings" if column.dtype.kind in "mM" else ""
        raise InvalidInput(name, f"{column.dtype} cannot be served{hint}")
    nullable = column.dtype.kind == "f" and bool(np.isnan(column).any())
    return Field(name, column.dtype.name, shape, nullable)


def _infer_object_field(name: str, column: Array, shape: tuple[int, ...]) -> Field:
    values = [plain(value) for value in column.ravel().tolist()]
    kinds = {type(value) for value in values if not is_missing(value)}
    nullable = any(map(is_missing, values))
    if kinds == {str}:
        return Field(name, "string", shape, nullable)
    if kinds == {bool}:
        return Field(name, "bool", shape, nullable)
    if kinds and kinds <= {int, float}:
        return Field(name, "float64" if nullable or float in kinds else "int64", shape, nullable)
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nulls"
    raise InvalidInput(name, f"cannot tell one type for {found}")


# -- single values -----------------------------------------------------------------------------------------


def json_value(value: Any) -> Json:
    """Return a validated value as JSON carries it."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [json_value(part) for part in value]
    return None if is_missing(value) else value
