"""Named, typed inputs: what a request must look like, and how requests become a batch.

A :class:`Signature` is inferred from an example at registration and travels with the version. On the request
path :meth:`Signature.validate` decides in microseconds whether a request fits: a few checks over all values at
once accept the ordinary case, and only what they do not accept is examined field by field, which either
converts it (a NumPy scalar, an integral float) or names the field that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NoReturn

import numpy as np

from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.types import SOLE_OUTPUT, Array, Columns, Json, Row

_FLOATS: Final = ("float16", "float32", "float64")
_INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES: Final = (*_FLOATS, *_INTEGERS, "bool", "string")
"""The types an input can have. ``float32[3, 224, 224]`` is the type ``float32`` with a shape."""

_MAX_NAME = 256
_CANONICAL_NAN: Final = struct.unpack("<d", bytes.fromhex("000000000000f87f"))[0]
_NULL_STRING: Final = b"\xff\xff\xff\xff"


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One named input of one row.

    ``dtype`` is one of :data:`DTYPES`; ``shape`` is the shape of a single row's value, ``()`` for a scalar.
    ``nullable`` allows ``null`` (and NaN) where the model was trained on missing values: floats and strings only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    nullable: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= _MAX_NAME:
            raise InvalidInput("signature", f"an input's name is a string of 1 to {_MAX_NAME} characters: {self.name!r}")
        if self.dtype not in DTYPES:
            raise InvalidInput(self.name, f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise InvalidInput(self.name, f"shape {self.shape} must hold positive sizes of one row's value")
        if self.nullable and self.dtype not in (*_FLOATS, "string"):
            raise InvalidInput(self.name, f"{self.dtype} has no null; declare it float64 to allow missing values")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of this input's column in a batch; strings travel as objects."""
        return np.dtype(object) if self.dtype == "string" else np.dtype(self.dtype)

    def __str__(self) -> str:
        shape = f"[{', '.join(map(str, self.shape))}]" if self.shape else ""
        return f"{self.dtype}{shape}{' or null' if self.nullable else ''}"


class Signature:
    """The inputs of a model, in the order the model takes them.

    >>> signature = Signature([Field("tenure", "int64"), Field("plan", "string")])
    >>> signature.validate({"plan": "pro", "tenure": 12})
    (12, 'pro')
    >>> signature.validate({"plan": "pro", "tenure": "twelve"})
    Traceback (most recent call last):
    modelserve.errors.InvalidInput: tenure: expected int64, got a string
    """

    __slots__ = ("_examiners", "_fits", "_headers", "_names", "_pick", "inputs")

    def __init__(self, inputs: Iterable[Field]) -> None:
        self.inputs = tuple(inputs)
        if not self.inputs:
            raise InvalidInput("signature", "a model needs at least one input")
        self._names = tuple(field.name for field in self.inputs)
        if len(set(self._names)) != len(self._names):
            raise InvalidInput("signature", "two inputs have the same name")
        self._pick = _picker(self._names)
        self._fits = _acceptance(self.inputs)
        self._examiners = tuple(_examiner(field) for field in self.inputs)
        self._headers = tuple(sorted((f.name.encode(), _header(f), i, f) for i, f in enumerate(self.inputs)))

    # -- the request path ----------------------------------------------------------------------------------

    def validate(self, inputs: Any) -> Row:
        """Return the values of one request in the order of the signature, or raise ``InvalidInput`` naming the field.

        ``inputs`` maps every input's name to its value: Python or NumPy scalars, strings, (nested) lists or arrays.
        Numbers are never made from strings or booleans, nor whole numbers from fractions; ±Inf is refused.
        Values are copied: what the caller does to a list or an array afterwards does not reach the model.
        """
        if type(inputs) is not dict and not isinstance(inputs, Mapping):
            raise InvalidInput("", f"inputs must be an object that maps names to values, got {_kind(inputs)}")
        if len(inputs) != len(self._names):
            self._refuse_names(inputs)
        try:
            values = self._pick(inputs)
        except KeyError:
            self._refuse_names(inputs)
        if self._fits is not None and self._fits(values):
            return values
        return tuple(examine(value) for examine, value in zip(self._examiners, values, strict=True))

    def stack(self, rows: Sequence[Row]) -> dict[str, Array]:
        """Turn n validated rows into columns: per input an array of shape ``(n, *shape)``."""
        return {
            field.name: _stack_column(field, column)
            for field, column in zip(self.inputs, zip(*rows, strict=True), strict=True)
        }

    def canonical(self, row: Row) -> bytes:
        """Return the canonical bytes of a validated row: equal for equal inputs, whatever JSON they came from.

        Layout (all integers little-endian): ``b"ms1\\0"``, then per input in the byte order of its UTF-8 name:
        u32 length and bytes of the name, u8 length and bytes of the dtype, u8 number of dimensions, u32 per
        dimension, then the values in C order: numbers and booleans as little-endian elements with −0.0 as 0.0
        and every NaN as the quiet NaN, strings as u32 length and UTF-8 bytes (null: length 0xFFFFFFFF, no bytes).
        """
        parts = [b"ms1\0"]
        for _, header, index, field in self._headers:
            parts.append(header)
            parts.append(_canonical_value(field, row[index]))
        return b"".join(parts)

    def _refuse_names(self, inputs: Mapping[Any, Any]) -> NoReturn:
        for name in self._names:
            if name not in inputs:
                raise InvalidInput(name, "missing")
        unknown = next(name for name in inputs if name not in self._names)
        raise InvalidInput(str(unknown)[:_MAX_NAME], f"unknown input; the model takes {_listing(self._names)}")

    # -- where a signature comes from and goes to ----------------------------------------------------------

    @classmethod
    def infer(cls, example: Any) -> Signature:
        """Read the signature off example rows.

        ``example`` holds rows along axis 0: an array (one input ``x``), a DataFrame or a mapping of columns (one
        input per column), or a list of row mappings. An input is nullable when its example holds a missing value.
        Raises ``InvalidInput`` naming the column that has no servable type.
        """
        return cls(_infer_field(name, column) for name, column in columns_of(example).items())

    def rows_of(self, example: Any, limit: int | None = None) -> list[Row]:
        """Return up to ``limit`` rows of an example (of any form that :meth:`infer` takes), validated."""
        columns = columns_of(example)
        count = min(len(column) for column in columns.values())
        picked = range(count if limit is None else min(count, limit))
        return [self.validate({name: _plain(column[i]) for name, column in columns.items()}) for i in picked]

    def record(self, row: Row) -> dict[str, Json]:
        """Return a validated row as a request would carry it: plain JSON values, NaN as null."""
        return {name: _json_value(value) for name, value in zip(self._names, row, strict=True)}

    def to_json(self) -> Json:
        """Return the JSON form that the registry keeps."""
        return {"inputs": [dataclasses.asdict(field) | {"shape": list(field.shape)} for field in self.inputs]}

    @classmethod
    def from_json(cls, document: Json) -> Signature:
        """Read the form that :meth:`to_json` wrote."""
        return cls(Field(**{**field, "shape": tuple(field["shape"])}) for field in document["inputs"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.inputs == other.inputs

    def __hash__(self) -> int:
        return hash(self.inputs)

    def __repr__(self) -> str:
        return f"Signature({', '.join(f'{field.name}: {field}' for field in self.inputs)})"


# -- accepting the ordinary request, all values at once ----------------------------------------------------


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Row]:
    if len(names) == 1:
        name = names[0]
        return lambda inputs: (inputs[name],)
    return operator.itemgetter(*names)


def _acceptance(inputs: tuple[Field, ...]) -> Callable[[Row], bool] | None:
    """Build a check that is true only for rows that fit as they are; None when no row can be taken as it is."""
    if any(field.shape or field.nullable for field in inputs):
        return None
    blocks: dict[str, list[int]] = {}
    for index, field in enumerate(inputs):
        blocks.setdefault(field.dtype, []).append(index)
    checks = [(_picker_of(indices, len(inputs)), _BLOCK_CHECKS[dtype]) for dtype, indices in blocks.items()]
    if len(checks) == 1:
        return checks[0][1]
    return lambda values: all(fits(pick(values)) for pick, fits in checks)


def _picker_of(indices: list[int], size: int) -> Callable[[Row], Row]:
    if len(indices) == 1:
        index = indices[0]
        return lambda values: (values[index],)
    return operator.itemgetter(*indices) if len(indices) < size else tuple


def _float_block(limit: float) -> Callable[[Row], bool]:
    numbers = {float, int}

    def fits(values: Row) -> bool:
        # One sum stands for every value: it is finite only if none is NaN or infinite. A sum of finite values
        # that overflows is merely sent to the exact examination.
        try:
            return (
                numbers.issuperset(map(type, values))
                and math.isfinite(sum(values))
                and -limit <= min(values)
                and max(values) <= limit
            )
        except OverflowError:
            return False

    return fits


def _integer_block(low: int, high: int) -> Callable[[Row], bool]:
    integers = {int}
    return lambda values: integers.issuperset(map(type, values)) and low <= min(values) and max(values) <= high


def _bool_block(values: Row) -> bool:
    return all(type(value) is bool for value in values)


def _string_block(values: Row) -> bool:
    return all(type(value) is str and value.isascii() for value in values)


_BLOCK_CHECKS: Final[dict[str, Callable[[Row], bool]]] = {
    **{name: _float_block(float(np.finfo(name).max)) for name in _FLOATS},
    **{name: _integer_block(int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in _INTEGERS},
    "bool": _bool_block,
    "string": _string_block,
}


# -- examining one value exactly ---------------------------------------------------------------------------


def _examiner(field: Field) -> Callable[[Any], Any]:
    if not field.shape:
        return lambda value: _examine_scalar(field, value)
    if len(field.shape) == 1 and field.dtype in (*_FLOATS, *_INTEGERS):
        return _vector_examiner(field)
    return lambda value: _examine_tensor(field, value)


def _vector_examiner(field: Field) -> Callable[[Any], Array]:
    """The commonest tensor is a plain list of numbers: take it whole if all its elements fit at once."""
    fits, size, dtype = _BLOCK_CHECKS[field.dtype], field.shape[0], field.numpy_dtype

    def examine(value: Any) -> Array:
        if type(value) is list and len(value) == size and fits(tuple(value)):
            return np.array(value, dtype=dtype)
        return _examine_tensor(field, value)

    return examine


def _examine_scalar(field: Field, value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if _is_missing(value):
        return _missing(field)
    if field.dtype == "string":
        return _examine_string(field, value)
    if field.dtype == "bool":
        return value if type(value) is bool else _refuse(field, value)
    if type(value) not in (int, float):
        _refuse(field, value)
    return _examine_float(field, value) if field.dtype in _FLOATS else _examine_integer(field, value)


def _examine_string(field: Field, value: Any) -> str:
    if type(value) is not str:
        _refuse(field, value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field.name, "holds a lone surrogate, which is no character") from None
    return value


def _examine_float(field: Field, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= float(np.finfo(field.dtype).max):
        raise InvalidInput(field.name, f"must be a finite {field.dtype}")
    return number


def _examine_integer(field: Field, value: float) -> int:
    if isinstance(value, float):
        if not value.is_integer():
            raise InvalidInput(field.name, f"expected {field}, got the fraction {value!r}")
        value = int(value)
    bounds = np.iinfo(field.dtype)
    if not bounds.min <= value <= bounds.max:
        raise InvalidInput(field.name, f"out of range for {field.dtype}: {bounds.min} to {bounds.max}")
    return value


def _missing(field: Field) -> Any:
    if not field.nullable:
        raise InvalidInput(field.name, f"expected {field}, got null or NaN; the model was not registered with missing values here")
    return None if field.dtype == "string" else math.nan


def _examine_tensor(field: Field, value: Any) -> Array:
    if value is None:
        raise InvalidInput(field.name, f"expected {field}, got null")
    array = value if isinstance(value, np.ndarray) else _array_from_lists(field, value)
    if array.shape != field.shape:
        raise InvalidInput(field.name, f"expected shape {list(field.shape)}, got {list(array.shape)}")
    if field.dtype == "string":
        return _string_array(field, array)
    if array.dtype.kind not in _KINDS_INTO[field.numpy_dtype.kind]:
        raise InvalidInput(field.name, f"expected {field}, got elements of type {array.dtype}")
    return _cast_in_range(field, array)


_KINDS_INTO: Final = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}


def _array_from_lists(field: Field, value: Any) -> Array:
    if not isinstance(value, list | tuple):
        value = _as_foreign_array(field, value)
        if isinstance(value, np.ndarray):
            return value
    leaves = _leaves(field, value)
    kinds = set(map(type, leaves))
    if kinds <= {int, float}:
        return _number_array(field, leaves)
    if type(None) in kinds and field.nullable and field.dtype != "string":
        return _number_array(field, [math.nan if leaf is None else leaf for leaf in leaves])
    if kinds <= {bool} or (field.dtype == "string" and kinds <= {str, type(None)}):
        return np.array(leaves, dtype=field.numpy_dtype if field.dtype == "string" else bool).reshape(field.shape)
    if all(issubclass(kind, np.generic) for kind in kinds):
        return np.array(leaves).reshape(field.shape)
    wrong = next(leaf for leaf in leaves if not _plausible(field, leaf))
    raise InvalidInput(field.name, f"expected {field}, got {_kind(wrong)} among its elements")


def _as_foreign_array(field: Field, value: Any) -> Any:
    """Read what other libraries call an array (a tensor, a Series); anything else does not fit."""
    if hasattr(value, "__array__") and not isinstance(value, str | bytes):
        return np.asarray(value)
    return _refuse(field, value)


def _leaves(field: Field, value: Any) -> list[Any]:
    """Return the elements of nested lists whose lengths are exactly the field's shape."""
    level = [value]
    for depth, size in enumerate(field.shape):
        for part in level:
            if not isinstance(part, list | tuple | np.ndarray):
                raise InvalidInput(field.name, f"expected shape {list(field.shape)}, got {_kind(part)} at depth {depth}")
            if len(part) != size:
                raise InvalidInput(
                    field.name, f"expected shape {list(field.shape)}, got a length of {len(part)} at depth {depth}"
                )
        level = list(chain.from_iterable(level))
    return level


def _number_array(field: Field, leaves: list[Any]) -> Array:
    wanted = np.float64 if field.dtype in _FLOATS else None
    try:
        array = np.array(leaves, dtype=wanted).reshape(field.shape)
    except OverflowError:
        raise InvalidInput(field.name, f"must hold finite numbers of {field.dtype}") from None
    if wanted is None and array.dtype.kind not in "iu":
        return _integers_from_floats(field, leaves)
    return array


def _integers_from_floats(field: Field, leaves: list[Any]) -> Array:
    return np.array([_examine_integer(field, leaf) for leaf in leaves], dtype=field.dtype).reshape(field.shape)


def _cast_in_range(field: Field, array: Array) -> Array:
    if field.dtype in _INTEGERS and array.size:
        bounds = np.iinfo(field.dtype)
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            raise InvalidInput(field.name, f"out of range for {field.dtype}: {bounds.min} to {bounds.max}")
    with np.errstate(over="ignore"):
        cast = np.array(array, dtype=field.numpy_dtype, order="C")
    if field.dtype in _FLOATS:
        _refuse_non_finite(field, cast)
    return cast


def _refuse_non_finite(field: Field, array: Array) -> None:
    finite = np.isfinite(array)
    if finite.all():
        return
    if not field.nullable or np.isinf(array).any():
        where = [int(i) for i in np.argwhere(~finite)[0]]
        raise InvalidInput(field.name, f"must hold finite numbers of {field.dtype}; element {where} is not")


def _string_array(field: Field, array: Array) -> Array:
    strings = np.empty(field.shape, dtype=object)
    strings.ravel()[:] = [
        _missing(field) if _is_missing(leaf) else _examine_string(field, leaf) for leaf in array.ravel().tolist()
    ]
    return strings


def _plausible(field: Field, leaf: Any) -> bool:
    if field.dtype == "string":
        return isinstance(leaf, str)
    return type(leaf) is bool if field.dtype == "bool" else type(leaf) in (int, float)


def _refuse(field: Field, value: Any) -> NoReturn:
    raise InvalidInput(field.name, f"expected {field}, got {_kind(value)}")


def _is_missing(value: Any) -> bool:
    # NaN alone differs from itself. Only floats are asked: arrays answer with arrays, pandas.NA with itself.
    return value is None or (isinstance(value, float) and value != value)  # noqa: PLR0124


_KINDS: Final = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- rows to columns, rows to bytes ------------------------------------------------------------------------


def _stack_column(field: Field, values: tuple[Any, ...]) -> Array:
    if not field.shape:
        return np.array(values, dtype=field.numpy_dtype)
    if len(values) == 1:
        return values[0][np.newaxis]  # type: ignore[no-any-return]
    return np.concatenate(values).reshape(len(values), *field.shape)


def _header(field: Field) -> bytes:
    name, dtype = field.name.encode(), field.dtype.encode()
    dimensions = struct.pack(f"<B{len(field.shape)}I", len(field.shape), *field.shape)
    return struct.pack("<I", len(name)) + name + struct.pack("<B", len(dtype)) + dtype + dimensions


def _canonical_value(field: Field, value: Any) -> bytes:
    if field.dtype == "string":
        return b"".join(map(_canonical_string, value.ravel().tolist() if field.shape else (value,)))
    if field.dtype == "float64" and not field.shape:
        # Adding 0.0 turns −0.0 into 0.0 and leaves every other number as it is.
        return struct.pack("<d", _CANONICAL_NAN if value != value else value + 0.0)  # noqa: PLR0124
    array = np.asarray(value, dtype=field.numpy_dtype.newbyteorder("<"))
    if field.dtype in _FLOATS:
        array = np.where(np.isnan(array), array.dtype.type(_CANONICAL_NAN), array + array.dtype.type(0))
    return array.astype(field.numpy_dtype.newbyteorder("<"), copy=False).tobytes()


def _canonical_string(value: str | None) -> bytes:
    if value is None:
        return _NULL_STRING
    data = value.encode()
    return struct.pack("<I", len(data)) + data


def _json_value(value: Any) -> Json:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return None if _is_missing(value) else value


# -- reading examples --------------------------------------------------------------------------------------


def columns_of(example: Any) -> dict[str, Array]:
    """Return the columns of an example in any form that :meth:`Signature.infer` takes."""
    if isinstance(example, Mapping):
        columns = {name: np.asarray(column) for name, column in example.items()}
    elif hasattr(example, "columns") and hasattr(example, "iloc"):
        columns = {name: _frame_column(example[name]) for name in example.columns}
    elif isinstance(example, list) and example and isinstance(example[0], Mapping):
        columns = {name: _column_of_records(name, example) for name in example[0]}
    else:
        columns = {"x": np.asarray(example)}
    if not columns or any(column.ndim == 0 or len(column) == 0 for column in columns.values()):
        raise InvalidInput("example", "give at least one row: an array, a DataFrame or columns with rows along axis 0")
    return columns


def _frame_column(series: Any) -> Array:
    """Return a DataFrame's column; pandas' own dtypes become objects with None for missing."""
    if isinstance(series.dtype, np.dtype):
        return np.asarray(series)
    values = series.to_numpy(dtype=object, na_value=None)
    return np.asarray(values, dtype=object)


def _column_of_records(name: str, records: list[Mapping[str, Any]]) -> Array:
    try:
        return np.asarray([record[name] for record in records])
    except KeyError:
        raise InvalidInput("example", f"not every row has {name!r}") from None


def _infer_field(name: Any, column: Array) -> Field:
    if not isinstance(name, str):
        raise InvalidInput("example", f"column {name!r} must be named by a string")
    shape = column.shape[1:]
    if column.dtype.kind == "O":
        return _infer_object_field(name, column, shape)
    if column.dtype.kind == "U":
        return Field(name, "string", shape)
    if column.dtype.name not in DTYPES:
        hint = "; pass dates as numbers or ISO strings" if column.dtype.kind in "mM" else ""
        raise InvalidInput(name, f"{column.dtype} cannot be served{hint}")
    nullable = column.dtype.kind == "f" and bool(np.isnan(column).any())
    return Field(name, column.dtype.name, shape, nullable)


def _infer_object_field(name: str, column: Array, shape: tuple[int, ...]) -> Field:
    values = [_plain(value) for value in column.ravel().tolist()]
    kinds = {type(value) for value in values if not _is_missing(value)}
    nullable = any(map(_is_missing, values))
    if kinds == {str}:
        return Field(name, "string", shape, nullable)
    if kinds == {bool} and not nullable:
        return Field(name, "bool", shape)
    if kinds and kinds <= {int, float}:
        return Field(name, "float64" if nullable or float in kinds else "int64", shape, nullable)
    raise InvalidInput(name, f"cannot tell one type for {', '.join(sorted(kind.__name__ for kind in kinds)) or 'nulls'}")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def unstack(outputs: Columns, rows: int) -> list[Json]:
    """Turn a model's output columns into one plain Python value per row.

    A sole output gives bare values (lists where it has a shape), several give mappings by name. Raises
    ``InferenceFailed`` when a column is not an array of exactly ``rows`` rows, or holds what JSON has no form for.
    """
    lists = {name: _values_of(name, column, rows) for name, column in outputs.items()}
    if len(lists) == 1 and SOLE_OUTPUT in lists:
        return lists[SOLE_OUTPUT]
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _values_of(name: str, column: Array, rows: int) -> list[Json]:
    if column.ndim == 0 or len(column) != rows:
        found = "a single value" if column.ndim == 0 else f"{len(column)} rows"
        raise InferenceFailed(f"the model answered {found} for {rows} in {name!r}")
    if column.dtype.kind not in "biufUO":
        raise InferenceFailed(f"the model answered {column.dtype} in {name!r}, which has no JSON form")
    return column.tolist()  # type: ignore[no-any-return]
