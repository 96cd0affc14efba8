"""Whether two answers are the same, as far as answers of different kernels can be."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.signature.comparison import outputs_match

json = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.floats(-1e6, 1e6) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(json)
def test_a_value_agrees_with_itself(value: Any) -> None:
    """Every JSON value agrees with itself after a round trip."""
    assert outputs_match(value, orjson.loads(orjson.dumps(value)))


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        (1.0, 1.00001, True),
        (1.0, 1.01, False),
        (1.0, 1, True),
        (1, 2, False),
        ("a", "b", False),
        (True, 1, False),
        ([1.0, 2.0], [1.0, 2.0000001], True),
        ([1.0], [1.0, 2.0], False),
        ({"a": 1.0}, {"b": 1.0}, False),
        ({"a": None}, {"a": 0.0}, False),
    ],
)
def test_answers_agree_but_for_the_last_digits(wanted: Any, found: Any, *, same: bool) -> None:
    """Floats may differ as kernels differ; labels, shapes and names may not."""
    assert outputs_match(wanted, found) is same


def test_the_tolerance_is_the_callers() -> None:
    """Who compares says how much may differ, relatively or absolutely."""
    assert not outputs_match([100.0], [100.1])
    assert outputs_match([100.0], [100.1], relative=1e-2)
    assert outputs_match([{"p": 0.0}], [{"p": 0.1}], absolute=0.2)
