"""Canonical bytes: equal for equal inputs, whatever JSON they came from. :meth:`Signature.canonical` has the layout."""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from modelserve.signature.fields import FLOATS, Field

PREFIX: Final = b"ms1\0"
_NAN: Final = struct.unpack("<d", bytes.fromhex("000000000000f87f"))[0]
_NULL_STRING: Final = b"\xff\xff\xff\xff"


def header_of(field: Field) -> bytes:
    """Return the bytes that say which input follows, and of which type and shape."""
    name, dtype = field.name.encode(), field.dtype.encode()
    dimensions = struct.pack(f"<B{len(field.shape)}I", len(field.shape), *field.shape)
    return struct.pack("<I", len(name)) + name + struct.pack("<B", len(dtype)) + dtype + dimensions


def value_bytes(field: Field, value: Any) -> bytes:
    """Return the bytes of a validated value."""
    if field.dtype == "string":
        return b"".join(map(_string_bytes, value.ravel().tolist() if field.shape else (value,)))
    if field.dtype == "float64" and not field.shape:
        # Adding 0.0 turns −0.0 into 0.0 and leaves every other number as it is.
        return struct.pack("<d", _NAN if value != value else value + 0.0)  # noqa: PLR0124
    little_endian = field.numpy_dtype.newbyteorder("<")
    array = np.asarray(value, dtype=little_endian)
    if field.dtype in FLOATS:
        array = np.where(np.isnan(array), array.dtype.type(_NAN), array + array.dtype.type(0))
    return array.astype(little_endian, copy=False).tobytes()


def _string_bytes(value: str | None) -> bytes:
    if value is None:
        return _NULL_STRING
    data = value.encode()
    return struct.pack("<I", len(data)) + data
