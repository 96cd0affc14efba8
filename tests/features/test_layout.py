"""How keys are named and values written."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import InvalidInput
from modelserve.features.layout import decoded, encoded, key_of, row_id, time_of
from modelserve.ports import NoValue
from tests.names import stable

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@given(st.one_of(SCALARS, st.lists(SCALARS.filter(lambda value: value is not None))))
def test_what_is_written_is_what_is_read(value: Any) -> None:
    """Every finite value survives exactly, the sign of zero and the last bit included."""
    assert repr(decoded(encoded({"a": value})["a"])) == repr(value)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_number_of_numpy_is_the_same_number(value: float) -> None:
    """A float32 is written as the double that equals it."""
    assert decoded(encoded({"a": np.float32(value)})["a"]) == value


def test_arrays_are_lists_and_what_is_missing_is_null() -> None:
    """NaN, pandas' NA and None are null; an array is a list."""
    values = {"nan": math.nan, "np": np.float64("nan"), "na": pd.NA, "none": None, "array": np.array([[1, 2], [3, 4]])}
    read = {name: decoded(text) for name, text in encoded(values).items()}
    assert read == {"nan": None, "np": None, "na": None, "none": None, "array": [[1, 2], [3, 4]]}


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, [1.0, math.inf], np.array([math.inf]), {"a": 1}, object(), b"bytes", 2**64, "\ud800",
     dt.datetime(2026, 1, 1, tzinfo=dt.UTC), pd.Timestamp("2026-01-01"), 1j, [None, "a", {}], (1, 2)],
    ids=stable,
)  # fmt: skip
def test_what_would_come_back_as_something_else_is_refused(value: Any) -> None:
    """The error names the feature."""
    with pytest.raises(InvalidInput) as refused:
        encoded({"avg": value})
    assert refused.value.field == "avg"


@pytest.mark.parametrize("name", ["", "_ts", "_id", 3])
def test_names_that_belong_to_the_store_are_refused(name: Any) -> None:
    """No feature may overwrite a row's time or its id."""
    with pytest.raises(InvalidInput, match="belong to the store"):
        encoded({name: 1})


def test_a_key_is_text() -> None:
    """A whole number and its digits are one entity, also as NumPy's or as a float of JSON."""
    assert {key_of("user_id", value) for value in (42, "42", np.int64(42), 42.0)} == {"42"}
    assert key_of("user_id", "a:b") == "a:b"


@pytest.mark.parametrize(
    "value", [None, True, 1.5, math.nan, math.inf, 1e300, "", "x" * 513, "\ud800", [1], {}, b"a"], ids=repr
)
def test_what_is_no_key_is_refused(value: Any) -> None:
    """The error names the entity."""
    with pytest.raises(InvalidInput) as refused:
        key_of("user_id", value)
    assert refused.value.field == "user_id"


@given(st.text(), st.text(), st.from_regex(r"[A-Za-z0-9_.-]{1,9}", fullmatch=True), st.just("g"))
def test_no_two_rows_have_one_name(key: str, other_key: str, group: str, other_group: str) -> None:
    """The name of a row tells its group and its key apart."""
    assert (row_id(group, key) == row_id(other_group, other_key)) == ((group, key) == (other_group, other_key))


def test_odd_bytes_are_no_value_and_no_time() -> None:
    """What is no JSON is unreadable, what is no finite number is no time."""
    assert decoded(None) is NoValue.MISSING
    assert [decoded(text) for text in (b"", b"\xff", b"NaN", b"{", "x")] == [NoValue.UNREADABLE] * 5
    assert [time_of(text) for text in (None, b"", b"x", b"nan", b"inf")] == [None] * 5
    assert time_of(b"1.5") == time_of("1.5") == 1.5
