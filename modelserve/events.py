"""What happened, as frozen records handed to observers.

An observer may only take the record and return at once (put it on a bounded queue of its own): it runs on the
event loop, in the middle of a request. One that raises disturbs no request: every failure is counted,
the first is logged.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from modelserve.signature import Signature
from modelserve.types import Arm, Json, ModelVersion, Role, Row

_log = logging.getLogger("modelserve")


class Served(NamedTuple):
    """One call was answered: ``rows`` results, or an error; ``CancelledError`` where the caller gave up.

    ``inputs`` are the validated rows, features among them, none when the request did not fit, and an empty row for one
    that was answered without reading its features; ``values`` are the
    answers, none when it failed. Both are the request's own: to be read, not changed. ``cached`` says of each row
    whether it was answered without running the model, ``degraded`` which of its features have their default (either
    empty: none of any). ``meta`` and ``signature`` are those of the version.

    ``arm`` says why this version: it is the model's ``"production"`` or ``"canary"`` version, the request named it
    (``"pinned"``, whichever it is), or it ran as a ``"shadow"``, for which no caller waits. ``executed`` says whether
    the model gave results for this request, failures among them. It is false where every row came from the cache, and
    where there are no results: the request was refused, was late, or was given up. Rows that joined an execution of the
    same row by another request count as executed.
    """

    model_name: str
    version: str
    request_id: str
    rows: int
    latency_ms: float
    error: BaseException | None
    inputs: Sequence[Row] = ()
    values: Sequence[Json] = ()
    cached: Sequence[bool] = ()
    degraded: Sequence[tuple[str, ...]] = ()
    meta: ModelVersion | None = None
    signature: Signature | None = None
    arm: Arm = "production"
    executed: bool = True

    @property
    def shadow(self) -> bool:
        """Whether no caller waited for it."""
        return self.arm == "shadow"


class FeaturesRead(NamedTuple):
    """One call read features: how many had which status, and how long it waited for the store.

    A status is present, given (by the request), null, missing, stale, timeout or error.
    """

    model_name: str
    store: str
    statuses: Mapping[str, int]
    waited_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class VersionLoaded:
    """A version took up a role: in production it took over the traffic of its model."""

    model_name: str
    version: str
    generation: int
    role: Role = "production"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRejected:
    """A version could not be taken into service; what served before still does. Retried after ``retry_s``."""

    model_name: str
    version: str
    generation: int
    error: Exception
    retry_s: float
    role: Role = "production"


@dataclasses.dataclass(frozen=True, slots=True)
class VersionUnloaded:
    """A version was drained and freed."""

    model_name: str
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerLost:
    """A replica died or was killed; another is started after ``retry_s``."""

    model_name: str
    version: str
    reason: str
    retry_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class CircuitOpened:
    """A version's workers died ``deaths`` times in a short time: it is not ready, and restarts are rare now."""

    model_name: str
    version: str
    deaths: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class CircuitClosed:
    """A version whose workers kept dying has been well for a while."""

    model_name: str
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class PoolScaled:
    """The pool of a version grew or shrank, because on average ``depth`` rows waited."""

    model_name: str
    version: str
    before: int
    after: int
    depth: float


Event: TypeAlias = (
    Served
    | FeaturesRead
    | VersionLoaded
    | LoadRejected
    | VersionUnloaded
    | WorkerLost
    | CircuitOpened
    | CircuitClosed
    | PoolScaled
)
Observer: TypeAlias = Callable[[Event], None]


class Observers:
    """Hands each event to every observer, in the order they subscribed."""

    def __init__(self) -> None:
        self._observers: dict[object, Observer] = {}
        self._called: tuple[Observer, ...] = ()
        self.failures = 0

    def __bool__(self) -> bool:
        return bool(self._called)

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Add an observer; return what removes it again."""
        token = object()
        self._observers[token] = observer
        self._called = tuple(self._observers.values())

        def unsubscribe() -> None:
            self._observers.pop(token, None)
            self._called = tuple(self._observers.values())

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Call every observer; count the ones that raise."""
        for observer in self._called:  # a tuple of its own: an observer may end its subscription meanwhile
            try:
                observer(event)
            except Exception:  # noqa: BLE001  # an observer is the host's code; the request is not its business
                self.failures += 1
                if self.failures == 1:
                    _log.exception("an observer failed on %s; further failures are only counted", type(event).__name__)
