"""Examining one value exactly: it is converted without loss, or its field is named with what is wrong."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np

from modelserve.errors import InvalidInput
from modelserve.signature.acceptance import BLOCK_CHECKS
from modelserve.signature.fields import FLOATS, INTEGERS, Field
from modelserve.signature.pieces import Examined, Pieces
from modelserve.types import Array

Examine: TypeAlias = Callable[[Any], Any]

TIMES: Final = "mM"
"""The kinds of NumPy's dates and durations."""
_NUMBERS: Final = (int, float)
_SHORT: Final = 1024  # elements: what is worth passing as arguments
# The kinds of arrays that are taken whole; what else may fit is examined element by element.
_KINDS_INTO: Final = {"f": "fiu", "i": "iu", "u": "iu", "b": "b", "O": ""}


def examiner(field: Field) -> Examine:
    """Return what turns a request's value for ``field`` into the row's value, or raises ``InvalidInput``."""
    return _tensor_examiner(field) if field.shape else _scalar_examiner(field)


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or pandas.NA, which is told by its type's name without pandas."""
    # NaN alone differs from itself. Only floats are asked: arrays answer with arrays, pandas.NA with itself.
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"  # noqa: PLR0124


def plain(value: Any) -> Any:
    """Return a NumPy scalar as the Python value it holds; a time as it is, which in nanoseconds would be a number."""
    return value.item() if isinstance(value, np.generic) and value.dtype.kind not in TIMES else value


def kind_of(value: Any) -> str:
    """Return what a caller would call a value of this type."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS: Final = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a list",
    Pieces: "a list",
    dict: "an object",
}


# -- scalars -----------------------------------------------------------------------------------------------


def _scalar_examiner(field: Field) -> Examine:
    convert = _converter(field)

    def examine(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        value = plain(value)
        return _missing(field) if is_missing(value) else convert(value)

    return examine


def _converter(field: Field) -> Examine:
    if field.dtype in FLOATS:
        return _float_converter(field)
    if field.dtype in INTEGERS:
        return _integer_converter(field)
    return _string_converter(field) if field.dtype == "string" else _bool_converter(field)


def _float_converter(field: Field) -> Examine:
    limit = float(np.finfo(field.dtype).max)

    def convert(value: Any) -> float:
        if type(value) not in _NUMBERS:
            _refuse(field, value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not -limit <= number <= limit:
            raise InvalidInput(field.name, f"must be a finite {field.dtype}, within ±{limit:.5g}")
        return number

    return convert


def _integer_converter(field: Field) -> Examine:
    low, high = int(np.iinfo(field.dtype).min), int(np.iinfo(field.dtype).max)

    def convert(value: Any) -> int:
        if type(value) not in _NUMBERS:
            _refuse(field, value)
        if isinstance(value, float) and not value.is_integer():
            raise InvalidInput(field.name, f"expected {field}, got the fraction {value!r}")
        if not low <= value <= high:
            raise InvalidInput(field.name, f"out of range for {field.dtype}: {low} to {high}")
        return int(value)

    return convert


def _string_converter(field: Field) -> Examine:
    def convert(value: Any) -> str:
        if type(value) is not str:
            _refuse(field, value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInput(field.name, "holds a lone surrogate, which is no character") from None
        return value

    return convert


def _bool_converter(field: Field) -> Examine:
    return lambda value: value if type(value) is bool else _refuse(field, value)


def _missing(field: Field) -> Any:
    if not field.nullable:
        problem = f"expected {field}, got null or NaN; the model was not registered with missing values here"
        raise InvalidInput(field.name, problem)
    return None if field.dtype == "string" else math.nan


def _refuse(field: Field, value: Any) -> NoReturn:
    raise InvalidInput(field.name, f"expected {field}, got {kind_of(value)}")


# -- values with a shape -----------------------------------------------------------------------------------


def _tensor_examiner(field: Field) -> Examine:
    fits, dtype, examine_elements = BLOCK_CHECKS[field.dtype], field.numpy_dtype, ElementExaminer(field)
    flat_size = field.shape[0] if len(field.shape) == 1 else None
    take = _list_reader(field)

    def examine(value: Any) -> Array:
        # The commonest tensor is a plain list of numbers: take it whole if all its elements fit at once.
        if type(value) is list and len(value) == flat_size and fits(value):
            return take(value)
        if type(value) is Examined and value.field == field:
            return value.array
        array = _as_array(field, value)
        if array is not None and array.dtype.kind in _KINDS_INTO[dtype.kind]:
            return _cast_in_range(field, array)
        elements = flattened(field, [value], 0) if array is None else array.ravel().tolist()
        if not fits(elements):
            elements = examine_elements(elements)
        return np.array(elements, dtype=dtype).reshape(field.shape)

    return examine


def _list_reader(field: Field) -> Callable[[list[Any]], Array]:
    """Return what makes an array of a list that fits: for short lists of doubles in half the time of ``np.array``."""
    dtype, size = field.numpy_dtype, math.prod(field.shape)
    if field.dtype == "float64" and size <= _SHORT:
        pack = struct.Struct(f"={size}d").pack
        return lambda value: np.frombuffer(pack(*value))
    return lambda value: np.array(value, dtype=dtype)


def _as_array(field: Field, value: Any) -> Array | None:
    """Read an array of the field's shape, or a list of arrays, or another library's; None for lists of elements."""
    if isinstance(value, list | tuple):
        if not _same_arrays(value):
            return None
        value = np.stack(value)
    elif not isinstance(value, np.ndarray):
        value = _as_foreign_array(field, value)
    if value.dtype.kind in TIMES:
        raise InvalidInput(field.name, f"expected {field}, got {value.dtype}; give numbers or ISO strings")
    if value.shape != field.shape:
        raise InvalidInput(field.name, f"expected shape {list(field.shape)}, got {list(value.shape)}")
    return value  # type: ignore[no-any-return]


def _same_arrays(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, np.ndarray) for part in parts) and len({part.shape for part in parts}) == 1


def _as_foreign_array(field: Field, value: Any) -> Any:
    """Read what other libraries call an array (a tensor, a Series); anything else does not fit."""
    if not hasattr(value, "__array__"):
        _refuse(field, value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(field.name, f"{kind_of(value)} that cannot be read as an array: {error}") from error


def flattened(field: Field, parts: list[Any], depth: int) -> list[Any]:
    """Return the elements of nested lists, each as long as the field's shape says from ``depth`` on."""
    for below in range(depth, len(field.shape)):
        for part in parts:
            check_length(field, part, below)
        parts = list(chain.from_iterable(parts))
    return parts


def check_length(field: Field, part: Any, depth: int) -> None:
    """Raise ``InvalidInput`` unless this is a list of the field's size at ``depth``."""
    if not isinstance(part, list | tuple | Pieces) and not (isinstance(part, np.ndarray) and part.ndim):
        raise InvalidInput(field.name, f"expected shape {list(field.shape)}, got {kind_of(part)} at depth {depth}")
    if len(part) != field.shape[depth]:
        problem = f"expected shape {list(field.shape)}, got a length of {len(part)} at depth {depth}"
        raise InvalidInput(field.name, problem)


class ElementExaminer:
    """Examines elements of a field with a shape one by one, and names the place of one that does not fit."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._examine = _scalar_examiner(dataclasses.replace(field, shape=()))

    def __call__(self, elements: list[Any], first: int = 0) -> list[Any]:
        """Return the elements as the field takes them; ``first`` is the place of the first one, in C order."""
        values: list[Any] = []
        try:
            for element in elements:
                values.append(self._examine(element))  # noqa: PERF401  # the count says which element was wrong
        except InvalidInput as error:
            where = [int(index) for index in np.unravel_index(first + len(values), self._field.shape)]
            raise InvalidInput(self._field.name, f"element {where}: {error.problem}") from None
        return values


def _cast_in_range(field: Field, array: Array) -> Array:
    """Copy an array of numbers or booleans into the field's dtype; nothing wraps around or becomes infinite."""
    if field.dtype in INTEGERS:
        bounds = np.iinfo(field.dtype)
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            raise InvalidInput(field.name, f"out of range for {field.dtype}: {bounds.min} to {bounds.max}")
    if array.dtype == field.numpy_dtype:
        cast = np.array(array, order="C")
    else:
        with np.errstate(over="ignore"):
            cast = np.array(array, dtype=field.numpy_dtype, order="C")
    if field.dtype in FLOATS and not np.isfinite(cast).all():
        _refuse_non_finite(field, cast)
    return cast


def _refuse_non_finite(field: Field, array: Array) -> None:
    refused = np.isinf(array) if field.nullable else ~np.isfinite(array)
    if refused.any():
        where = [int(index) for index in np.argwhere(refused)[0]]
        raise InvalidInput(field.name, f"element {where}: must be a finite {field.dtype}")
