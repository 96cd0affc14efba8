"""How many rows to run together while some of them make their batch fail.

That is group testing. A batch that runs proves all of its rows good at once; one that fails is searched by halves for
its first bad row, and what lies behind that row is as unknown as it was. (This is the nested procedure of
M. Sobel and P. A. Groll, Bell System Technical Journal 38, 1959; F. K. Hwang's generalized binary splitting, JASA 67,
1972, has the same steps.) A larger batch answers more rows at once and fails more often; which size answers most rows
a second follows from the share of bad rows, which is observed, and from the learned cost of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from modelserve.batching.cost import CostModel

_MEMORY: Final = 15 / 16  # of what was counted is kept at each further bad row: some sixteen of them are remembered
_MOST_ROWS: Final = 1000.0  # that are remembered: so many good rows later, a bad one counts a third
_PRIOR_ROWS: Final = 100.0  # a first bad row is taken for one in so many
_NEGLIGIBLE: Final = 0.01  # of a bad row remembered: there are none any more
_SURE_SIGMAS: Final = 2.5
_LIKELY_SIGMAS: Final = 1.0
_RATIO_STEP: Final = 0.1
_MOST_RATIO: Final = 10.0
_BROKEN: Final = 8  # rows that failed alone and none that ran in between: that is the model, and not the rows


class Grouping:
    """Observes how many rows are bad, and says how many to run together.

    >>> grouping = Grouping()
    >>> grouping.size(CostModel(), 256)
    256
    >>> for _ in range(20):
    ...     grouping.passed(49)
    ...     grouping.found_a_bad_one()
    >>> grouping.size(CostModel(), 256)
    32
    """

    __slots__ = ("_bad", "_lone", "_ratio", "_rows")

    def __init__(self) -> None:
        self._bad = 0.0
        self._rows = _PRIOR_ROWS
        self._ratio = 1.0  # how long a failing batch takes, beside one that runs
        self._lone = 0  # rows that failed alone since the last batch that ran

    @property
    def failing(self) -> bool:
        """Whether there were bad rows of late."""
        return self._bad > 0.0

    @property
    def broken(self) -> bool:
        """Whether all that runs fails, each row alone: then it is the model that is at fault."""
        return self._lone >= _BROKEN

    @property
    def share(self) -> float:
        """The share of bad rows, as of late."""
        return min(1.0, self._bad / self._rows)

    def passed(self, rows: int) -> None:
        """Note that a batch of so many rows ran."""
        self._lone = 0
        if not self._bad:
            return
        self._rows += rows
        if self._rows > _MOST_ROWS:
            self._bad *= _MOST_ROWS / self._rows
            self._rows = _MOST_ROWS
            if self._bad < _NEGLIGIBLE:
                self._bad = 0.0
                self._rows = _PRIOR_ROWS

    def found_a_bad_one(self) -> None:
        """Note that a batch failed of which nothing was known: one of its rows is bad, and will be found."""
        self._bad = _MEMORY * self._bad + 1.0
        self._rows = _MEMORY * self._rows + 1.0

    def failed_alone(self) -> None:
        """Note that a row ran alone and failed."""
        self._lone += 1

    def took(self, seconds: float, expected: float) -> None:
        """Note how long a batch took that failed, and how long one that runs would have taken."""
        if expected > 0.0:
            self._ratio += _RATIO_STEP * (min(_MOST_RATIO, seconds / expected) - self._ratio)

    def size(self, cost: CostModel, most: int) -> int:
        """Return how many rows to run together, at most ``most``, so that most rows a second are answered."""
        if not self._bad:
            return most
        best = min(_sizes(most), key=lambda rows: self._seconds_a_row(cost, rows))
        return max(1, best >> 2 * max(0, self._lone - 1))  # gallops down where one row after the other fails

    def seconds_to_settle(self, rows: int, cost: CostModel, together: int, *, sure: bool = True) -> float:
        """Return in what time of a runner so many rows are answered, so many ``together``: almost ``sure`` or likely.

        That lies some standard deviations above the mean: a bad row more among them is a search more.
        """
        if not self._bad:
            return 0.0
        searches = (_SURE_SIGMAS if sure else _LIKELY_SIGMAS) * math.sqrt(self.share * rows)
        return rows * self._seconds_a_row(cost, together) + searches * self._search_s(cost, together)

    def _seconds_a_row(self, cost: CostModel, rows: int) -> float:
        """Return the expected time until a row is answered, by the runner's time: of the batch and of the search."""
        share = self.share
        all_good = (1.0 - share) ** rows
        fails = 1.0 - all_good
        answered = fails / share  # up to the first bad row, that one included
        first = all_good * _seconds(cost, rows) + fails * self._ratio * _seconds(cost, rows)
        return (first + fails * self._search_s(cost, rows)) / answered

    def _search_s(self, cost: CostModel, rows: int) -> float:
        """Return how long it takes to find the first bad row of a batch that failed."""
        half_fail = (1.0 + self._ratio) / 2
        seconds = 0.0
        at_hand = rows
        while at_hand > 1:
            at_hand = (at_hand + 1) // 2
            seconds += half_fail * _seconds(cost, at_hand)
        if rows <= 1:
            return 0.0
        return seconds + 0.5 * self._ratio * _seconds(cost, 1)  # alone, where only the other half ran


def _seconds(cost: CostModel, rows: int) -> float:
    """Return the expected time of a batch; where nothing is known, as if its size made no difference."""
    return (cost.seconds(rows) if cost.known else 0.0) or 1.0


def _sizes(most: int) -> Iterator[int]:
    """Return 1, 2, 3, 5, 8, 12, 18 … and the largest."""
    rows = 1
    while rows < most:
        yield rows
        rows += (rows + 1) // 2
    yield most
