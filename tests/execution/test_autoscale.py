"""When a pool grows and shrinks."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.execution.autoscale import Sample, decide
from modelserve.types import Scaling

SCALING = Scaling()
TICK_S = 0.5


def history(*stretches: tuple[float, float]) -> list[Sample]:
    """Return samples every half second: so many seconds at such a depth, one stretch after the other."""
    samples: list[Sample] = []
    for seconds, depth in stretches:
        for _ in range(int(seconds / TICK_S)):
            samples.append(Sample(len(samples) * TICK_S, depth))
    return samples


def change(samples: list[Sample], replicas: int = 2, scaled_at: float = -math.inf) -> int:
    return decide(samples, SCALING, replicas=replicas, smallest=1, largest=3, scaled_at=scaled_at)


def test_more_than_fifty_waiting_rows_bring_a_replica() -> None:
    """Sustained depth above the threshold scales out, up to the most."""
    assert change(history((10, 51))) == 1
    assert change(history((10, 51)), replicas=3) == 0
    assert change(history((10, 49))) == 0


def test_three_minutes_of_quiet_take_one_away() -> None:
    """Depth below the threshold for the whole time scales in, down to the fewest."""
    assert change(history((182, 4))) == -1
    assert change(history((182, 4)), replicas=1) == 0
    assert change(history((170, 4))) == 0
    assert change(history((100, 4), (1, 30), (81, 4))) == 0


def test_a_single_sample_decides_nothing() -> None:
    """Neither a spike nor a quiet moment is a reason."""
    assert change(history((10, 0), (0.5, 200))) == 0
    assert change(history((300, 30), (0.5, 0))) == 0
    assert change(history((0.5, 1000))) == 0
    assert change([]) == 0


def test_after_a_change_the_pool_rests() -> None:
    """Within the cool-down nothing is changed, and an in waits for a quiet time of its own."""
    samples = history((100, 80))
    assert change(samples, scaled_at=samples[-1].at - 29) == 0
    assert change(samples, scaled_at=samples[-1].at - 30) == 1
    quiet = history((200, 0))
    assert change(quiet, scaled_at=quiet[-1].at - 100) == 0


@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(0, 300)), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_it_never_flaps_and_never_leaves_its_bounds(
    stretches: list[tuple[int, float]], smallest: int, room: int
) -> None:
    """Whatever the depth does: no two changes within the cool-down, no in within its window of any change."""
    replicas, scaled_at = smallest, -math.inf
    changes: list[tuple[float, int]] = []
    seen: list[Sample] = []
    for sample in history(*stretches):
        seen = [each for each in seen if each.at >= sample.at - SCALING.in_after_s - 1] + [sample]
        step = decide(seen, SCALING, replicas=replicas, smallest=smallest, largest=smallest + room, scaled_at=scaled_at)
        if step:
            changes.append((sample.at, step))
            replicas, scaled_at = replicas + step, sample.at
        assert smallest <= replicas <= smallest + room
    for (before, _), (after, direction) in itertools.pairwise(changes):
        assert after - before >= (SCALING.cooldown_s if direction > 0 else SCALING.in_after_s)


@given(st.lists(st.floats(5, 50), min_size=1, max_size=500))
def test_between_the_thresholds_nothing_changes(depths: list[float]) -> None:
    """Load that is neither high nor low is what the pool is for."""
    assert change([Sample(i * TICK_S, depth) for i, depth in enumerate(depths)]) == 0


@pytest.mark.parametrize(
    "nonsense", [{"out_above": 3}, {"in_below": -1}, {"cooldown_s": -1}, {"in_after_s": -1}, {"in_below": 50}]
)
def test_thresholds_that_make_no_sense_are_refused(nonsense: dict[str, float]) -> None:
    """A pool that grew and shrank at the same depth would never rest."""
    with pytest.raises(ValueError, match=r"in_below|negative"):
        Scaling(**nonsense)
