"""What the database can keep."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import InvalidInput
from modelserve.registry.values import check_text, plain_json


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_no_database_keeps_is_refused(text: str) -> None:
    """NUL and lone surrogates are refused before a database sees them."""
    with pytest.raises(InvalidInput) as caught:
        check_text("reason", text)
    assert caught.value.field == "reason"


def test_other_text_is_free() -> None:
    """A reason may be written in any language, over several lines."""
    check_text("reason", "слишком медленно\n遅い 🐢")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_is_kept_as_it_is(value: Any) -> None:
    """What JSON can say comes back unchanged."""
    assert plain_json("metrics", value) == value


def test_near_json_becomes_json() -> None:
    """Numpy's numbers, tuples and read-only mappings turn into what JSON has for them."""
    value = types.MappingProxyType({"auc": np.float32(0.5), "rows": np.int64(7), "ok": np.True_, "p": (1, 2)})
    assert plain_json("metrics", value) == {"auc": 0.5, "rows": 7, "ok": True, "p": [1, 2]}


@pytest.mark.parametrize("value", [float("nan"), np.float64("inf"), {1, 2}, object(), {("a", "b"): 1}, b"bytes"])
def test_what_is_not_json_is_refused(value: object) -> None:
    """The field is named instead of storing something else in the value's place."""
    with pytest.raises(InvalidInput) as caught:
        plain_json("metrics", {"value": value})
    assert caught.value.field == "metrics"


def test_endless_json_is_refused() -> None:
    """A structure that holds itself has no end."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidInput):
        plain_json("metrics", value)
