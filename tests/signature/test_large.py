"""Large values are examined in steps, and come to the same end as at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.errors import InvalidInput
from modelserve.signature import Field, Pieces, Signature, large

elements = st.sampled_from([0, 1, 2.0, 0.5, -1, 255, 256, 3.4e38, 3.5e38, None, True, "a", [], [1], {"a": 1}])
dtypes = st.sampled_from(["uint8", "int64", "float32", "float64", "string", "bool"])


def prepared(signature: Signature, inputs: Any) -> tuple[Any, int]:
    """Prepare a request in steps; return it with the number of steps."""
    steps, count = signature.prepare(inputs), 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, count
        count += 1


def in_pieces(value: Any, at: int) -> Any:
    """Return a list in pieces, its numbers as arrays where they are all of a kind."""
    runs = [run for run in (value[:at], value[at:]) if run]
    return Pieces(*(np.array(run) if set(map(type, run)) in ({int}, {float}) else run for run in runs))


@settings(max_examples=300, deadline=None)
@given(values=st.lists(elements, min_size=3, max_size=5), dtype=dtypes, at=st.integers(0, 4), nullable=st.booleans())
def test_pieces_are_examined_like_a_list(values: list[Any], dtype: str, at: int, *, nullable: bool) -> None:
    """A list in pieces becomes the same array as the list, or is refused in the same words."""
    field = Field("x", dtype, (4,), nullable and dtype in {"float32", "float64", "string"})
    signature = Signature([field])
    expected, found = (outcome(signature, value) for value in (values, in_pieces(values, at)))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected, equal_nan=dtype.startswith("float"))


def outcome(signature: Signature, value: Any) -> Any:
    """Return what a value becomes, or why it is refused."""
    try:
        return signature.validate(prepared(signature, {"x": value})[0])[0]
    except InvalidInput as error:
        return str(error)


@pytest.mark.parametrize("shape", [(100_000,), (10, 100, 100), (1, 100_000), (100_000, 1), (3, 2, 20_000)])
def test_many_elements_take_several_steps(shape: tuple[int, ...]) -> None:
    """Nested lists of very many elements are examined some ten thousand at a time, whatever their shape."""
    signature = Signature([Field("x", "float32", shape), Field("y", "int64")])
    array = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    inputs, steps = prepared(signature, {"x": array.tolist(), "y": 1})
    assert array.size / large.AT_ONCE <= steps <= 100
    assert np.array_equal(signature.validate(inputs)[0], array)


def test_the_place_of_a_fault_is_that_in_the_whole() -> None:
    """What does not fit is named by its indices in the value, not in the step."""
    signature = Signature([Field("x", "uint8", (10, 100, 100))])
    value = np.zeros((10, 100, 100), int).tolist()
    value[7][31][5] = 256
    with pytest.raises(InvalidInput, match=r"x: element \[7, 31, 5\]: out of range for uint8"):
        prepared(signature, {"x": value})
    value[7][31] = [0] * 99
    with pytest.raises(InvalidInput, match=r"expected shape \[10, 100, 100\], got a length of 99 at depth 2"):
        prepared(signature, {"x": value})


def test_what_needs_no_steps_is_left_as_it_is() -> None:
    """Arrays, lists of arrays, small lists and what is no mapping go to the examination at once."""
    signature = Signature([Field("x", "float64", (3, 20_000)), Field("y", "float64", (2,))])
    for inputs in (
        {"x": np.zeros((3, 20_000)), "y": [1, 2]},
        {"x": [np.zeros(20_000)] * 3, "y": (1, 2)},
        [1],
        None,
    ):
        assert prepared(signature, inputs)[1] == 0
    assert signature.validate(prepared(signature, {"x": [np.ones(20_000)] * 3, "y": [1, 2]})[0])[0].sum() == 60_000


@pytest.mark.parametrize("inputs", [Pieces([1]), {"x": Pieces([1])}, {"x": 1.0, "z": Pieces([1])}])
def test_pieces_where_no_list_belongs_are_refused_as_lists(inputs: Any) -> None:
    """A long list in place of the inputs, of a number or of nothing known is refused as any list is."""
    signature = Signature([Field("x", "float64")])
    with pytest.raises(InvalidInput, match=r"a list|unknown input"):
        signature.validate(prepared(signature, inputs)[0])
