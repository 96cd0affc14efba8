"""How much a request can hold follows from the signature, and every request that fits it holds no more."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelserve.errors import InvalidInput
from modelserve.http.scan import Scan
from modelserve.signature import Extent, Field, refuse_unaskable

_SHORTEST = {"string": "", "bool": True, "float64": 0, "uint8": 0}
fields = st.lists(
    st.builds(
        Field,
        st.text('ab"é', min_size=1, max_size=4),
        st.sampled_from(sorted(_SHORTEST)),
        st.lists(st.integers(1, 3), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda field: field.name,
)


def shortest(field: Field, depth: int = 0) -> Any:
    """Return the value of a field that is the shortest in JSON."""
    if depth == len(field.shape):
        return _SHORTEST[field.dtype]
    return [shortest(field, depth + 1)] * field.shape[depth]


@settings(deadline=None)
@given(inputs=fields, rows=st.integers(1, 5))
def test_a_request_holds_as_much_as_is_foreseen(inputs: list[Field], rows: int) -> None:
    """The lists, objects, values, strings and bytes of the shortest request are exactly those of its extent."""
    extent = Extent.of(inputs)
    row = {field.name: shortest(field) for field in inputs}
    assert extent.least_bytes == len(orjson.dumps(row))
    body = orjson.dumps({"instances": [row] * rows})
    scan = Scan(body)
    list(scan.steps())
    most = extent.within(len(body), rows)
    assert (scan.containers, scan.values, scan.strings) == (most.containers, most.values, most.strings)


def test_features_and_keys_are_counted() -> None:
    """What a request may give itself counts for the most it holds, and only what it must give for the least."""
    alone, full = Extent.of([Field("x", "bool")]), Extent.of([Field("x", "bool")], [Field("f", "float64")], ["user"])
    assert (full.values, full.strings, full.least_bytes) == (3, 4, alone.least_bytes)


def test_few_bytes_hold_few_rows() -> None:
    """However many rows are allowed, those that fit into the bytes at hand are the most; one always is."""
    extent = Extent.of([Field("x", "uint8", (100,))])
    assert extent.within(10 * extent.least_bytes, 1024).values == 1000
    assert extent.within(10 * extent.least_bytes, 3).values == 300
    assert extent.within(1, 1024).values == 100


def test_a_signature_that_no_body_can_hold_is_refused() -> None:
    """The limit is named with the least that a request needs; one byte more would do."""
    inputs = [Field("mask", "bool"), Field("pixels", "uint8", (100, 100))]
    least = len(orjson.dumps({"inputs": {field.name: shortest(field) for field in inputs}}))
    refuse_unaskable(inputs, least)
    with pytest.raises(InvalidInput, match=rf"signature: one row has at least {least} bytes .* {least - 1} .*'pixels'"):
        refuse_unaskable(inputs, least - 1)
