"""Whether a pool should grow or shrink: a pure function of how many rows waited.

The whole window decides, never its last sample, and after a change the pool is left alone for a while. Autoscalers
that judge by the last sample, or that forget sooner than they look back, start and stop workers in turn for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from modelserve.types import Scaling


class Sample(NamedTuple):
    """Rows that waited at one moment, and the ones refused since the sample before: they would have waited too."""

    at: float
    depth: float


def decide(
    history: Sequence[Sample], scaling: Scaling, *, replicas: int, smallest: int, largest: int, scaled_at: float
) -> Literal[-1, 0, 1]:
    """Return the change in the number of replicas that the history asks for.

    ``history`` is in order of time and its last sample is now; ``scaled_at`` is when the pool last changed
    (``-math.inf``: never). A window that the history does not cover yet decides nothing.
    """
    if not history or history[-1].at - scaled_at < scaling.cooldown_s:
        return 0
    now = history[-1].at
    if replicas < largest and mean_depth(history, since=now - scaling.out_after_s) > scaling.out_above:
        return 1
    quiet_since = now - scaling.in_after_s
    if replicas > smallest and scaled_at <= quiet_since and _peak(history, since=quiet_since) < scaling.in_below:
        return -1
    return 0


def mean_depth(history: Sequence[Sample], *, since: float) -> float:
    """Return the mean depth since then; 0 if the history does not reach back that far."""
    depths = _within(history, since)
    return sum(depths) / len(depths) if depths else 0.0


def _peak(history: Sequence[Sample], *, since: float) -> float:
    return max(_within(history, since), default=float("inf"))


def _within(history: Sequence[Sample], since: float) -> list[float]:
    if history[0].at > since:
        return []
    return [depth for at, depth in history if at >= since]
