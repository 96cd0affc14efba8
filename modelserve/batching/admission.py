"""How large a batch may be and who may still join the queue, so that the latency aimed for holds.

From the learned cost of a batch follow the largest batch that fits the objective, the time at which a call that joins
the queue now would be answered, and so whether it is better told at once to go elsewhere. A queue that holds work
which will be answered too late helps nobody: it delays all that comes behind it.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from modelserve.batching.cost import CostModel
from modelserve.batching.flow import Flow
from modelserve.batching.grouping import Grouping

# A call that arrives just after a batch has left waits for that batch and for its own. Two batches of this share
# leave a fifth of the objective for the batches that take longer than expected, and for the way there and back.
_BATCH_SHARE: Final = 0.4
_WITHIN: Final = 2 * _BATCH_SHARE
_MARGIN: Final = 0.9
_CONTRADICTED: Final = 1.5  # times as long as measured: a forecast that goes further is not acted on
_EFFICIENT: Final = 0.1  # fixed costs below this share of a batch: waiting for more company gains little


class Wait(NamedTuple):
    """What a call of ``rows`` finds: rows ahead of it in the queue, rows that run, and for how long they still will.

    ``busy_s`` is when the first of the runners is expected to be free, ``since_s`` how long ago rows last left.
    """

    rows: int
    ahead: int
    running: int
    runners: int
    busy_s: float
    since_s: float
    growing: bool


class Admission:
    """What the cost of batches implies for a queue.

    ``max_rows`` bounds a batch. With ``adaptive`` it is an upper limit, and the size in force follows the cost so
    that a batch takes at most 0.4 of ``slo_s``; a model that needs longer for a single row gets batches of at most
    twice that time, since no batch size can hold such an objective.
    """

    def __init__(self, *, max_rows: int, slo_s: float = math.inf, adaptive: bool = False) -> None:
        self.cost = CostModel()
        self.flow = Flow()
        self.max_rows = max_rows
        """Most rows in a batch, as of now."""
        self.stage_rows = max_rows
        """From how many waiting rows on a batch may be handed to a runner that is still busy with another."""
        self._limit = max_rows
        self._slo_s = slo_s
        self._adaptive = adaptive
        self._full_s = 0.0
        self._cap = max_rows  # while batches fail

    def seed(self, seen: dict[int, float]) -> None:
        """Begin with the times of a warm-up, by number of rows."""
        self.cost.seed(seen)
        self._adapt()

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        self.cost.observe(rows, seconds)
        self._adapt()

    def restrict(self, grouping: Grouping) -> None:
        """While batches fail, run no more rows together than it says."""
        if grouping.failing or self._cap < self._limit:
            self._cap = grouping.size(self.cost, self._limit)
            self._adapt()

    def foreseen(self, wait: Wait) -> float:
        """Return in how many seconds a call that joins the queue now is answered.

        By the cost of batches, unless the pace at which rows leave at present contradicts it: a cost that was learned
        at another load, or beside a busy event loop, can be far too high.
        """
        before = (wait.ahead + wait.rows - 1) // self.max_rows
        # In a growing queue others will join until its own batch is full.
        own = self.max_rows if before or wait.growing else wait.ahead + wait.rows
        runners = max(1, wait.runners)
        by_cost = wait.busy_s + before * self._full_s / runners + self.cost.seconds(own)
        running_s = max(0.0, self.flow.seconds(wait.running) - wait.since_s)
        by_pace = running_s + self.flow.seconds(before * self.max_rows + runners * own)
        return by_pace if by_cost > _CONTRADICTED * by_pace else by_cost

    def limit(self, left: float, *, growing: bool, batch_s: float = 0.0) -> float:
        """Return in how many seconds a call has to be foreseen to be answered for it to be let in.

        That is the time left to its deadline, less a margin, and in a growing queue the objective as well, or at least
        the next batch, which may be known to take ``batch_s``. (The two regimes are those of B. Maurer, "Fail at
        Scale", ACM Queue 13(8), 2015, after CoDel.)
        """
        limit = left * _MARGIN
        return min(limit, max(self._slo_s * _WITHIN, 2 * max(batch_s, self._full_s))) if growing else limit

    def _adapt(self) -> None:
        cost = self.cost
        self.max_rows = self._cap
        if not cost.known:
            self.stage_rows = self._cap
            return
        if self._adaptive:
            budget = max(_BATCH_SHARE * self._slo_s, 2 * cost.seconds(1))
            self.max_rows = max(1, int(min(self._cap, cost.rows_within(budget))))
        self._full_s = cost.seconds(self.max_rows)
        self.flow.aim(self._slo_s, self._full_s)
        efficient = cost.fixed / (_EFFICIENT * cost.per_row) if cost.per_row > 0.0 else math.inf
        self.stage_rows = max(1, int(min(self.max_rows, efficient)))
