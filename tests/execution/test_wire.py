"""What a host and its worker say to each other."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.execution import wire
from modelserve.execution.arena import Arena
from modelserve.signature import Field

RANGES = {
    "int8": (-(2**7), 2**7 - 1),
    "uint16": (0, 2**16 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint64": (0, 2**64 - 1),
}


def values(field: Field) -> st.SearchStrategy[Any]:
    """Return what a validated value of this field may be."""
    if field.dtype == "string":
        scalars: st.SearchStrategy[Any] = st.none() | st.text()
    elif field.dtype == "bool":
        scalars = st.booleans()
    elif field.dtype in RANGES:
        scalars = st.integers(*RANGES[field.dtype])
    else:
        scalars = st.floats(width=32 if field.dtype == "float32" else 64)
    if not field.shape:
        return scalars
    count = math.prod(field.shape)
    return st.lists(scalars, min_size=count, max_size=count).map(
        lambda flat: np.array(flat, dtype=field.numpy_dtype).reshape(field.shape)
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Field], list[tuple[Any, ...]]]:
    """Draw a signature and rows that fit it."""
    dtypes = draw(st.lists(st.sampled_from([*RANGES, "bool", "float32", "float64", "string"]), min_size=1, max_size=5))
    shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    fields = [Field(f"f{i}", dtype, draw(shapes), nullable=dtype == "string") for i, dtype in enumerate(dtypes)]
    return fields, draw(st.lists(st.tuples(*map(values, fields)), min_size=1, max_size=5))


@given(batches())
def test_rows_arrive_as_the_columns_that_they_are(batch: tuple[list[Field], list[tuple[Any, ...]]]) -> None:
    """Writing rows and reading columns is the identity for every type, shape and value, strange ones too."""
    fields, rows = batch
    layout = wire.RowLayout(fields)
    block = bytearray(layout.size(len(rows)))
    text = layout.write(rows, block)
    columns = layout.read(len(rows), block, text)
    assert list(columns) == [field.name for field in fields]
    for i, field in enumerate(fields):
        column = columns[field.name]
        assert column.dtype == field.numpy_dtype
        assert column.shape == (len(rows), *field.shape)
        expected = np.array([row[i] for row in rows], dtype=field.numpy_dtype).reshape(column.shape)
        assert (
            column.tolist() == expected.tolist() if field.dtype == "string" else column.tobytes() == expected.tobytes()
        )


@given(
    st.dictionaries(st.text(max_size=5), st.sampled_from(["f4", "f8", "i8", "u1", "?", "U7"]), max_size=4),
    st.integers(0, 5),
)
def test_outputs_arrive_as_they_were(columns: dict[str, str], rows: int) -> None:
    """Describing, writing and reading outputs is the identity."""
    chance = np.random.default_rng(1)
    answered = {name: chance.integers(0, 2, (rows, 2)).astype(dtype) for name, dtype in columns.items()}
    outputs = wire.outputs_of(answered)
    block = bytearray(outputs.size)
    outputs.write(block)
    found = wire.read_outputs(outputs.text, lambda: bytes(block))
    assert found.keys() == answered.keys()
    assert all(np.array_equal(found[name], answered[name]) for name in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["<f8", "|O", "f8,O", "<U3", "V8", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
DESCRIBED = st.lists(
    st.tuples(
        st.text(max_size=3),
        st.sampled_from(["<f8", "|O", "<i4", "f8,O", "<U3", "|S4", "<M8[s]", "<c16", "", "nonsense"]),
        st.lists(st.integers(-3, 2**70) | st.floats(), max_size=3) | JSON,
        st.integers(-100, 100) | st.integers(-(2**70), 2**70) | JSON,
    ).map(list),
    max_size=3,
)


@given(
    DESCRIBED.map(json.dumps).map(str.encode) | JSON.map(json.dumps).map(str.encode) | st.binary(),
    st.binary(max_size=200),
)
def test_whatever_a_worker_says_is_an_answer_or_a_protocol_error(text: bytes, block: bytes) -> None:
    """No description makes the host read outside of a block, or take bytes for Python objects."""
    try:
        found = wire.read_outputs(text, lambda: block)
    except wire.ProtocolError:
        return
    for column in found.values():
        assert column.dtype != object or column.base is None
        assert column.dtype == object or column.nbytes <= len(block)


@given(st.binary(min_size=wire.HEADER_BYTES, max_size=wire.HEADER_BYTES))
def test_bytes_that_are_no_header_are_refused(data: bytes) -> None:
    """A frame begins with its mark and a known kind."""
    if data[:4] == b"msw1":
        return
    with pytest.raises(wire.ProtocolError):
        wire.parse_header(data)


def test_a_frame_says_what_follows() -> None:
    """Small blocks travel in the frame, large ones are only announced."""
    small = wire.frame(wire.ANSWER, text=b"text", block=b"block", seq=7, rows=3, seconds=0.5)
    header = wire.parse_header(small)
    assert (header.kind, header.seq, header.rows, header.seconds) == (wire.ANSWER, 7, 3, 0.5)
    assert header.follows == len(small) - wire.HEADER_BYTES == 9
    large = wire.parse_header(wire.frame(wire.BATCH, text=b"t", arena=10**6))
    assert (large.block, large.follows) == (10**6, 1)


def test_an_arena_is_read_by_the_other_side_and_grows() -> None:
    """What one side writes the other reads; views from before a growth stay valid; no descriptor is left."""
    writer = Arena.create()
    reader = Arena(os.dup(writer.fd))
    old = writer.block(1000)
    old[:3] = b"old"
    assert bytes(reader.read(1000)[:3]) == b"old"
    writer.block(5_000_000)[-3:] = b"new"
    assert bytes(reader.read(5_000_000)[-3:]) == b"new"
    assert bytes(old[:3]) == b"old"
    with pytest.raises(ValueError, match="does not hold"):
        reader.read(50_000_000)
    if hasattr(os, "memfd_create"):
        with pytest.raises(PermissionError):
            os.ftruncate(writer.fd, 0)
    for arena in (writer, reader):
        arena.close()
        arena.close()
        assert arena.fd == -1


def test_strings_cross_as_utf_8() -> None:
    """A text takes the room of its UTF-8: to write it as escapes would hold the loop ten times as long."""
    layout, texts = wire.RowLayout([Field("x", "string")]), ["é" * 1000, "鋼" * 1000, "a" * 1000]
    written = layout.write([(text,) for text in texts], bytearray())
    assert len(written) < sum(len(text.encode()) for text in texts) + 20
    assert layout.read(3, bytearray(), written)["x"].tolist() == texts
