"""The learned cost of batches."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.batching.cost import CostModel


def seeded(fixed: float = 0.005, per_row: float = 0.0002) -> CostModel:
    cost = CostModel()
    cost.seed({rows: fixed + per_row * rows for rows in (1, 2, 4, 8, 16, 32, 64)})
    return cost


@given(st.floats(0, 1), st.floats(0, 0.1))
def test_a_line_is_recovered(fixed: float, per_row: float) -> None:
    """Times that lie on a line give that line."""
    cost = seeded(fixed, per_row)
    for rows in (1, 10, 100):
        assert cost.seconds(rows) == pytest.approx(fixed + per_row * rows, abs=1e-9)


def test_nothing_is_foretold_before_two_sizes_were_seen() -> None:
    """Batches of one size say nothing of another."""
    cost = CostModel()
    cost.seed({1: 0.1})
    for _ in range(10):
        cost.observe(1, 0.1)
        assert not cost.known
    cost.observe(2, 0.1)
    assert cost.known


def test_one_batch_that_took_for_ever_moves_the_line_by_little() -> None:
    """A pause that hits one batch is not taken for what batches cost; a change that lasts is, some batches later."""
    cost = seeded()
    before = cost.seconds(32)
    cost.observe(32, 1000 * before)
    assert cost.seconds(32) < 1.2 * before
    for _ in range(30):
        cost.observe(32, 3 * before)
    assert cost.seconds(32) == pytest.approx(3 * before, rel=0.1)


def test_steady_load_keeps_the_slope() -> None:
    """Hundreds of batches of one size leave what is known of the others nearly as it was."""
    cost, chance = seeded(), random.Random(1)
    for _ in range(500):
        cost.observe(32, (0.005 + 0.0002 * 32) * chance.lognormvariate(0, 0.1))
    assert cost.per_row == pytest.approx(0.0002, rel=0.3)
    assert cost.seconds(1) == pytest.approx(0.0052, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 1e4)), max_size=60))
def test_neither_part_is_ever_negative_or_endless(batches: list[tuple[int, float]]) -> None:
    """Whatever is observed, the line stays usable."""
    cost = CostModel()
    for rows, seconds in batches:
        cost.observe(rows, seconds)
        assert 0 <= cost.fixed < math.inf
        assert 0 <= cost.per_row < math.inf


@given(st.floats(0.001, 0.1), st.floats(0.0001, 0.01), st.integers(1, 500))
def test_rows_within_is_the_inverse_of_seconds(fixed: float, per_row: float, rows: int) -> None:
    """As many rows as fit a time take that time."""
    cost = seeded(fixed, per_row)
    assert cost.rows_within(cost.seconds(rows)) == pytest.approx(rows, rel=1e-6)
    assert cost.rows_within(cost.seconds(1) / 2) == 0


def test_thousands_of_batches_that_take_no_time_leave_it_sound() -> None:
    """A clock too coarse to see any batch does no harm, and what is measured later counts again."""
    cost = seeded()
    for _ in range(10_000):
        cost.observe(8, 0.0)
    for _ in range(400):
        cost.observe(8, 0.01)
    assert cost.seconds(8) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_steady_noisy_load_keeps_what_is_known_of_other_sizes(most: int) -> None:
    """Twenty thousand small batches, some of them late, leave what a large one costs as the warm-up found it."""
    cost, chance = CostModel(), random.Random(1)
    cost.seed({1: 240e-6, 8: 241e-6, 64: 250e-6, 256: 280e-6})
    for _ in range(20_000):
        late = 3.0 if chance.random() < 0.02 else 1.0
        cost.observe(chance.randint(1, most), 240e-6 * late * chance.lognormvariate(0, 0.15))
    assert cost.seconds(1) == pytest.approx(245e-6, rel=0.15)
    assert cost.seconds(64) == pytest.approx(250e-6, rel=0.15)


def test_a_shape_that_changed_is_learned_from_batches_of_several_sizes() -> None:
    """When rows begin to cost ten times as much and the rest twice as much, some hundreds of batches show it."""
    cost, chance = seeded(0.005, 0.0002), random.Random(1)
    for _ in range(1000):
        rows = chance.choice((1, 4, 16, 64))
        cost.observe(rows, (0.01 + 0.002 * rows) * chance.lognormvariate(0, 0.1))
    for rows in (1, 16, 64):
        assert cost.seconds(rows) == pytest.approx(0.01 + 0.002 * rows, rel=0.25)
