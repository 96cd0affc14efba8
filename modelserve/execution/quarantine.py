"""Inputs that kill the worker that runs them.

Nobody can see which row of a batch made a process die. So after a death every row of the batch is a suspect and is
run again alone. A row that dies with its worker a second time, alone, is refused by its fingerprint; one that runs is
cleared. The refusal ends after a while, with another try, alone: a worker can also be killed twice by chance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Generic, TypeVar

from modelserve.errors import InferenceFailed

In = TypeVar("In")
_MOST: Final = 4096  # remembered fingerprints; the oldest is forgotten first
_REFUSED_S: Final = 600.0


class Quarantine(Generic[In]):
    """Remembers by ``fingerprint`` which items were there when a worker died; ``clock`` tells seconds."""

    def __init__(self, fingerprint: Callable[[In], Hashable], clock: Callable[[], float]) -> None:
        self._fingerprint = fingerprint
        self._clock = clock
        self._suspects: OrderedDict[Hashable, float] = OrderedDict()  # since when
        self._convicted: OrderedDict[Hashable, float] = OrderedDict()  # until when

    def __bool__(self) -> bool:
        return bool(self._suspects or self._convicted)

    @property
    def refused(self) -> int:
        """How many inputs are refused."""
        return len(self._convicted)

    def accuse(self, items: Sequence[In]) -> InferenceFailed | None:
        """Note that a worker died while it ran these. Returns the verdict if that settles whose fault it is."""
        prints = [self._fingerprint(item) for item in items]
        if len(prints) == 1 and prints[0] in self._suspects:
            del self._suspects[prints[0]]
            _remember(self._convicted, prints[0], self._clock() + _REFUSED_S)
            return _verdict()
        for each in prints:
            _remember(self._suspects, each, self._clock())
        return None

    def clear(self, item: In) -> None:
        """Note that an item ran alone and nothing died."""
        self._suspects.pop(self._fingerprint(item), None)

    def must_run_alone(self, items: Sequence[In]) -> bool:
        """Whether a suspect is among these. Raises ``InferenceFailed`` if one of them is refused."""
        prints = [self._fingerprint(item) for item in items]
        now = self._clock()
        for each in self._convicted.keys() & prints:
            if self._convicted[each] > now:
                raise _verdict()
            del self._convicted[each]
            _remember(self._suspects, each, now)
        return not self._suspects.keys().isdisjoint(prints)


def _remember(known: OrderedDict[Hashable, float], fingerprint: Hashable, when: float) -> None:
    known[fingerprint] = when
    known.move_to_end(fingerprint)
    if len(known) > _MOST:
        known.popitem(last=False)


def _verdict() -> InferenceFailed:
    return InferenceFailed("this input ended the worker that ran it, twice; it is not run again")
