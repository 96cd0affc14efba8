"""What a batch costs: seconds ≈ fixed + per_row · rows, learned from the batches that ran.

A shape and a scale are learned apart. The scale follows the last ten batches or so, because what slows down a machine
slows down every size. The shape is a table of what each size took, one entry a power of two, and the line through it.
Three things keep that usable where a plain fit goes wrong:

- A batch that took far longer than expected (a garbage collection, a page fault, a neighbour) counts as at most
  twice its expected time, and hardly for the shape. A lasting change is still followed, some batches later.
- Load that is steady brings batches of one size, which say nothing of the shape. So the table learns only how one size
  compares with another, from two batches in a row, and the entries of other sizes stay as they were. A fit with
  forgetting drifts until all of its time is in one of its two parts, and stays there.
- Nothing is foretold before two sizes were seen. A line through one size is a guess, and requests were refused on
  such guesses elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

_SCALE_STEP: Final = 0.1  # weight of the newest batch in the scale
_SHAPE_STEP: Final = 0.1  # weight of the newest pair of batches in what one size takes beside the other
_SURPRISE: Final = 0.3  # a pair further than this from the expected ratio, relatively, counts as much as one at it
_AGEING: Final = 0.99  # of the weight of the other entries, at each pair
_LEAST_WEIGHT: Final = 0.05  # of an entry that was not seen for long: it still holds the line where nothing else does
_OUTLIER: Final = 2.0
_MOST: Final = 1e9  # times slower or faster than it was at first: what lies beyond is no measurement
_LEAST_S: Final = 1e-9  # so that a line at zero, drawn by a coarse clock, can rise again


@dataclasses.dataclass(slots=True)
class _Entry:
    """What a batch of ``rows`` takes at a scale of 1, and how much that counts for the line."""

    rows: int
    seconds: float
    weight: float = 1.0


class CostModel:
    """Seconds that a batch of so many rows takes.

    >>> cost = CostModel()
    >>> cost.seed({1: 0.002, 11: 0.003})
    >>> round(cost.seconds(21), 6)
    0.004
    """

    __slots__ = ("_last", "_pending", "_scale", "_shape", "_table", "fixed", "largest", "per_row")

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
        self._table: dict[int, _Entry] = {}  # by power of two
        self._last: tuple[_Entry | None, float] = (None, 1.0)  # of the last batch: its entry, and its time beside it

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
        if len(seen) < 2:  # noqa: PLR2004  # sizes make a line
            self._pending.update(seen)
            return
        self._table = {_key(rows): _Entry(rows, max(_LEAST_S, seconds)) for rows, seconds in seen.items()}
        self.largest = max(seen)
        self._fit()

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from one batch."""
        if not self.largest:
            self._first(rows, seconds)
            return
        expected = max(_LEAST_S, self.seconds(rows))
        ratio = min(_OUTLIER, seconds / expected)
        self._learn_shape(rows, max(_LEAST_S, ratio * expected))
        self._scale = min(_MOST, max(1.0 / _MOST, self._scale * (1.0 + _SCALE_STEP * (ratio - 1.0))))
        self.largest = max(self.largest, rows)
        fixed, per_row = self._shape
        self.fixed, self.per_row = self._scale * fixed, self._scale * per_row

    def _first(self, rows: int, seconds: float) -> None:
        """Remember the fastest batch of each size until there are two sizes: the first one is rarely typical."""
        self._pending[rows] = min(seconds, self._pending.get(rows, math.inf))
        if len(self._pending) > 1:
            seen, self._pending = self._pending, {}
            self.seed(seen)

    def _learn_shape(self, rows: int, seconds: float) -> None:
        """Compare a batch with the one before it, if that had another size: a slow machine slowed down both."""
        key = _key(rows)
        entry = self._table.get(key)
        if entry is None:
            entry = self._table[key] = _Entry(rows, max(_LEAST_S, seconds / self._scale))
            self._fit()
        slower = seconds / self._expected_by(entry, rows)
        (before, slower_before), self._last = self._last, (entry, slower)
        if before is not None and before is not entry:
            self._contrast(entry, before, math.log(slower / slower_before))

    def _expected_by(self, entry: _Entry, rows: int) -> float:
        """Return what the table says of a size, at a scale of 1: along the line from its entry."""
        fixed, per_row = self._shape
        return max(_LEAST_S, entry.seconds * (fixed + per_row * rows) / max(_LEAST_S, fixed + per_row * entry.rows))

    def _contrast(self, entry: _Entry, other: _Entry, longer: float) -> None:
        """Move two entries apart, one up and one down by as much: their common level is the scale's."""
        for each in self._table.values():
            each.weight = max(_LEAST_WEIGHT, _AGEING * each.weight)
        change = math.exp(_SHAPE_STEP * min(_SURPRISE, max(-_SURPRISE, longer)))
        entry.seconds = max(_LEAST_S, entry.seconds * change)
        other.seconds = max(_LEAST_S, other.seconds / change)
        entry.weight = other.weight = 1.0
        self._fit()

    def _fit(self) -> None:
        """Draw the line with the least relative errors, neither part below zero."""
        one = n = nn = t = nt = 0.0
        for entry in self._table.values():
            rows, seconds = entry.rows, entry.seconds
            weight = entry.weight / (seconds * seconds)
            one += weight
            n += weight * rows
            nn += weight * rows * rows
            t += weight * seconds
            nt += weight * rows * seconds
        spread = one * nn - n * n
        per_row = (one * nt - n * t) / spread if spread > 1e-9 * one * nn else self._shape[1]
        fixed = (t - per_row * n) / one
        if per_row < 0.0:
            per_row, fixed = 0.0, t / one
        elif fixed < 0.0:
            per_row, fixed = nt / nn, 0.0
        self._shape = (fixed, per_row)
        self.fixed, self.per_row = self._scale * fixed, self._scale * per_row


def _key(rows: int) -> int:
    """Return which entry of the table a size belongs to."""
    return (rows - 1).bit_length()
