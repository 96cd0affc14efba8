"""One request on its way: what was asked, then rows, features, answers, and the clock that runs meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from modelserve.caching import PredictionCache
from modelserve.caching.predictions import Known
from modelserve.errors import DeadlineExceeded, InferenceFailed, InvalidInput
from modelserve.events import Observers, Served
from modelserve.features.plan import Pending
from modelserve.features.reader import FeatureReader
from modelserve.ids import REQUEST_ID_RULE, ROUTING_KEY_RULE, is_request_id, is_routing_key
from modelserve.serving.version import LoadedVersion
from modelserve.signature import AT_ONCE, Pieces
from modelserve.turns import Steps, in_turns
from modelserve.types import Arm, Json, Prediction, Row


@dataclasses.dataclass(slots=True)
class PredictRequest:
    """What a caller asks of one model: a row or several, for one version, within a time.

    ``prefix`` is how an ``InvalidInput`` names row ``i``: ``"instances[{}]"``, or ``""`` for no prefix. ``version``
    pins the version. ``key`` is the unit that a canary keeps on one version, such as a user's id. Without a
    ``request_id`` it is given one; without ``timeout_ms`` it has the model's.

    Raises ``InvalidInput`` for a ``request_id`` or a ``key`` that :mod:`modelserve.ids` does not allow.
    """

    model_name: str
    instances: Sequence[Any] | Pieces
    prefix: str = ""
    version: str | None = None
    key: str | None = None
    request_id: str | None = None
    timeout_ms: float | None = None

    def __post_init__(self) -> None:
        if self.request_id and not is_request_id(self.request_id):
            raise InvalidInput("request_id", REQUEST_ID_RULE)
        if self.key is not None and not is_routing_key(self.key):
            raise InvalidInput("key", ROUTING_KEY_RULE)


class Inference:
    """A request and the version that answers it, from the lease on the version to the last observer.

    Entering takes a lease on the version and sets the deadline. The steps between are called in the order in which
    they are written here. Leaving stops the clock, gives a missed deadline the limit that the caller asked for, and
    emits ``Served``, whether there are answers or an error.
    """

    __slots__ = (
        "_arrived",
        "_known",
        "_observers",
        "_pending",
        "arm",
        "cached",
        "deadline",
        "degraded",
        "executed",
        "latency_ms",
        "limit_s",
        "request",
        "request_id",
        "rows",
        "values",
        "version",
    )

    def __init__(
        self, request: PredictRequest, version: LoadedVersion, arm: Arm, observers: Observers, new_id: Callable[[], str]
    ) -> None:
        self._arrived = perf_counter()
        self._observers = observers
        self._known: Known | None = None
        self._pending: Sequence[Pending] = ()
        self.request = request
        self.version = version
        self.arm = arm
        self.request_id = request.request_id or new_id()
        self.limit_s = version.timeout_s if request.timeout_ms is None else request.timeout_ms / 1000
        self.rows: Sequence[Row] = ()
        """The validated rows with their features; an empty row for one that the cache answered before its were read."""
        self.values: Sequence[Json] = ()
        """An answer per row."""
        self.cached: Sequence[bool] = ()
        """For each row whether it came from the cache (empty: none did)."""
        self.degraded: Sequence[tuple[str, ...]] = ()
        """For each row which of its features have their default (empty: none of any row)."""
        self.executed = False
        """Whether the model gave results for it."""

    def __enter__(self) -> Self:
        self.deadline = asyncio.get_running_loop().time() + self.limit_s
        self.version.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, DeadlineExceeded):  # it names what was left when the last step began
                late = DeadlineExceeded(self.limit_s, self.version.pool.at_least(len(self.request.instances)))
                self._served(late)
                raise late from error
            if error is None or isinstance(error, Exception | asyncio.CancelledError):
                self._served(error)
        finally:
            self.version.__exit__()

    def _served(self, error: BaseException | None) -> None:
        self.latency_ms = int((perf_counter() - self._arrived) * 1_000_000) / 1000  # uvloop's clock ticks in ms
        if self._observers:
            version = self.version
            self._observers.emit(
                Served(
                    version.meta.model_name,
                    version.meta.version,
                    self.request_id,
                    len(self.request.instances),
                    self.latency_ms,
                    error,
                    self.rows,
                    self.values,
                    self.cached,
                    self.degraded,
                    version.meta,
                    version.signature,
                    self.arm,
                    self.executed,
                )
            )

    # -- the steps -----------------------------------------------------------------------------------------

    async def validate(self) -> None:
        """Check the rows against the version's signature. Raises ``InvalidInput``, which names row and field."""
        request, version = self.request, self.version
        limit = version.options.queue_limit
        if len(request.instances) > limit:
            raise InvalidInput("instances", f"{len(request.instances)} rows; one request takes at most {limit}")
        rows: list[Any] = []
        try:
            if len(request.instances) * version.signature.size <= AT_ONCE and type(request.instances) is not Pieces:
                for instance in request.instances:
                    rows.append(version.validate(instance))  # noqa: PERF401  # the count says which row was wrong
            else:
                await in_turns(self._validate_in_turns(rows))
        except InvalidInput as error:
            raise error.within(request.prefix.format(len(rows))) from None
        if version.plan is None:
            self.rows = rows
        else:
            self._pending = rows

    def _validate_in_turns(self, rows: list[Any]) -> Steps[None]:
        """Validate rows that hold very much, or came in pieces, without holding the loop meanwhile."""
        version = self.version
        rows_at_once = max(1, AT_ONCE // version.signature.size)
        for instance in self.request.instances:
            rows.append(version.validate((yield from version.signature.prepare(instance))))
            if len(rows) % rows_at_once == 0:
                yield

    async def look_up(self, cache: PredictionCache) -> None:
        """Find what is answered to a request whatever its features are."""
        version = self.version
        assert version.request_key is not None
        self._known = await cache.look(version, version.request_key, self._pending, self.deadline)

    async def complete(self, features: FeatureReader | None) -> None:
        """Read the features of the rows that have no answer yet. Raises as :meth:`FeatureReader.enrich`."""
        plan = self.version.plan
        assert plan is not None and features is not None  # noqa: PT018  # options with features need a store
        answered = () if self._known is None else self._known.answered
        self.rows, self.degraded = await features.enrich(
            plan, self._pending, self.request.prefix, self.deadline, answered
        )

    async def execute_cached(self, cache: PredictionCache) -> None:
        """Answer from the cache, join what runs already, or run the model and keep its answers."""
        results, self.cached = await cache.answer(self.version, self.rows, self.deadline, self._known, self.degraded)
        self.executed = not all(self.cached)
        self.values = _values(results)

    async def execute(self) -> None:
        """Run the model: its batch, its replica, its answer."""
        results = await self.version.pool.submit(self.rows, self.deadline)
        self.executed = True
        self.values = _values(results)

    # -- the answers ---------------------------------------------------------------------------------------

    @property
    def is_cached(self) -> bool:
        """Whether every row came from the cache."""
        return len(self.cached) > 0 and all(self.cached)

    def prediction(self, row: int = 0) -> Prediction:
        """Return the answer to one row, as Python hosts have it."""
        return Prediction(
            self.values[row],
            self.version.meta.version,
            self.latency_ms,
            self.request_id,
            bool(self.cached) and self.cached[row],
            self.degraded[row] if self.degraded else (),
        )


def _values(results: Sequence[Json | Exception]) -> Sequence[Json]:
    """Return the values of a request's rows, or raise the first error among them."""
    for i, result in enumerate(results):
        if isinstance(result, Exception):
            if len(results) > 1 and isinstance(result, InferenceFailed):
                raise InferenceFailed(f"row {i}: {result}") from result
            raise result
    return results
