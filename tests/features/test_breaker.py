"""When a store is left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.features.breaker import PAUSE_S, Breaker


def test_it_opens_after_failures_that_last() -> None:
    """Many failures at one moment are a hiccup; the same over a quarter of a second are a store that is down."""
    breaker = Breaker()
    assert not any(breaker.failed(10.0) for _ in range(100))
    assert breaker.lets_through(10.1)
    assert breaker.failed(10.25)
    assert not breaker.lets_through(10.3)


def test_it_tries_once_in_a_while_and_closes_at_the_first_success() -> None:
    """While it is open one read a second goes through; when that is answered, all do."""
    breaker = Breaker()
    for i in range(6):
        breaker.failed(i * 0.1)
    assert breaker.open
    assert [breaker.lets_through(0.5 + i * 0.25) for i in range(9)].count(True) == 2
    assert not breaker.failed(2.6)
    assert breaker.succeeded()
    assert not breaker.succeeded()
    assert breaker.lets_through(2.7)
    assert not breaker.failed(2.8)


def test_few_failures_in_a_row_do_not_open_it() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker()
    for i in range(100):
        assert not breaker.failed(i * 0.1)
        if i % 4 == 3:
            breaker.succeeded()
    assert not breaker.open


@given(st.lists(st.tuples(st.floats(0, 0.5), st.booleans()), max_size=200))
def test_an_open_one_never_lets_more_than_one_a_second_through(steps: list[tuple[float, bool]]) -> None:
    """Whatever happens, a store that is down gets one read a pause, and one that answers gets all."""
    breaker, now, tries = Breaker(), 0.0, [-10.0]
    for pause, answers in steps:
        now += pause
        was_open = breaker.open
        if not breaker.lets_through(now):
            assert was_open
            continue
        if was_open:
            assert now - tries[-1] >= PAUSE_S - 1e-9 or len(tries) == 1
            tries.append(now)
        if answers:
            breaker.succeeded()
            assert not breaker.open
            tries = [-10.0]
        else:
            breaker.failed(now)
