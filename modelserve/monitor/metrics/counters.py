"""What is counted of a server, under the names that Prometheus gets."""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Final, NamedTuple, Protocol

from modelserve.errors import ModelServeError
from modelserve.events import (
    Event,
    FeaturesRead,
    LoadRejected,
    Served,
    VersionLoaded,
    VersionUnloaded,
    WorkerLost,
)
from modelserve.monitor.metrics.exposition import KEPT_S, Family, Figures, Samples, histogram, sample, subject
from modelserve.types import LogStatus, PoolStatus

FAMILIES: Final = (
    Family("modelserve_requests_total", "counter", "Requests that reached a version, by how they ended."),
    Family("modelserve_request_duration_seconds", "histogram", "Time from arrival to answer, failures included."),
    Family("modelserve_batches_total", "counter", "Batches that ran."),
    Family("modelserve_batch_rows", "histogram", "Rows of a batch, rounded up to a power of two."),
    Family("modelserve_degraded_rows_total", "counter", "Rows that were answered with the default of a feature."),
    Family(
        "modelserve_cache_requests_total", "counter", "Rows of models with a prediction cache, by where answers were."
    ),
    Family(
        "modelserve_cache_failures_total", "counter", "Keys not read from the shared cache, values not written to it."
    ),
    Family("modelserve_feature_reads_total", "counter", "Features that requests needed, by what became of them."),
    Family("modelserve_feature_wait_seconds", "histogram", "Time that requests waited for the feature store."),
    Family("modelserve_artifact_downloads_total", "counter", "Downloads of artifacts, by how they ended."),
    Family("modelserve_worker_losses_total", "counter", "Replicas that died or were killed."),
    Family("modelserve_load_failures_total", "counter", "Attempts to take a version into service that failed."),
    Family("modelserve_queue_depth", "gauge", "Rows that wait for a replica."),
    Family("modelserve_replicas", "gauge", "Replicas of the version in production, by state."),
    Family("modelserve_model_ready", "gauge", "1 if every process can answer for the model.", min),
    Family("modelserve_registry_generation", "gauge", "The registry's generation of a model, as last read.", max),
    Family(
        "modelserve_registry_generation_applied", "gauge", "The generation that every process serves, at least.", min
    ),
    Family("modelserve_log_records_total", "counter", "Sampled rows of the inference log, by what became of them."),
    Family("modelserve_log_queue_rows", "gauge", "Rows of the inference log that wait to be written."),
    Family("modelserve_processes", "gauge", "Processes that these figures are the sum of."),
)
LATENCY_BOUNDS_S: Final = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3,
    0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Close together where objectives lie: the usual bounds show a p99 of 110 ms as 158 ms."""
_BOUNDS_MS: Final = tuple(bound * 1000 for bound in LATENCY_BOUNDS_S)
FEATURE_BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 1.0)
_FEATURE_BOUNDS_MS: Final = tuple(bound * 1000 for bound in FEATURE_BOUNDS_S)
BATCH_BOUNDS: Final = tuple(float(2**bits) for bits in range(13))
_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


class ModelState(Protocol):
    """What is asked of a model's status."""

    @property
    def model_name(self) -> str:
        """The model."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it can answer."""
        ...

    @property
    def wanted(self) -> int:
        """The generation that was read last."""
        ...

    @property
    def applied(self) -> int:
        """The generation that is served."""
        ...

    @property
    def production(self) -> str | None:
        """The version that answers."""
        ...

    @property
    def queue_depth(self) -> int:
        """Rows that wait."""
        ...

    @property
    def pool(self) -> PoolStatus | None:
        """The pool of that version."""
        ...


class ComponentCounts(NamedTuple):
    """What other parts of a server count themselves, and are asked for.

    ``cache_rows`` are rows by model and by where their answer was, ``cache_failures`` those of the shared cache by
    operation, ``downloads`` those of artifacts by how they ended.
    """

    cache_rows: Mapping[tuple[str, str], int] = {}
    cache_failures: Mapping[str, int] = {}
    downloads: Mapping[str, int] = {}


class _Counts:
    """The counts of one version. They stay for a while when it is unloaded (``unloaded_at``): it may come back."""

    __slots__ = ("before", "buckets", "degraded", "labels", "lost", "outcomes", "sizes", "total_ms", "unloaded_at")

    def __init__(self, model_name: str, version: str) -> None:
        self.labels = {"model": model_name, "version": version}
        self.unloaded_at: float | None = None
        self.outcomes: dict[str, int] = {"ok": 0}
        self.buckets = [0] * (len(_BOUNDS_MS) + 1)
        self.total_ms = 0.0
        self.lost = 0
        self.degraded = 0
        self.sizes: Mapping[int, int] | None = None
        """Batches by their rows, as its pool last told."""
        self.before: Counter[int] = Counter()
        """Those of pools that it had before."""

    def served(self, event: Served) -> None:
        outcome = "ok" if event.error is None else outcome_of(event.error)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.buckets[bisect_left(_BOUNDS_MS, event.latency_ms)] += 1
        self.total_ms += event.latency_ms
        if event.degraded:
            self.degraded += sum(map(bool, event.degraded))

    def stands(self, pool: PoolStatus) -> None:
        """Take in what its pool tells, which began at zero if the version was loaded again."""
        if self.sizes is not None and pool.batches.batches < sum(self.sizes.values()):
            self.before.update(self.sizes)
        self.sizes = pool.batches.sizes

    def samples(self) -> Samples:
        name = "modelserve_requests_total"
        found = {sample(name, {**self.labels, "outcome": key}): float(n) for key, n in self.outcomes.items()}
        name = "modelserve_request_duration_seconds"
        found |= histogram(name, self.labels, LATENCY_BOUNDS_S, self.buckets, self.total_ms / 1000)
        found[sample("modelserve_worker_losses_total", self.labels)] = self.lost
        found[sample("modelserve_degraded_rows_total", self.labels)] = self.degraded
        return found if self.sizes is None else found | _batches(self.labels, self.before + Counter(self.sizes))


class _Waits:
    """How long requests waited for one feature store."""

    __slots__ = ("buckets", "total_ms")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_FEATURE_BOUNDS_MS) + 1)
        self.total_ms = 0.0


class Metrics:
    """Counts what a server tells. All of it is called on the server's event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._versions: dict[tuple[str, str], _Counts] = {}
        self._load_failures: Counter[str] = Counter()
        self._feature_reads: Counter[tuple[str, str, str]] = Counter()
        self._feature_waits: dict[str, _Waits] = {}
        self._closing = False

    def __call__(self, event: Event) -> None:
        """Count an event.

        A version that was unloaded is shown again when it is back in production. What still comes of it counts, but
        brings no labels back.
        """
        if type(event) is Served:
            self._of(event.model_name, event.version).served(event)
        elif type(event) is FeaturesRead:
            self._count_features(event)
        elif type(event) is VersionLoaded:
            self._of(event.model_name, event.version).unloaded_at = None
        elif type(event) is WorkerLost:
            if counts := self._versions.get((event.model_name, event.version)):  # or it is not in service
                counts.lost += 1
        elif type(event) is LoadRejected:
            self._load_failures[event.model_name] += 1
        elif type(event) is VersionUnloaded and not self._closing:
            if counts := self._versions.get((event.model_name, event.version)):
                counts.unloaded_at = self._clock()
            self._forget()

    def seen_loaded(self, versions: Container[str]) -> None:
        """Learn which versions there still are in any process, as :func:`subject` writes them."""
        now = self._clock()
        for counts in self._versions.values():
            if counts.unloaded_at is not None and subject(counts.labels) in versions:
                counts.unloaded_at = now
        self._forget()

    def figures(self, models: Iterable[ModelState], log: LogStatus | None, counted: ComponentCounts) -> Figures:
        """Return everything, together with how the models and the inference log stand, and what others counted."""
        gauges: Samples = {"modelserve_processes": 1.0}
        for model in models:
            gauges |= _standing(model)
            if model.pool is not None and model.production is not None:
                counts = self._of(model.model_name, model.production)
                counts.unloaded_at = None
                counts.stands(model.pool)
        of_none = self._of_no_version() | _of_others(counted)
        if log is not None:
            of_none |= _log_records(log)
            gauges["modelserve_log_queue_rows"] = log.waiting
        figures = Figures({"": of_none}, gauges, {})
        for counts in self._versions.values():
            shown = figures.counts if counts.unloaded_at is None else figures.unloaded
            shown[subject(counts.labels)] = counts.samples()
        return figures

    def close(self, models: Iterable[ModelState]) -> None:
        """Keep from now on what there is of each version, for the last figures; all of them will be freed."""
        self.figures(models, None, ComponentCounts())
        self._closing = True

    def _forget(self) -> None:
        until = self._clock() - KEPT_S
        for key, counts in list(self._versions.items()):
            if counts.unloaded_at is not None and counts.unloaded_at <= until:
                del self._versions[key]

    def _count_features(self, event: FeaturesRead) -> None:
        for status, n in event.statuses.items():
            self._feature_reads[event.model_name, event.store, status] += n
        waits = self._feature_waits.get(event.store) or self._feature_waits.setdefault(event.store, _Waits())
        waits.buckets[bisect_left(_FEATURE_BOUNDS_MS, event.waited_ms)] += 1
        waits.total_ms += event.waited_ms

    def _of_no_version(self) -> Samples:
        name = "modelserve_load_failures_total"
        found: Samples = {sample(name, {"model": model}): float(n) for model, n in self._load_failures.items()}
        for (model, store, status), n in self._feature_reads.items():
            labels = {"model": model, "store": store, "status": status}
            found[sample("modelserve_feature_reads_total", labels)] = n
        name = "modelserve_feature_wait_seconds"
        for store, waits in self._feature_waits.items():
            found |= histogram(name, {"store": store}, FEATURE_BOUNDS_S, waits.buckets, waits.total_ms / 1000)
        return found

    def _of(self, model_name: str, version: str) -> _Counts:
        counts = self._versions.get((model_name, version))
        if counts is None:
            counts = self._versions[model_name, version] = _Counts(model_name, version)
        return counts


def outcome_of(error: BaseException) -> str:
    """Return the kind of an error in lower case; ``error`` for one that is not the library's own.

    ``cancelled`` is that of a caller who gave up.

    >>> from modelserve.errors import DeadlineExceeded
    >>> outcome_of(DeadlineExceeded(1.0))
    'deadline_exceeded'
    """
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return _WORDS.sub("_", type(error).__name__).lower() if isinstance(error, ModelServeError) else "error"


def _standing(model: ModelState) -> Samples:
    labels = {"model": model.model_name}
    found: Samples = {
        sample("modelserve_model_ready", labels): float(model.ready),
        sample("modelserve_queue_depth", labels): model.queue_depth,
        sample("modelserve_registry_generation", labels): model.wanted,
        sample("modelserve_registry_generation_applied", labels): model.applied,
    }
    for state, n in Counter(each.state for each in model.pool.replicas).items() if model.pool is not None else ():
        version = {"version": model.production or ""}
        found[sample("modelserve_replicas", {**labels, **version, "state": state})] = n
    return found


def _batches(labels: dict[str, str], sizes: Mapping[int, int]) -> Samples:
    counts = [0] * (len(BATCH_BOUNDS) + 1)
    for rows, n in sizes.items():
        counts[bisect_left(BATCH_BOUNDS, rows)] += n
    total = sum(rows * n for rows, n in sizes.items())
    return {
        sample("modelserve_batches_total", labels): float(sum(counts)),
        **histogram("modelserve_batch_rows", labels, BATCH_BOUNDS, counts, total),
    }


def _of_others(counted: ComponentCounts) -> Samples:
    found: Samples = {}
    for (model, result), n in counted.cache_rows.items():
        found[sample("modelserve_cache_requests_total", {"model": model, "result": result})] = n
    for operation, n in counted.cache_failures.items():
        found[sample("modelserve_cache_failures_total", {"operation": operation})] = n
    for result, n in counted.downloads.items():
        found[sample("modelserve_artifact_downloads_total", {"result": result})] = n
    return found


def _log_records(log: LogStatus) -> Samples:
    found = {"written": log.written, "dropped": log.dropped, "refused": log.refused}
    return {sample("modelserve_log_records_total", {"result": result}): float(n) for result, n in found.items()}
