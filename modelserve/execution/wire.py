"""What a host and its worker say to each other, over a stream socket and shared memory.

A frame is a header of fixed length, a text (JSON) and a block of bytes::

    host → worker   START    text: the specification of the worker
                    BATCH    text: its string columns; block: its array columns
    worker → host   READY    the model is loaded
                    REFUSED  text: why it is not
                    ANSWER   text: name, dtype, shape and place of each output column; block: the columns
                    FAILED   text: what went wrong with this batch

A block of more than ``INLINE`` bytes does not travel: it lies in an arena, and the frame says how long it is. Batches
take turns with two arenas each way, so that one can be written while the other is read. Nothing is ever unpickled, and
whatever a worker says is checked before it is believed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from modelserve.errors import InferenceFailed
from modelserve.signature import Field
from modelserve.types import Array, Columns, Json, Row

START, BATCH, READY, REFUSED, ANSWER, FAILED = range(1, 7)
INLINE: Final = 16 * 1024  # bytes; copying less than this through a socket costs no more than its system call
ARENAS: Final = 2  # each way: batches in a replica's hands
MAX_TEXT: Final = 1 << 30
MAX_BLOCK: Final = 1 << 32  # bytes of one batch; a sparse file would take more without complaint, the memory would not
_ALIGNMENT: Final = 64
_HEADER: Final = struct.Struct("<4sBxxxIIQQQd")
HEADER_BYTES: Final = _HEADER.size
_MAGIC: Final = b"msw1"
_READABLE: Final = "biufU"  # kinds of arrays that are no more than their bytes


class ProtocolError(Exception):
    """The other side does not keep to the protocol."""


class Header(NamedTuple):
    """``block`` is the length of the block in bytes, inline if that is at most ``INLINE``."""

    kind: int
    text: int
    rows: int
    block: int
    seq: int
    seconds: float

    @property
    def follows(self) -> int:
        """How many bytes follow on the socket."""
        return self.text + (self.block if self.block <= INLINE else 0)


def frame(kind: int, *, text: bytes = b"", block: bytes | bytearray = b"", **header: Any) -> bytes:
    """Put a frame together; ``header`` may give ``rows``, ``seq``, ``seconds``, and ``arena`` instead of a block."""
    length = header.get("arena") or len(block)
    rows, seq, seconds = header.get("rows", 0), header.get("seq", 0), header.get("seconds", 0.0)
    return b"".join((_HEADER.pack(_MAGIC, kind, rows, 0, len(text), length, seq, seconds), text, block))


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Read a header. Raises ``ProtocolError`` if it is none."""
    magic, kind, rows, _, text, block, seq, seconds = _HEADER.unpack_from(data)
    if magic != _MAGIC or not START <= kind <= FAILED or text > MAX_TEXT:
        raise ProtocolError("what the other side sent is no frame")
    return Header(kind, text, rows, block, seq, seconds)


# -- rows, on their way to a worker ------------------------------------------------------------------------


class RowLayout:
    """Where the values of n rows lie in a block: one array per input, known to both sides from the signature alone.

    Strings, of which no one knows the length, travel as text.
    """

    def __init__(self, inputs: Sequence[Field]) -> None:
        self._names = [field.name for field in inputs]
        self._arrays = [(i, field, _row_bytes(field)) for i, field in enumerate(inputs) if field.dtype != "string"]
        self._strings = [(i, field.shape) for i, field in enumerate(inputs) if field.dtype == "string"]

    def size(self, rows: int) -> int:
        """Return the length of the block in bytes."""
        return sum(_aligned(rows * row_bytes) for _, _, row_bytes in self._arrays)

    def write(self, rows: Sequence[Row], block: bytearray | memoryview) -> bytes:
        """Write the arrays into the block; return the text."""
        columns = list(zip(*rows, strict=True))
        for i, field, array in self._views(len(rows), block):
            if field.shape:
                np.concatenate(columns[i], out=array.reshape(-1, *field.shape[1:]))
            else:
                array[:] = columns[i]
        return self._text(columns) if self._strings else b""

    def read(self, rows: int, block: bytearray | memoryview, text: bytes | memoryview) -> dict[str, Array]:
        """Return the columns, arrays in place. Raises ``ValueError`` if block or text are too short."""
        columns: dict[str, Any] = dict.fromkeys(self._names)
        for _, field, array in self._views(rows, block):
            columns[field.name] = array
        for (i, shape), values in zip(self._strings, json.loads(bytes(text)) if self._strings else (), strict=True):
            columns[self._names[i]] = np.array(values, dtype=object).reshape(rows, *shape)
        return columns

    def _text(self, columns: Sequence[Sequence[Any]]) -> bytes:
        strings = [[each.tolist() for each in columns[i]] if shape else columns[i] for i, shape in self._strings]
        return within_limits(orjson.dumps(strings))  # a tenth of the time that json takes: the event loop waits

    def _views(self, rows: int, block: bytearray | memoryview) -> list[tuple[int, Field, Array]]:
        views, offset = [], 0
        for i, field, row_bytes in self._arrays:
            count = rows * math.prod(field.shape)
            array = np.frombuffer(block, field.numpy_dtype, count, offset).reshape(rows, *field.shape)
            views.append((i, field, array))
            offset += _aligned(rows * row_bytes)
        return views


def within_limits(text: bytes) -> bytes:
    """Return a text that a frame can carry. Raises ``InferenceFailed`` for a longer one."""
    if len(text) > MAX_TEXT:
        raise InferenceFailed(f"{len(text)} bytes of text in one batch; at most {MAX_TEXT} can be handed over")
    return text


def _row_bytes(field: Field) -> int:
    return field.numpy_dtype.itemsize * math.prod(field.shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# -- columns, on their way back ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Outputs:
    """The columns that a model answered, ready to be written: ``text`` describes them, ``size`` is the block's."""

    text: bytes
    size: int
    arrays: Sequence[tuple[int, Array]]

    def write(self, block: bytearray | memoryview) -> None:
        """Copy the columns into the block."""
        for offset, array in self.arrays:
            np.frombuffer(block, array.dtype, array.size, offset).reshape(array.shape)[...] = array


def outputs_of(columns: Columns) -> Outputs:
    """Lay out columns that :func:`modelserve.signature.check_outputs` has returned.

    Raises ``InferenceFailed`` for more of them than can be handed over.
    """
    described: list[Json] = []
    arrays: list[tuple[int, Array]] = []
    offset = 0
    for name, column in columns.items():
        if column.dtype.kind in _READABLE:
            described.append([name, column.dtype.str, column.shape, offset])
            arrays.append((offset, column))
            offset += _aligned(column.nbytes)
        else:
            described.append([name, column.tolist()])
    if offset > MAX_BLOCK:
        raise InferenceFailed(f"the model answered {offset} bytes for one batch; at most {MAX_BLOCK} can be given")
    return Outputs(within_limits(json.dumps(described).encode()), offset, arrays)


def read_outputs(text: bytes, fetch: Callable[[], bytes | memoryview]) -> Mapping[str, Array]:
    """Return the columns that a worker described, arrays in place in the block that ``fetch`` gets.

    Raises ``ProtocolError`` if the description does not fit: a worker is not trusted with the host's memory.
    """
    try:
        described = json.loads(text)
        block = fetch()
        return {column[0]: _read_column(column, block) for column in described}
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ProtocolError(f"the worker's answer does not fit its description: {error}") from error


def _read_column(column: Json, block: bytes | memoryview) -> Array:
    if len(column) == 2:  # noqa: PLR2004  # a name and plain values
        return np.fromiter(column[1], dtype=object, count=len(column[1]))
    _, name, shape, offset = column
    dtype = np.dtype(str(name))
    if dtype.kind not in _READABLE or min(shape, default=0) < 0 or offset < 0:
        raise ValueError(f"a column of {dtype} and shape {shape} at {offset}")
    return np.frombuffer(block, dtype, math.prod(shape), offset).reshape(shape)
