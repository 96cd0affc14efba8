"""When to leave alone what does not answer, and when to try it again."""

from __future__ import annotations

import math
from typing import Final

_FAILURES: Final = 3
_APART_S: Final = 0.05  # what is late within such a time is one failure: a moment's stall makes everybody late
_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 5.0


class Breaker:
    """Opens after three failures in a row, and lets one attempt through after each pause: 0.5, 1, 2, 4, 5 s.

    Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._failed_at = self._next = -math.inf
        self._pause_s = _FIRST_PAUSE_S

    @property
    def open(self) -> bool:
        """Whether attempts are held back."""
        return self._failures >= _FAILURES

    def lets_through(self, now: float) -> bool:
        """Whether to try. While it is open, whoever is told yes is the only one until the next pause is over."""
        if not self.open:
            return True
        if now < self._next:
            return False
        self._next = now + self._pause_s
        return True

    def late(self, now: float) -> None:
        """Note that somebody waited for an attempt for too long."""
        if now - self._failed_at >= _APART_S:
            self.failed(now)

    def failed(self, now: float) -> None:
        """Note that an attempt failed."""
        self._pause_s = min(_LAST_PAUSE_S, 2 * self._pause_s) if self.open else _FIRST_PAUSE_S
        self._failures += 1
        self._failed_at, self._next = now, now + self._pause_s

    def succeeded(self) -> None:
        """Note that an attempt succeeded in time."""
        self._failures = 0
