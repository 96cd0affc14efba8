"""The sample: a pure function of the request's id."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.ids import uuid7_source
from modelserve.monitor.log.sampling import sample_point, threshold


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_does(request_id: str, one: float, other: float) -> None:
    """Whatever is kept at one rate is kept at every higher one, all of it at 1 and nothing at 0."""
    low, high = sorted((threshold(one), threshold(other)))
    place = sample_point(request_id)
    assert not (place < low) or place < high
    assert threshold(0) <= place < threshold(1)


def test_the_share_is_that_of_the_ids() -> None:
    """Of ids made by a server, a tenth is kept at a rate of 0.1."""
    new_id = uuid7_source()
    kept = sum(sample_point(new_id()) < threshold(0.1) for _ in range(50_000))
    assert 4_700 < kept < 5_300  # four standard deviations


def test_the_place_is_the_published_one() -> None:
    """The place is CRC-32 of the id, which other programs can compute."""
    assert sample_point("123456789") == 0xCBF43926
