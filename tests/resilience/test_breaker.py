"""The breaker: when attempts are held back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelserve.resilience.breaker import Breaker


def made() -> Breaker:
    return Breaker(3, first_pause_s=0.5, last_pause_s=5.0)


def fail(breaker: Breaker, *times: float) -> None:
    for time in times:
        breaker.failed(time)


def test_three_failures_in_a_row_open_it_and_a_success_closes_it() -> None:
    """Two failures, or three with a success between them, change nothing; the third in a row does."""
    breaker = made()
    fail(breaker, 0.0, 1.0)
    breaker.succeeded()
    fail(breaker, 2.0, 3.0)
    assert breaker.lets_through(3.0)
    fail(breaker, 4.0)
    assert breaker.open
    assert not breaker.lets_through(4.4)
    breaker.succeeded()
    assert breaker.lets_through(4.4)


def test_what_is_late_in_one_moment_is_one_failure() -> None:
    """A stall that makes a crowd wait does not open it; three stalls in a row do, and so do three errors at once."""
    breaker = made()
    for stall in (1.0, 2.0, 3.0):
        assert not breaker.open
        for i in range(40):
            breaker.late(stall + i / 1000)
    assert breaker.open
    breaker = made()
    fail(breaker, 1.0, 1.001, 1.002)
    assert breaker.open


def test_one_attempt_after_each_growing_pause() -> None:
    """While it is open, one caller in half a second, then in one, two, four and five seconds is let through."""
    breaker, now, pauses = made(), 0.2, []
    fail(breaker, 0.0, 0.1, 0.2)
    for _ in range(6):
        began = now
        while not breaker.lets_through(now):
            now += 0.125
        assert not breaker.lets_through(now)
        pauses.append(round(now - began, 2))
        breaker.failed(now)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_an_attempt_that_never_ends_is_followed_by_another() -> None:
    """Whoever was let through and went away keeps nobody out for longer than the pause."""
    breaker = made()
    fail(breaker, 0.0, 0.1, 0.2)
    assert breaker.lets_through(0.7)
    assert not breaker.lets_through(1.1)
    assert breaker.lets_through(1.2)


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.sampled_from(["ask", "fail", "late", "succeed"])), max_size=80))
def test_it_never_holds_back_for_more_than_five_seconds(steps: list[tuple[float, str]]) -> None:
    """Whatever happened before, five quiet seconds later an attempt is let through."""
    breaker, now = made(), 0.0
    for passed, what in steps:
        now += passed
        if what == "ask":
            breaker.lets_through(now)
        elif what in {"fail", "late"}:
            breaker.failed(now) if what == "fail" else breaker.late(now)
        else:
            breaker.succeeded()
            assert breaker.lets_through(now)
    assert breaker.lets_through(now + 5.0)
