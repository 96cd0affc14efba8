"""The form of cached values: what is one, and what is none."""

from __future__ import annotations

import datetime as dt
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.caching.envelope import LARGEST, opened, payload_of, sealed

KEY = "churn:" + "5f" * 32
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def payload(value: Any) -> bytes:
    """Return the JSON of a value that has one."""
    found = payload_of(value)
    assert found is not None
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same, their types included: 1, 1.0 and True are three."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


@given(JSON)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    """Sealed and opened under one key, a value is the same, down to the types; and it is JSON that says its key."""
    whole = sealed(KEY, payload(value))
    kept = opened(KEY, whole)
    assert kept is not None
    assert same(kept.value, value)
    document = json.loads(whole)
    assert (document["modelserve"], document["key"]) == (1, KEY)


@given(JSON, st.data())
def test_a_piece_of_a_value_is_none(value: Any, data: st.DataObject) -> None:
    """Cut off anywhere, it is no value."""
    whole = sealed(KEY, payload(value))
    assert opened(KEY, whole[: data.draw(st.integers(0, len(whole) - 1))]) is None


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_value(found: bytes) -> None:
    """Whatever else lies under the key is a miss."""
    assert opened(KEY, found) is None
    assert opened(KEY, sealed(KEY, b"")[:-1] + found) is None or json.loads(sealed(KEY, b"")[:-1] + found)


@pytest.mark.parametrize(
    "found",
    [
        None,
        7,
        "text",
        sealed("churn:" + "00" * 32, b"0.5"),
        sealed(KEY, b"NaN"),
        sealed(KEY, b'0.5,"value":0.6'),
        sealed(KEY, b'0.5},{"x":1'),
        sealed(KEY, b"0.5").replace(b'"modelserve":1', b'"modelserve":2'),
        sealed(KEY, b"0.5") + b"\n",
        sealed(KEY, b"[" * 100_000),
        sealed(KEY, b"1" * (LARGEST + 1)),
        pickle.dumps(0.5),
    ],
)
def test_what_is_odd_is_no_value(found: Any) -> None:
    """Another key, another form, two values, something behind it, too much, a pickle: none is opened."""
    assert opened(KEY, found) is None


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        [1.0, math.inf],
        (1, 2),
        {1: 2},
        2**65,
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        np.float64(1.0),
        {"a": np.zeros(2)},
        b"bytes",
        "\ud800",
        object(),
        "x" * LARGEST,
    ],
)
def test_what_json_would_change_is_not_kept(value: Any) -> None:
    """An answer that would come back as something else is computed each time."""
    assert payload_of(value) is None
