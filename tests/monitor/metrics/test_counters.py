"""What is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import pytest

from modelserve.errors import DeadlineExceeded, InferenceFailed, InvalidInput, LoadFailed, WorkerDied
from modelserve.events import Event, FeaturesRead, LoadRejected, VersionLoaded, VersionUnloaded, WorkerLost
from modelserve.monitor.metrics.counters import FAMILIES, ComponentCounts, Metrics, outcome_of
from modelserve.monitor.metrics.exposition import KEPT_S, Samples, merged, text
from modelserve.types import BatchStats, LogStatus, PoolStatus, ReplicaStatus
from tests.monitor.answers import served

NAME = re.compile(r"[a-z_]+(\{[a-z]+=\"[^\"]*\"(,[a-z]+=\"[^\"]*\")*\})?")


@dataclasses.dataclass(frozen=True)
class Model:
    """How a model stands."""

    model_name: str = "m"
    ready: bool = True
    wanted: int = 7
    applied: int = 6
    production: str | None = "1"
    queue_depth: int = 3
    pool: PoolStatus | None = None


def pool(**sizes: int) -> PoolStatus:
    stats = BatchStats(
        batches=sum(sizes.values()),
        sizes={int(key[1:]): count for key, count in sizes.items()},
        reasons={},
        refused={},
        quarantined=0,
        max_rows=64,
        fixed_s=None,
        per_row_s=None,
    )
    replicas = tuple(ReplicaStatus(state=state, restarts=0, detail={}) for state in ("ready", "ready", "starting"))
    return PoolStatus(
        replicas=replicas,
        smallest=1,
        largest=4,
        queue_depth=3,
        circuit_open=False,
        restarts=0,
        scaled_out=0,
        scaled_in=0,
        batches=stats,
    )


def samples(
    metrics: Metrics,
    *models: Model,
    log: LogStatus | None = None,
    counted: ComponentCounts = ComponentCounts(),  # noqa: B008  # it is immutable
) -> Samples:
    found = merged([metrics.figures(models, log, counted)], [], FAMILIES)
    assert all(NAME.fullmatch(key) for key in found)
    return found


def shown(metrics: Metrics) -> set[str]:
    """Return the versions that have labels."""
    return set(re.findall(r'version="(\w+)"', " ".join(samples(metrics))))


def test_requests_are_counted_by_how_they_ended() -> None:
    """Each outcome has its count; the histogram holds every request, at its latency in seconds."""
    metrics = Metrics()
    for error in (None, None, InvalidInput("x", "missing"), DeadlineExceeded(1.0), RuntimeError()):
        metrics(served(error=error, latency_ms=110.0))
    found = samples(metrics)
    requests = {re.findall(r'outcome="(\w+)"', key)[0]: n for key, n in found.items() if "requests_total" in key}
    assert requests == {"ok": 2, "invalid_input": 1, "deadline_exceeded": 1, "error": 1}
    labels = 'model="m",version="1"'
    assert found[f'modelserve_request_duration_seconds_bucket{{{labels},le="0.1"}}'] == 0
    assert found[f'modelserve_request_duration_seconds_bucket{{{labels},le="0.125"}}'] == 5
    assert found[f"modelserve_request_duration_seconds_count{{{labels}}}"] == 5
    assert found[f"modelserve_request_duration_seconds_sum{{{labels}}}"] == pytest.approx(0.55)


def test_models_and_pools_are_shown_as_they_stand() -> None:
    """Generations, readiness, what waits, replicas by state, batches by size."""
    found = samples(Metrics(), Model(pool=pool(n1=5, n64=2)), Model("other", ready=False, production=None))
    assert found['modelserve_model_ready{model="m"}'] == 1
    assert found['modelserve_model_ready{model="other"}'] == 0
    assert found['modelserve_queue_depth{model="m"}'] == 3
    assert found['modelserve_registry_generation{model="m"}'] == 7
    assert found['modelserve_registry_generation_applied{model="m"}'] == 6
    assert found['modelserve_replicas{model="m",version="1",state="ready"}'] == 2
    assert found['modelserve_batches_total{model="m",version="1"}'] == 7
    assert found['modelserve_batch_rows_bucket{model="m",version="1",le="32"}'] == 5
    assert found['modelserve_batch_rows_sum{model="m",version="1"}'] == 133


def test_a_version_that_was_freed_leaves_no_labels() -> None:
    """Nothing of an unloaded version is shown. Its counts, batches too, go on from there should it come back."""
    metrics = Metrics()
    metrics(served())
    metrics(served(version="2"))
    samples(metrics, Model(pool=pool(n1=5)))
    metrics(VersionUnloaded("m", "1"))
    assert shown(metrics) == {"2"}
    metrics(VersionLoaded("m", "1", 3))
    metrics(served())
    found = samples(metrics, Model(pool=pool(n1=2)))
    assert found['modelserve_requests_total{model="m",version="1",outcome="ok"}'] == 2
    assert found['modelserve_batches_total{model="m",version="1"}'] == 7


@pytest.mark.parametrize("late", [WorkerLost("m", "1", "killed", 1.0), served()])
def test_what_comes_late_brings_no_labels_back(late: Event) -> None:
    """What is told of a version after it was freed does not show it again for good, but is not lost either."""
    metrics = Metrics()
    metrics(VersionLoaded("m", "1", 3))
    metrics(VersionUnloaded("m", "1"))
    metrics(late)
    assert shown(metrics) == set()
    metrics(VersionLoaded("m", "1", 4))
    labels = 'model="m",version="1"'
    found = samples(metrics)
    keys = f"modelserve_worker_losses_total{{{labels}}}", f'modelserve_requests_total{{{labels},outcome="ok"}}'
    assert sum(found[key] for key in keys) == 1


def test_a_worker_that_dies_while_its_version_loads_shows_no_labels() -> None:
    """A version that was refused is never unloaded either: its labels would stay."""
    metrics = Metrics()
    metrics(WorkerLost("m", "2", "killed", 1.0))
    metrics(LoadRejected("m", "2", 3, LoadFailed("no"), 1.0))
    assert shown(metrics) == set()


def test_an_unloaded_version_counts_while_another_process_has_it() -> None:
    """``both 2000``, one has unloaded, the other drains: still 2000."""
    one, two = Metrics(), Metrics()
    for metrics in (one, two):
        for _ in range(1000):
            metrics(served())
    one(VersionUnloaded("m", "1"))
    both = [metrics.figures([], None, ComponentCounts()) for metrics in (one, two)]
    found = merged(both, [], FAMILIES)
    assert found['modelserve_requests_total{model="m",version="1",outcome="ok"}'] == 2000


def test_an_unloaded_version_is_forgotten_when_nobody_has_had_it_for_a_day() -> None:
    """Memory does not grow with every version that ever was."""
    now = 0.0
    metrics = Metrics(clock=lambda: now)
    for version in ("1", "2"):
        metrics(served(version=version))
        metrics(VersionUnloaded("m", version))
    now += KEPT_S - 1
    metrics.seen_loaded({'model="m",version="1"'})
    now += 2
    metrics.seen_loaded(set())
    assert set(metrics.figures([], None, ComponentCounts()).unloaded) == {'model="m",version="1"'}
    now += KEPT_S
    metrics(VersionUnloaded("m", "3"))
    assert metrics.figures([], None, ComponentCounts()).unloaded == {}


def test_the_last_figures_keep_what_was_served() -> None:
    """When a server closes it frees every version, and what they did still counts in the sum of its host."""
    metrics = Metrics()
    metrics(served())
    metrics.close([Model(pool=pool(n1=5))])
    metrics(served())
    metrics(VersionUnloaded("m", "1"))
    found = samples(metrics)
    assert found['modelserve_requests_total{model="m",version="1",outcome="ok"}'] == 2
    assert found['modelserve_batches_total{model="m",version="1"}'] == 5


def test_losses_and_refusals_are_counted() -> None:
    """Workers that died and versions that did not load have their counts; so has the inference log."""
    metrics = Metrics()
    metrics(VersionLoaded("m", "1", 3))
    metrics(WorkerLost("m", "1", "killed", 1.0))
    metrics(LoadRejected("m", "2", 3, LoadFailed("no"), 1.0))
    log = LogStatus(sampled=10, written=4, dropped=3, refused=1, waiting=2, problem=None)
    found = samples(metrics, log=log)
    assert found['modelserve_worker_losses_total{model="m",version="1"}'] == 1
    assert found['modelserve_load_failures_total{model="m"}'] == 1
    assert found['modelserve_log_records_total{result="written"}'] == 4
    assert found['modelserve_log_records_total{result="dropped"}'] == 3
    assert found['modelserve_log_records_total{result="refused"}'] == 1
    assert found["modelserve_log_queue_rows"] == 2


def test_features_and_their_defaults_are_counted() -> None:
    """Each status of a feature has its count by model and store, waiting a histogram, rows with a default a count."""
    metrics = Metrics()
    metrics(served(rows=3, degraded=[(), ("spend",), ("spend", "visits")]))
    metrics(FeaturesRead("m", "redis", {"present": 4, "timeout": 3}, 4.0))
    metrics(FeaturesRead("m", "redis", {"present": 7}, 0.4))
    found = samples(metrics)
    assert found['modelserve_degraded_rows_total{model="m",version="1"}'] == 2
    assert found['modelserve_feature_reads_total{model="m",store="redis",status="present"}'] == 11
    assert found['modelserve_feature_reads_total{model="m",store="redis",status="timeout"}'] == 3
    waits = 'modelserve_feature_wait_seconds_bucket{store="redis",le="'
    assert [found[f'{waits}{bound}"}}'] for bound in ("0.0005", "0.003", "0.005", "+Inf")] == [1, 1, 2, 2]
    assert found['modelserve_feature_wait_seconds_sum{store="redis"}'] == pytest.approx(0.0044)


def test_what_others_count_is_shown() -> None:
    """The caches of predictions and of artifacts are asked for what they counted."""
    counted = ComponentCounts({("m", "local"): 5, ("m", "miss"): 2}, {"read": 1, "write": 0}, {"ok": 3})
    found = samples(Metrics(), counted=counted)
    assert found['modelserve_cache_requests_total{model="m",result="local"}'] == 5
    assert found['modelserve_cache_requests_total{model="m",result="miss"}'] == 2
    assert found['modelserve_cache_failures_total{operation="read"}'] == 1
    assert found['modelserve_artifact_downloads_total{result="ok"}'] == 3


def test_every_sample_has_its_family() -> None:
    """Nothing is written that has no help and no type, and every family can be shown."""
    metrics = Metrics()
    metrics(served())
    metrics(FeaturesRead("m", "redis", {"present": 4}, 4.0))
    metrics(LoadRejected("m", "2", 3, LoadFailed("no"), 1.0))
    log = LogStatus(sampled=1, written=1, dropped=0, refused=0, waiting=0, problem=None)
    counted = ComponentCounts({("m", "local"): 1}, {"read": 0}, {"ok": 1})
    written = text(samples(metrics, Model(pool=pool(n1=1)), log=log, counted=counted), FAMILIES)
    assert re.findall(r"^# TYPE (\w+)", written, re.MULTILINE) == [family.name for family in FAMILIES]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (WorkerDied("x"), "worker_died"),
        (InferenceFailed("x"), "inference_failed"),
        (KeyError(), "error"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_outcomes(error: BaseException, outcome: str) -> None:
    """An outcome is the kind of the error; foreign kinds, of which there is no end, are one."""
    assert outcome_of(error) == outcome
