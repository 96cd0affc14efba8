"""What a batch costs: seconds ≈ fixed + per_row · rows, learned from the batches that ran.

A shape and a scale are learned apart. The shape, how the fixed part compares with the part per row, is fitted by least
squares and changes slowly; the scale follows the last ten batches or so, because what slows down a machine slows down
every size. Three things keep that usable where a plain fit goes wrong:

- A batch that took far longer than expected (a garbage collection, a page fault, a neighbour) counts as at most
  twice its expected time, and hardly for the shape. A lasting change is still followed, some batches later.
- Load that is steady brings batches of one size, which say nothing of the shape. Part of what is forgotten is
  replaced by points on the present line, so that it is kept until other sizes are seen.
- Nothing is foretold before two sizes were seen. A line through one size is a guess, and requests were refused on
  such guesses elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_SCALE_STEP: Final = 0.1  # weight of the newest batch in the scale
_KEPT: Final = 0.95  # of the weight of the past in the shape
_SURPRISE: Final = 0.3  # a batch this far from its expected time, relatively, counts half for the shape
_ANCHOR: Final = 0.2 * (1 - _KEPT)  # weight of a point on the present line, of which there are two at each batch
_OUTLIER: Final = 2.0
_MOST: Final = 1e6  # times slower or faster than it was at first: what lies beyond is no measurement
_TICK_S: Final = 1e-5  # so that a line at zero, drawn by a coarse clock, can rise again


class CostModel:
    """Seconds that a batch of so many rows takes.

    >>> cost = CostModel()
    >>> cost.seed({1: 0.002, 11: 0.003})
    >>> round(cost.seconds(21), 6)
    0.004
    """

    __slots__ = ("_moments", "_pending", "_scale", "_shape", "fixed", "largest", "per_row")

    def __init__(self) -> None:
        self.fixed = 0.0
        """Seconds that a batch takes whatever its size."""
        self.per_row = 0.0
        """Seconds that each row adds."""
        self.largest = 0
        """Most rows seen in one batch; 0 until two sizes were seen."""
        self._shape = (0.0, 0.0)  # fixed and per_row at a scale of 1
        self._scale = 1.0
        self._pending: dict[int, float] = {}
        self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)  # weighted sums of 1, n, n², t, n·t

    @property
    def known(self) -> bool:
        """Whether batches of at least two sizes were seen."""
        return self.largest > 0

    def seconds(self, rows: int) -> float:
        """Return the expected time of a batch; 0 until it is known."""
        return self.fixed + self.per_row * rows

    def rows_within(self, seconds: float) -> float:
        """Return how many rows a batch may have to be done in so many seconds; 0 if not even one fits."""
        if seconds < self.fixed + self.per_row:
            return 0.0
        return math.inf if self.per_row == 0.0 else (seconds - self.fixed) / self.per_row

    def seed(self, seen: Mapping[int, float]) -> None:
        """Begin with measured times by number of rows, as a warm-up yields them. Later batches refine the line."""
        for rows, seconds in seen.items():
            self._add(rows, seconds, 1.0)
        if len(seen) > 1:
            self.largest = max(seen)
            self._fit()
        else:
            self._pending.update(seen)

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from one batch."""
        if not self.largest:
            self._first(rows, seconds)
            return
        expected = max(_TICK_S, self.seconds(rows))
        ratio = min(_OUTLIER, seconds / expected)
        self.largest = max(self.largest, rows)
        self._scale = min(_MOST, max(1.0 / _MOST, self._scale * (1.0 + _SCALE_STEP * (ratio - 1.0))))
        weight = (1.0 - _KEPT) / (1.0 + ((ratio - 1.0) / _SURPRISE) ** 2)
        fixed, per_row = self._shape
        self._moments = tuple(_KEPT * each for each in self._moments)  # type: ignore[assignment]  # five stay five
        self._add(rows, ratio * expected / self._scale, weight)
        self._add(1, fixed + per_row, _ANCHOR)
        self._add(self.largest, fixed + per_row * self.largest, _ANCHOR)
        self._fit()

    def _first(self, rows: int, seconds: float) -> None:
        """Remember the fastest batch of each size until there are two sizes: the first one is rarely typical."""
        self._pending[rows] = min(seconds, self._pending.get(rows, math.inf))
        if len(self._pending) > 1:
            seen, self._pending = self._pending, {}
            self._moments = (0.0, 0.0, 0.0, 0.0, 0.0)
            self.seed(seen)

    def _add(self, rows: int, seconds: float, weight: float) -> None:
        one, n, nn, t, nt = self._moments
        weighted = weight * rows
        self._moments = (
            one + weight,
            n + weighted,
            nn + weighted * rows,
            t + weight * seconds,
            nt + weighted * seconds,
        )

    def _fit(self) -> None:
        """Draw the line of least squares with neither part below zero."""
        one, n, nn, t, nt = self._moments
        spread = one * nn - n * n
        per_row = (one * nt - n * t) / spread if spread > 1e-9 * one * nn else self._shape[1]
        fixed = (t - per_row * n) / one
        if per_row < 0.0:
            per_row, fixed = 0.0, t / one
        elif fixed < 0.0:
            per_row, fixed = nt / nn, 0.0
        self._shape = (fixed, per_row)
        self.fixed, self.per_row = self._scale * fixed, self._scale * per_row
