"""Canonical bytes: equal for equal inputs, whatever JSON they came from. :meth:`Signature.canonical` has the layout.

What does not change from row to row is prepared once for a signature: neighbouring scalars are written by one call
of ``struct``, together with the headers between them.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from modelserve.signature.fields import FLOATS, Field
from modelserve.types import Row

Write: TypeAlias = Callable[[Row], bytes]

PREFIX: Final = b"ms1\0"
_NAN: Final = struct.unpack("<d", bytes.fromhex("000000000000f87f"))[0]
_NULL_STRING: Final = b"\xff\xff\xff\xff"
_CODES: Final = {
    "float16": "e", "float32": "f", "float64": "d", "bool": "?",
    "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
}  # fmt: skip


def writer(inputs: Iterable[Field]) -> Write:
    """Build what writes the canonical bytes of the validated rows of a signature."""
    ordered = sorted(enumerate(inputs), key=lambda each: each[1].name.encode())
    parts: list[Write] = []
    for are_numbers, group in groupby(ordered, key=lambda each: _is_number(each[1])):
        fields = list(group)
        parts += [_numbers_writer(fields)] if are_numbers else [_writer_of_one(*each) for each in fields]
    if len(parts) == 1:
        only = parts[0]
        return lambda row: PREFIX + only(row)
    return lambda row: PREFIX + b"".join([write(row) for write in parts])


def header_of(field: Field) -> bytes:
    """Return the bytes that say which input follows, and of which type and shape."""
    name, dtype = field.name.encode(), field.dtype.encode()
    dimensions = struct.pack(f"<B{len(field.shape)}I", len(field.shape), *field.shape)
    return struct.pack("<I", len(name)) + name + struct.pack("<B", len(dtype)) + dtype + dimensions


def _is_number(field: Field) -> bool:
    return not field.shape and field.dtype != "string"


# -- scalars that are numbers or booleans ------------------------------------------------------------------


def _numbers_writer(group: Sequence[tuple[int, Field]]) -> Write:
    headers = [header_of(field) for _, field in group]
    layout = "".join(f"{len(header)}s{_CODES[field.dtype]}" for header, (_, field) in zip(headers, group, strict=True))
    pack, blank = struct.Struct(f"<{layout}").pack, [part for header in headers for part in (header, None)]
    pick, normalise = _picker([index for index, _ in group]), _normaliser([field.dtype for _, field in group])

    def write(row: Row) -> bytes:
        arguments: list[Any] = blank.copy()
        arguments[1::2] = normalise(pick(row))
        return pack(*arguments)

    return write


def _picker(indices: list[int]) -> Callable[[Row], Sequence[Any]]:
    if len(indices) == 1:
        index = indices[0]
        return lambda row: (row[index],)
    return operator.itemgetter(*indices)


def _normaliser(dtypes: Sequence[str]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return what gives zero and NaN their one form, among values of these types."""
    floats = [place for place, dtype in enumerate(dtypes) if dtype in FLOATS]
    narrow = [_rounder(dtypes, dtype) for dtype in ("float16", "float32") if dtype in dtypes]

    def normalise(picked: Sequence[Any]) -> Sequence[Any]:
        values = list(picked)
        for round_ in narrow:
            round_(values)
        for place in floats:
            values[place] += 0.0  # turns −0.0 into 0.0 and leaves every other number as it is
        if math.isnan(sum(values)):  # one sum stands for all: it is NaN if one of them is
            for place in floats:
                if math.isnan(values[place]):
                    values[place] = _NAN
        return values

    return normalise if floats else lambda picked: picked


def _rounder(dtypes: Sequence[str], dtype: str) -> Callable[[list[Any]], None]:
    """Return what rounds the values of a narrow type to that: some become −0.0 only by that."""
    places = [place for place, each in enumerate(dtypes) if each == dtype]
    narrow = struct.Struct(f"<{len(places)}{_CODES[dtype]}")

    def round_(values: list[Any]) -> None:
        rounded = narrow.unpack(narrow.pack(*[values[place] for place in places]))
        for place, value in zip(places, rounded, strict=True):
            values[place] = value

    return round_


# -- strings, and values with a shape ----------------------------------------------------------------------


def _writer_of_one(index: int, field: Field) -> Write:
    header, encode = header_of(field), _strings if field.dtype == "string" else _tensor_encoder(field)
    return lambda row: header + encode(row[index])


def _tensor_encoder(field: Field) -> Callable[[Any], bytes]:
    little_endian = field.numpy_dtype.newbyteorder("<")
    if field.dtype not in FLOATS:
        return lambda value: np.asarray(value, dtype=little_endian).tobytes()
    zero, nan = field.numpy_dtype.type(0), field.numpy_dtype.type(_NAN)

    def encode(value: Any) -> bytes:
        array = np.asarray(value + zero, dtype=little_endian)
        if math.isnan(np.vdot(array, array)):  # squares and their sum are NaN if one of the numbers is
            array[np.isnan(array)] = nan
        return array.tobytes()

    return encode


def _strings(value: Any) -> bytes:
    return b"".join(map(_string_bytes, value.ravel().tolist() if isinstance(value, np.ndarray) else (value,)))


def _string_bytes(value: str | None) -> bytes:
    if value is None:
        return _NULL_STRING
    data = value.encode()
    return struct.pack("<I", len(data)) + data
