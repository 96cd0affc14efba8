"""Whether a batch costs less than handing it over to a thread and back would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from modelserve.batching.cost import CostModel

HAND_OVER_S: Final = 75e-6  # loop → thread → loop took 75 to 90 µs where it was measured
_CAP_S: Final = 0.002  # no batch may hold up the loop for longer; one that does bars the next ones for a while
_FIRST_BAR_S: Final = 1.0
_LONGEST_BAR_S: Final = 3600.0
_PARDON: Final = 1000  # batches within the cap, and the last offence is forgotten
_HOPELESS: Final = 4.0  # times the price of a hand-over: so dear a batch will not become cheaper than that
_TRIALS: Final = 16  # batches in the thread before the first may run in place; a warm-up has about that many


class InPlace:
    """Learns what batches cost and says which may run on the event loop itself.

    Only what is expected to take less than ``HAND_OVER_S`` may, as judged by the fastest run of each size at first. An
    expectation can fail: after a batch that took more than the cap, none runs in place for a second, after the next
    such batch for two, and so on up to an hour.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cost = CostModel()
        self._fastest: dict[int, float] = {}  # by number of rows, until the cost is known
        self._tried = 0
        self._bar_s = _FIRST_BAR_S
        self._barred_until = 0.0
        self._within = 0
        self.batches = 0
        """Batches that ran in place."""
        self.over_cap = 0
        """How many of them took longer than the cap."""

    def allows(self, rows: int) -> bool:
        """Whether a batch of so many rows may run in place now. Never more rows than twice what was seen before."""
        cost = self._cost
        if not cost.known or rows > 2 * cost.largest or cost.seconds(rows) > HAND_OVER_S:
            return False
        return not self._barred_until or self._clock() >= self._barred_until

    def ran_elsewhere(self, rows: int, seconds: float) -> None:
        """Learn from a batch in the thread. Beside a busy loop only short times and new sizes tell anything there."""
        if self._cost.known:
            expected = self._cost.seconds(rows)
            hopeless = expected > _HOPELESS * HAND_OVER_S
            if not hopeless and (rows > self._cost.largest or seconds < expected):
                self._cost.observe(rows, seconds)
            return
        self._tried += 1
        self._fastest[rows] = min(seconds, self._fastest.get(rows, seconds))
        if self._tried >= _TRIALS and len(self._fastest) > 1:
            self._cost.seed(self._fastest)

    def ran(self, rows: int, seconds: float) -> None:
        """Learn from a batch that ran in place."""
        self.batches += 1
        self._cost.observe(rows, seconds)
        if seconds > _CAP_S:
            self._offend()
        else:
            self._within += 1
            if self._within >= _PARDON:
                self._within, self._bar_s = 0, max(_FIRST_BAR_S, self._bar_s / 2)

    def _offend(self) -> None:
        self.over_cap += 1
        self._within = 0
        self._barred_until = self._clock() + self._bar_s
        self._bar_s = min(_LONGEST_BAR_S, 2 * self._bar_s)
