"""Parsing in slices gives what parsing at once gives, wherever the text is cut, and refuses what that refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelserve.http.scan import Malformed, Scan
from modelserve.http.slices import Slices
from modelserve.signature import Pieces

windows = st.sampled_from([1, 2, 3, 5, 8, 16, 64])
names = st.sampled_from(["a", "b", ",", '"}', "x\\", "é", ""])
documents = st.recursive(
    st.sampled_from([None, True, 0, -3, 2.5, 1e300, 2**53 + 1, "", "a", "[{,", '\\"', "é,🐢", "\\"]),
    lambda children: st.lists(children, max_size=6) | st.dictionaries(names, children, max_size=5),
    max_leaves=40,
)


def read(text: bytes, window: int) -> tuple[Any, Scan]:
    """Scan and parse a text with a window of a few bytes."""
    scan = Scan(text, window)
    for _ in scan.steps():
        pass
    slices = Slices(text, scan.cuts)
    steps = slices.steps()
    try:
        while True:
            next(steps)
    except StopIteration as done:
        document = plain(done.value)
    for _ in slices.release():
        pass
    return document, scan


def plain(value: Any) -> Any:
    """Return a document without pieces and arrays."""
    if isinstance(value, Pieces | list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def same(one: Any, other: Any) -> bool:
    """Whether two documents are equal: 1 is 1.0 in JSON, and true is neither."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    numbers = {type(one), type(other)} <= {int, float}
    return bool(one == other) and (numbers or type(one) is type(other))


def counted(document: Any) -> tuple[int, int]:
    """Return how many lists and objects a document has, and how many strings, names included."""
    if isinstance(document, str):
        return 0, 1
    if not isinstance(document, list | dict):
        return 0, 0
    children = [*document, *document.values()] if isinstance(document, dict) else document
    found = [counted(child) for child in children]
    return 1 + sum(each for each, _ in found), sum(each for _, each in found)


@settings(max_examples=400, deadline=None)
@given(document=documents, window=windows, ascii_only=st.booleans())
def test_any_document_is_read_as_at_once(document: Any, window: int, *, ascii_only: bool) -> None:
    """A document is the same, and counted right, wherever it is cut."""
    text = json.dumps(document, ensure_ascii=ascii_only).encode()
    found, scan = read(text, window)
    assert same(found, orjson.loads(text))
    assert (scan.containers, scan.strings) == counted(document)


@settings(max_examples=400, deadline=None)
@given(
    document=documents,
    window=windows,
    at=st.integers(0, 400),
    cut=st.integers(0, 2),
    put=st.sampled_from([b"", b",", b"[", b"]", b"{", b"}", b'"', b"\\", b" ", b"1", b":", b'"a":1,', b"\xff"]),
)
@example(document=[1, 2], window=1, at=3, cut=0, put=b",")
@example(document=[1], window=1, at=2, cut=0, put=b",")
@example(document={"a": 1}, window=1, at=8, cut=0, put=b",{}")
def test_any_damage_is_refused_as_at_once(document: Any, window: int, at: int, cut: int, put: bytes) -> None:
    """A damaged text is refused if and only if it is no JSON any more; else it is read for what it says now."""
    text = json.dumps(document, ensure_ascii=False).encode()
    text = text[:at] + put + text[at + cut :]
    try:
        expected = orjson.loads(text)
    except orjson.JSONDecodeError:
        with pytest.raises(Malformed):
            read(text, window)
    else:
        assert same(read(text, window)[0], expected)


@pytest.mark.parametrize("window", [1, 7, 30])
def test_the_last_of_equal_names_counts(window: int) -> None:
    """A name that comes again replaces what came before, in another slice or in the same."""
    text = (
        b'{"a": [1, 2, [3, 4]], "b": {"a": 1, "a": [1, 2, 3, 4]}, "a": {"c": 1}, "b": {"a": [5], "a": {"d": [6, 7]}}}'
    )
    assert read(text, window)[0] == orjson.loads(text)


def test_depth_is_counted() -> None:
    """The depth is that of the deepest list or object, strings aside."""
    assert read(b'[{"a": ["[[[["]}, []]', 4)[1].depth == 3


def test_a_slice_is_as_long_as_its_window() -> None:
    """No slice that is parsed is longer than two windows and one value."""
    parsed = []

    def loads(text: bytes) -> Any:
        parsed.append(len(text))
        return orjson.loads(text)

    text = orjson.dumps({"instances": [{"x": list(range(50))}] * 200})
    scan = Scan(text, 256)
    steps = [*scan.steps(), *Slices(text, scan.cuts, loads).steps()]
    assert len(steps) >= 2 * len(text) // 256
    assert max(parsed) < 2 * 256 + 200


def test_numbers_are_kept_as_arrays() -> None:
    """What is left of a slice of numbers is one array: nothing that the garbage collector has to follow."""
    text = orjson.dumps([[[i, 2, 3]] * 4 for i in range(100)])
    scan = Scan(text, 512)
    list(scan.steps())
    steps = Slices(text, scan.cuts).steps()
    try:
        while True:
            next(steps)
    except StopIteration as done:
        document = done.value
    whole = [run for run in document.runs if isinstance(run, np.ndarray)]
    assert sum(map(len, whole)) > 60
    assert {run.shape[1:] for run in whole} == {(4, 3)}
