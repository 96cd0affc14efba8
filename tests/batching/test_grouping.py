"""How many rows to run together while some of them fail: the sizes, and what they are worth."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.batching.cost import CostModel
from modelserve.batching.grouping import Grouping


def cost_of(fixed: float, per_row: float) -> CostModel:
    cost = CostModel()
    cost.seed({rows: fixed + per_row * rows for rows in (1, 16, 256)})
    return cost


def seen(share: float, rows: int = 5000) -> Grouping:
    """A grouping that has seen so large a share of bad rows, one every so many."""
    grouping = Grouping()
    every = round(1 / share)
    for _ in range(rows // every):
        grouping.passed(every - 1)
        grouping.found_a_bad_one()
    return grouping


def test_nothing_is_restricted_while_nothing_fails() -> None:
    """Without a failure the size is the largest one, and nothing takes longer than it did."""
    grouping = Grouping()
    grouping.passed(1000)
    assert not grouping.failing
    assert grouping.size(CostModel(), 256) == 256
    assert grouping.seconds_to_settle(100, cost_of(0.06, 0.0), 256) == 0.0


@pytest.mark.parametrize(
    ("share", "fixed", "per_row", "least", "most"),
    [
        (0.02, 0.06, 0.0, 18, 42),  # half of the batches run: ln 2 / share is 34
        (0.002, 0.06, 0.0, 180, 256),
        (0.2, 0.06, 0.0, 2, 4),
        (0.5, 0.06, 0.0, 1, 1),
        (0.02, 0.0, 0.001, 1, 1),  # a large batch saves nothing here
        (0.02, 0.0002, 0.001, 1, 5),
        (0.02, 0.005, 0.0002, 12, 42),
    ],
)
def test_the_size_follows_the_share_of_bad_rows_and_the_cost_of_a_batch(
    share: float, fixed: float, per_row: float, least: int, most: int
) -> None:
    """Rarer bad rows and a higher fixed part make larger batches worth it."""
    assert least <= seen(share).size(cost_of(fixed, per_row), 256) <= most


def test_batches_shrink_at_the_first_failures_and_grow_back() -> None:
    """Some failures in a row are enough to shrink; some thousand good rows later nothing is left of it."""
    cost, grouping = cost_of(0.06, 0.0), Grouping()
    grouping.found_a_bad_one()
    assert grouping.size(cost, 256) < 100
    sizes = []
    while grouping.failing:
        sizes.append(grouping.size(cost, 256))
        grouping.passed(sizes[-1])
    assert sizes == sorted(sizes)
    assert grouping.size(cost, 256) == 256
    assert sum(sizes) < 20_000


def test_a_failure_that_is_cheap_allows_larger_batches() -> None:
    """A model that refuses a bad row before it computes anything loses little by a batch that fails."""
    cost, early, late = cost_of(0.0002, 0.001), seen(0.02), seen(0.02)
    for _ in range(100):
        early.took(0.0001, 0.01)
        late.took(0.01, 0.01)
    assert early.size(cost, 256) > 3 * late.size(cost, 256)


def test_a_model_that_fails_on_everything_is_taken_for_broken() -> None:
    """Row after row that fails alone brings single rows at once, and soon the judgement that it is not the rows."""
    grouping = Grouping()
    for found in range(1, 9):
        grouping.found_a_bad_one()
        assert not grouping.broken
        grouping.failed_alone()
        assert grouping.size(cost_of(0.06, 0.0), 256) <= 64 >> 2 * (found - 1) or found > 3
    assert grouping.size(cost_of(0.06, 0.0), 256) == 1
    assert grouping.broken
    grouping.passed(1)
    assert not grouping.broken


@given(
    st.floats(0.0, 1.0), st.floats(0.0, 0.1), st.integers(1, 300), st.lists(st.integers(0, 50), min_size=1, max_size=40)
)
def test_whatever_was_seen_the_size_is_one(fixed: float, per_row: float, most: int, rows: list[int]) -> None:
    """Each history of good and bad rows gives a size within the limit, a share, and a time that is no less than 0."""
    cost, grouping = cost_of(fixed, per_row), Grouping()
    for each in rows:
        if each:
            grouping.passed(each)
        else:
            grouping.found_a_bad_one()
            grouping.failed_alone()
        assert 1 <= grouping.size(cost, most) <= most
        assert 0.0 <= grouping.share <= 1.0
        assert grouping.seconds_to_settle(10, cost, most) >= 0.0


def test_the_share_is_learned_from_some_twenty_bad_rows() -> None:
    """After a thousand random rows the share is known to within a half."""
    chance, grouping = random.Random(1), Grouping()
    for _ in range(40):
        good = next(n for n in range(10_000) if chance.random() < 0.02)
        grouping.passed(good)
        grouping.found_a_bad_one()
    assert 0.01 < grouping.share < 0.03
