"""Inputs that are not run as others are: they ended the worker that ran them, or made the model fail.

Nothing shows which row of a batch made a process die. So after a death every row of the batch is a suspect and is
run again alone. A row that dies with its worker a second time, alone, is refused by its fingerprint; one that runs is
cleared. The refusal ends after a while, with another try, alone: a worker can also be killed twice by chance.

A row that made the model fail, and failed alone too, is refused with the same error for a much shorter while: it costs
its sender nothing to send it again, and all others a batch. One that failed a single time is run alone when it is back.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from modelserve.errors import InferenceFailed

In = TypeVar("In")
T = TypeVar("T")
_MOST: Final = 4096  # remembered fingerprints; the oldest is forgotten first
_DEADLY_S: Final = 600.0  # for so long a row is refused that ended its worker twice
_FAILING_S: Final = 60.0  # and one that the model failed on; twice as long after each further try, up to the above
_PRUNE_S: Final = 10.0


class Care(enum.Enum):
    """How a row is run that is under suspicion."""

    ALONE = "alone"
    """It made the model fail before."""
    DEADLY = "deadly"
    """It was there when a worker died."""


class _Suspicion(NamedTuple):
    care: Care
    since: float
    refused_s: float  # how long it was refused before


class _Refusal(NamedTuple):
    until: float
    care: Care
    seconds: float
    error: InferenceFailed


Judgement: TypeAlias = InferenceFailed | Care
"""The error with which a row is refused, or how it is run."""


class Quarantine(Generic[In]):
    """Remembers by ``fingerprint`` which items failed, or were there when a worker died; ``clock`` reads seconds."""

    def __init__(self, fingerprint: Callable[[In], Hashable], clock: Callable[[], float]) -> None:
        self._fingerprint = fingerprint
        self._clock = clock
        self._suspects: OrderedDict[Hashable, _Suspicion] = OrderedDict()
        self._refused: OrderedDict[Hashable, _Refusal] = OrderedDict()
        self._pruned = clock()

    def __bool__(self) -> bool:
        return bool(self._suspects or self._refused)

    @property
    def refused(self) -> int:
        """How many inputs are refused."""
        now = self._clock()
        return sum(refusal.until > now for refusal in self._refused.values())

    def accuse(self, items: Sequence[In]) -> InferenceFailed | None:
        """Note that a worker died while it ran these. Returns the verdict if that settles whose fault it is."""
        prints = [self._fingerprint(item) for item in items]
        if len(prints) == 1 and self._care(prints[0]) is Care.DEADLY:
            verdict = InferenceFailed("this input ended the worker that ran it, twice; it is not run again")
            self._refuse(prints[0], _DEADLY_S, Care.DEADLY, verdict)
            return verdict
        for each in prints:
            self._suspect(each, Care.DEADLY)
        return None

    def failed(self, item: In, error: InferenceFailed, *, twice: bool) -> None:
        """Note that the model failed on an item alone; ``twice`` if a batch with it had failed as well."""
        found = self._fingerprint(item)
        suspicion = self._suspects.get(found)
        if twice or suspicion is not None:
            before_s = 0.0 if suspicion is None else suspicion.refused_s
            self._refuse(found, min(_DEADLY_S, max(_FAILING_S, 2 * before_s)), Care.ALONE, error)
        else:
            self._suspect(found, Care.ALONE)

    def clear(self, item: In) -> None:
        """Note that an item ran alone and nothing was amiss."""
        self._suspects.pop(self._fingerprint(item), None)

    def forgive(self) -> None:
        """Forget what the model failed on: it fails on everything."""
        self._keep(lambda care, _: care is Care.DEADLY)

    def judge(self, items: Sequence[In]) -> Mapping[int, Judgement]:
        """Return, by place, what is amiss with those of the items that something is amiss with."""
        now = self._clock()
        if now >= self._pruned + _PRUNE_S:
            self._prune(now)
        judged = ((i, self._judge(self._fingerprint(item), now)) for i, item in enumerate(items))
        return {i: judgement for i, judgement in judged if judgement is not None}

    def _judge(self, found: Hashable, now: float) -> Judgement | None:
        refusal = self._refused.get(found)
        if refusal is None:
            return self._care(found)
        if refusal.until > now:
            return refusal.error
        del self._refused[found]
        self._suspect(found, refusal.care, refusal.seconds)
        return refusal.care

    def _care(self, found: Hashable) -> Care | None:
        suspicion = self._suspects.get(found)
        return None if suspicion is None else suspicion.care

    def _suspect(self, found: Hashable, care: Care, refused_s: float = 0.0) -> None:
        _remember(self._suspects, found, _Suspicion(care, self._clock(), refused_s))

    def _refuse(self, found: Hashable, seconds: float, care: Care, error: InferenceFailed) -> None:
        self._suspects.pop(found, None)
        _remember(self._refused, found, _Refusal(self._clock() + seconds, care, seconds, error))

    def _prune(self, now: float) -> None:
        """Forget those that failed some time ago: the memory of them costs a fingerprint of each row that comes."""
        self._pruned = now
        self._keep(lambda care, since: care is Care.DEADLY or since > now - _FAILING_S)

    def _keep(self, kept: Callable[[Care, float], bool]) -> None:
        suspects, refused = self._suspects.items(), self._refused.items()
        self._suspects = OrderedDict((found, each) for found, each in suspects if kept(each.care, each.since))
        self._refused = OrderedDict((found, each) for found, each in refused if kept(each.care, each.until))


def _remember(known: OrderedDict[Hashable, T], found: Hashable, what: T) -> None:
    known[found] = what
    known.move_to_end(found)
    if len(known) > _MOST:
        known.popitem(last=False)
