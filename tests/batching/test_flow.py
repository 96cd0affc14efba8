"""What comes in and what goes out."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from modelserve.batching.flow import Flow


@given(st.integers(1, 300), st.lists(st.floats(0.001, 1.0), min_size=1, max_size=100))
def test_callers_who_come_back_are_no_overload(callers: int, pauses: list[float]) -> None:
    """A closed loop is a burst at first, and never again has more rows inside than it has callers."""
    flow, now = Flow(), 0.0
    assert not any(flow.enters(inside, now) for inside in range(1, callers + 1))
    for pause in pauses:
        now += pause
        assert not flow.enters(callers, now)


def test_more_and_more_rows_inside_are_overload_once_a_burst_is_over() -> None:
    """Each millisecond one more: that is let pass for as long as a burst lasts, and not longer."""
    flow = Flow()
    seen = [flow.enters(ms + 1, ms / 1000) for ms in range(100)]
    first = seen.index(True)
    assert first / 1000 > flow.burst_s >= (first - 1) / 1000
    assert all(seen[first:])


def test_after_a_refusal_all_calls_are_alike_for_a_moment() -> None:
    """A call that finds fewer inside than before is judged as well while calls are being refused, not later."""
    flow = Flow()
    flow.enters(10, 0.0)
    flow.refuses(0.0)
    assert flow.enters(1, 0.01)
    assert not flow.enters(1, 0.01 + 5 * flow.burst_s)


def test_what_was_inside_long_ago_is_forgotten() -> None:
    """A crowd of some time ago does not make room for an overload now."""
    flow = Flow()
    flow.enters(1000, 0.0)
    seen = [flow.enters(ms // 10, 3.0 + ms / 1000) for ms in range(1000)]
    assert any(seen)


def test_the_pace_is_that_of_the_last_moments() -> None:
    """A pace that changed is known after some tenths of a second, and none is known before rows left."""
    flow = Flow()
    assert flow.seconds(1) == math.inf
    for _ in range(100):
        flow.leave(10, 0.01)
    assert math.isclose(flow.seconds(100), 0.1)
    for _ in range(10):
        flow.leave(10, 0.1)
    assert math.isclose(flow.seconds(100), 1.0, rel_tol=0.01)


@given(st.floats(0.0, 10.0), st.floats(0.0, 1.0))
def test_a_burst_is_never_shorter_than_a_batch(objective_s: float, batch_s: float) -> None:
    """While one batch runs, callers can only come and none can leave."""
    flow = Flow()
    flow.aim(objective_s, batch_s)
    assert flow.burst_s >= batch_s
    flow.aim(math.inf, batch_s)
    assert flow.burst_s < math.inf
