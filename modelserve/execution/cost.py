"""What a batch costs: seconds ≈ fixed + per_row · rows, learned from the batches that ran.

Least squares with exponential forgetting. Three things keep it usable where a plain fit goes wrong:

- A batch that took far longer than expected (a garbage collection, a page fault, a neighbour) counts as at most
  three times its expected time. A lasting change is still followed, a few batches later.
- Load that is steady brings batches of one size, which say nothing of the slope. Part of what is forgotten is
  replaced by points on the present line, so that the slope is kept until other sizes are seen.
- Nothing is foretold before two sizes were seen. A line through one size is a guess, and requests were refused on
  such guesses elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_KEPT: Final = 0.95  # of the weight of the past at each batch: a memory of about 20 batches
_ANCHOR: Final = 0.2 * (1 - _KEPT)  # weight of a point on the present line, of which there are two at each batch
_OUTLIER: Final = 3.0
_TICK_S: Final = 1e-5  # so that a line at zero, drawn by a coarse clock, can rise again


class CostModel:
    """Seconds that a batch of so many rows takes.

    >>> cost = CostModel()
    >>> cost.seed({1: 0.002, 11: 0.003})
    >>> round(cost.seconds(21), 6)
    0.004
    """

    __slots__ = ("_moments", "_pending", "fixed", "largest", "per_row")

    def __init__(self) -> None:
        self.fixed = 0.0
        """Seconds that a batch takes whatever its size."""
        self.per_row = 0.0
        """Seconds that each row adds."""
        self.largest = 0
        """Most rows seen in one batch; 0 until two sizes were seen."""
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
        seconds = min(seconds, max(_TICK_S, _OUTLIER * self.seconds(rows)))
        self.largest = max(self.largest, rows)
        self._moments = tuple(_KEPT * each for each in self._moments)  # type: ignore[assignment]  # five stay five
        self._add(rows, seconds, 1.0 - _KEPT)
        self._add(1, self.seconds(1), _ANCHOR)
        self._add(self.largest, self.seconds(self.largest), _ANCHOR)
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
        per_row = (one * nt - n * t) / spread if spread > 1e-9 * one * nn else self.per_row
        fixed = (t - per_row * n) / one
        if per_row < 0.0:
            per_row, fixed = 0.0, t / one
        elif fixed < 0.0:
            per_row, fixed = nt / nn, 0.0
        self.per_row, self.fixed = per_row, fixed
