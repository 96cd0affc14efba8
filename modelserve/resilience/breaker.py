"""When to leave alone what does not answer, and when to try it again."""

from __future__ import annotations

import math
from typing import Final

_APART_S: Final = 0.05  # what is late within such a time is one failure: a moment's stall makes everybody late


class Breaker:
    """Opens after so many ``failures`` in a row, and lets one attempt through after each pause.

    The first pause is ``first_pause_s`` long, and each is twice as long as the one before, up to ``last_pause_s``.
    Times are seconds of any clock that does not go back.
    """

    def __init__(self, failures: int, *, first_pause_s: float, last_pause_s: float) -> None:
        self._limit = failures
        self._first_pause_s, self._last_pause_s = first_pause_s, last_pause_s
        self._failures = 0
        self._failed_at = self._next = -math.inf
        self._pause_s = first_pause_s

    @property
    def open(self) -> bool:
        """Whether attempts are held back."""
        return self._failures >= self._limit

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
        self._pause_s = min(self._last_pause_s, 2 * self._pause_s) if self.open else self._first_pause_s
        self._failures += 1
        self._failed_at, self._next = now, now + self._pause_s

    def succeeded(self) -> None:
        """Note that an attempt succeeded in time."""
        self._failures = 0
