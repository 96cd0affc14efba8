"""When a worker that died is started again, and when its version counts as broken."""

from __future__ import annotations

from collections import deque
from typing import Final

_WINDOW_S: Final = 60.0
_DEATHS: Final = 5  # within the window, and the circuit opens
_FIRST_PAUSE_S: Final = 0.5  # after the second death; the first is followed by a restart at once
_OPEN_PAUSE_S: Final = 30.0
_WELL_S: Final = 30.0  # without a death, and an open circuit closes


class RestartPolicy:
    """Counts the deaths of a pool's workers.

    A worker that dies once in a while is replaced at once. The more often they die, the longer the pause before the
    next start. After ``_DEATHS`` within ``_WINDOW_S`` the circuit is open: starts are tried rarely, until the pool
    has lived for ``_WELL_S`` without a death. Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._well_since: float | None = None
        self.open = False

    @property
    def deaths(self) -> int:
        """Deaths within the window that ended with the last one."""
        return len(self._deaths)

    def died(self, now: float) -> float:
        """Count a death; return how long to wait before the next start."""
        self._deaths.append(now)
        self._well_since = None
        while self._deaths[0] < now - _WINDOW_S:
            self._deaths.popleft()
        self.open = self.open or len(self._deaths) >= _DEATHS
        if self.open:
            return _OPEN_PAUSE_S
        return _FIRST_PAUSE_S * 2.0 ** (len(self._deaths) - 2) if len(self._deaths) > 1 else 0.0

    def lives(self, now: float) -> bool:
        """Note that a worker is alive; return whether that closes the circuit."""
        if self._well_since is None:
            self._well_since = now
        if not self.open or now - self._well_since < _WELL_S:
            return False
        self.open = False
        self._deaths.clear()
        return True
