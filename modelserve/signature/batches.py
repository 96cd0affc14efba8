"""Rows to columns, and a model's columns back to one value per row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Final

import numpy as np
import orjson

from modelserve.errors import InferenceFailed
from modelserve.signature.fields import Field
from modelserve.types import SOLE_OUTPUT, Array, Columns, Json

_OBJECTS: Final = "OT"  # kinds of arrays whose elements are Python's
_KINDS: Final = "biufU" + _OBJECTS
_DOUBLE: Final = 8  # bytes; a longer float is no float of Python's
_SCALARS: Final = frozenset({NoneType, bool, int, float, str})
_OF_SUBCLASSES: Final[tuple[tuple[type, Callable[[Any], Json]], ...]] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


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
    columns = check_outputs(outputs, rows)
    lists: dict[str, list[Json]] = {name: column.tolist() for name, column in columns.items()}
    if len(lists) == 1 and SOLE_OUTPUT in lists:
        return lists[SOLE_OUTPUT]
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def check_outputs(outputs: Columns, rows: int) -> dict[str, Array]:
    """Return a model's output columns, each an array of ``rows`` rows with a JSON form, the same wherever it ran.

    Numbers, booleans and strings stay as they are. A column of objects becomes one of plain Python values: NumPy's
    scalars and arrays are taken for what they hold, tuples for lists, and what is masked for None. Raises
    ``InferenceFailed`` for anything else: dates, bytes, complex numbers, whole numbers beyond 64 bits, keys that are
    no strings.
    """
    if not isinstance(outputs, Mapping):
        raise InferenceFailed(f"the model answered a {type(outputs).__name__}, not columns by their names")
    if not outputs:
        raise InferenceFailed("the model answered nothing: no column")
    return {_checked_name(name): _checked(name, column, rows) for name, column in outputs.items()}


def _checked_name(name: Any) -> str:
    try:
        name.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InferenceFailed(f"the model named an output {name!r}, which is no string of characters") from None
    return str(name)


def _checked(name: str, column: Any, rows: int) -> Array:
    if not isinstance(column, np.ndarray):
        raise InferenceFailed(f"the model answered a {type(column).__name__} in {name!r}, not an array")
    if column.ndim == 0 or len(column) != rows:
        found = "a single value" if column.ndim == 0 else f"{len(column)} rows"
        raise InferenceFailed(f"the model answered {found} for {rows} in {name!r}")
    if not _has_json_form(column.dtype):
        raise InferenceFailed(f"the model answered {column.dtype} in {name!r}, which has no JSON form")
    if column.dtype.kind in _OBJECTS or isinstance(column, np.ma.MaskedArray) or not column.dtype.itemsize:
        return _plain_column(name, column)
    if column.dtype.kind == "U" and not _are_characters(column):
        raise InferenceFailed(f"the model's answer in {name!r} has no JSON form: it holds what is no character")
    return column


def _has_json_form(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in _KINDS and not (dtype.kind == "f" and dtype.itemsize > _DOUBLE)


def _are_characters(column: Array) -> bool:
    """Whether no element of a column of strings holds a lone surrogate, or what lies beyond Unicode."""
    points = np.ascontiguousarray(column, column.dtype.newbyteorder("=")).view(np.uint32)
    return not ((points - np.uint32(0xD800) < 0x800).any() or (points > sys.maxunicode).any())  # noqa: PLR2004


def _plain_column(name: str, column: Array) -> Array:
    try:
        values = [_plain(value) for value in column.tolist()]
        orjson.dumps(values)
    except RecursionError as error:  # its text depends on the frame in which the stack ended
        raise InferenceFailed(f"the model's answer in {name!r} has no JSON form: it is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise InferenceFailed(f"the model's answer in {name!r} has no JSON form: {error}") from error
    return np.fromiter(values, dtype=object, count=len(values))


def _plain(value: Any) -> Json:
    """Return a value in the types that JSON gives back. Raises ``TypeError`` if it has none of them."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, np.generic | np.ndarray) and _has_json_form(value.dtype):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_plain_key(key): _plain(part) for key, part in value.items()}
    for kind, convert in _OF_SUBCLASSES:
        if isinstance(value, kind):
            return convert(value)
    raise TypeError(f"a {type(value).__name__} has none")


def _plain_key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is no string")
    return str.__str__(key)
