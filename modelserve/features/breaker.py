"""When a feature store that does not answer is left alone, so that requests do not wait for it in vain."""

from __future__ import annotations

from typing import Final

_FAILURES: Final = 5  # in a row
_FOR_S: Final = 0.25  # and over so long: one hiccup of a busy server fails many reads at once
PAUSE_S: Final = 1.0


class Breaker:
    """Counts reads that failed in a row. Times are seconds of any clock that does not go back.

    It opens after ``_FAILURES`` within at least ``_FOR_S`` without a success. While it is open, one read in
    ``PAUSE_S`` is let through to see; the first that succeeds closes it.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._since = 0.0
        self._next_try = 0.0
        self.open = False

    def lets_through(self, now: float) -> bool:
        """Whether a read may try the store."""
        if not self.open:
            return True
        if now < self._next_try:
            return False
        self._next_try = now + PAUSE_S
        return True

    def failed(self, now: float) -> bool:
        """Note a read that failed; return whether that opened it."""
        if not self._failures:
            self._since = now
        self._failures += 1
        if self.open or self._failures < _FAILURES or now - self._since < _FOR_S:
            return False
        self.open = True
        self._next_try = now + PAUSE_S
        return True

    def succeeded(self) -> bool:
        """Note a read that was answered; return whether that closed it."""
        was_open = self.open
        self._failures = 0
        self.open = False
        return was_open
