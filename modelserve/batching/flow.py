"""What comes in and what goes out, as measured: whether a queue grows or stands, and how fast it moves.

A closed loop of callers, each of which asks again when it has its answer, never has more rows inside than it has
callers, however long they wait; refusing one of them shortens the wait of no other, since it asks again. An overload
has no such bound: more and more are inside. So what tells the two apart is not how long a queue has stood, but whether
it has lately been larger than before, for longer than a burst of new callers takes to arrive.
"""

from __future__ import annotations

import math
from typing import Final

_REMEMBERED_S: Final = 1.0  # how long, or up to twice that, the most rows that were inside are remembered
_BURST_S: Final = 0.025  # callers that begin within this time, or within this share of the objective, are one burst
_BURST: Final = 0.25
_CALM: Final = 4.0  # bursts without a newcomer, and the next one begins another burst
_PACE_S: Final = 0.1  # what was so long ago counts a third for the pace


class Flow:
    """Counts rows inside, waiting or running, and rows that left. All times are by one clock."""

    __slots__ = ("_came", "_most", "_most_before", "_over_until", "_rows", "_seconds", "_since", "_turns_at", "burst_s")

    def __init__(self) -> None:
        self.burst_s = _BURST_S
        self._most = self._most_before = 0  # rows inside at once, in this stretch of time and in the one before
        self._turns_at = -math.inf
        self._since = self._came = -math.inf  # the first and the last newcomer of the present burst
        self._over_until = -math.inf
        self._rows = self._seconds = 0.0

    def aim(self, objective_s: float, batch_s: float) -> None:
        """Set what a burst is: a share of the objective, and never less than a batch takes."""
        self.burst_s = max(_BURST_S, batch_s, _BURST * objective_s if objective_s < math.inf else 0.0)

    def enters(self, inside: int, now: float) -> bool:
        """Take note of a call that makes so many rows inside; return whether this is overload.

        That is, whether it is a newcomer, and newcomers have been arriving for longer than a burst lasts, or whether a
        call was refused for that a moment ago: then all calls are alike.
        """
        if now >= self._turns_at:
            self._turn(now)
        if inside <= self._most_before or inside <= self._most:
            self._most = max(self._most, inside)
            return now < self._over_until
        self._most = inside
        if now - self._came > _CALM * self.burst_s:
            self._since = now
        self._came = now
        return now - self._since > self.burst_s or now < self._over_until

    def refuses(self, now: float) -> None:
        """Take note of a call that was refused because of overload."""
        self._over_until = now + _CALM * self.burst_s

    def leave(self, rows: int, seconds: float) -> None:
        """Take note of rows that left after the runners were busy for so long."""
        kept = math.exp(-seconds / _PACE_S)
        self._rows = kept * self._rows + rows
        self._seconds = kept * self._seconds + seconds

    def seconds(self, rows: int) -> float:
        """Return how long so many rows take to leave at the present pace; endless before any left."""
        return rows * self._seconds / self._rows if self._rows else math.inf

    def _turn(self, now: float) -> None:
        stretch = max(_REMEMBERED_S, _CALM * self.burst_s)
        self._most_before = self._most if now < self._turns_at + stretch else 0
        self._most = 0
        self._turns_at = now + stretch
