"""The server: its lifecycle, and the way of a request on one screen.

:class:`AsyncModelServer` is the core and runs in the host's own event loop. For hosts that have none, ``sync_server``
runs the very same object on one private event-loop thread. There is no second implementation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

from modelserve import plugins, signing
from modelserve.artifacts import DOWNLOAD_LIMIT_S, DiskCache, default_cache_folder
from modelserve.caching import PredictionCache
from modelserve.config import ModelOptions, Settings
from modelserve.errors import (
    ConfigError,
    DeadlineExceeded,
    ForkedServer,
    InferenceFailed,
    InvalidInput,
    NotReady,
    NotRunning,
    NotRunningState,
    describe,
)
from modelserve.events import Observer, Observers, Served
from modelserve.features.reader import feature_reader_of
from modelserve.ids import uuid7_source
from modelserve.monitor.metrics.counters import ComponentCounts
from modelserve.monitor.telemetry import Telemetry
from modelserve.ports import Cache, ChangeHints, FeatureStore, TrustedKey
from modelserve.registry import Registry
from modelserve.resilience.executor import DaemonExecutor, call_with_timeout
from modelserve.resilience.shared_reads import SharedReads
from modelserve.serving.loader import Loader
from modelserve.serving.loops import elsewhere
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.serving.reconciler import Reconciler
from modelserve.serving.snapshots import Snapshots
from modelserve.serving.version import LoadedVersion
from modelserve.signature import AT_ONCE, Pieces
from modelserve.turns import Steps, in_turns
from modelserve.types import Json, LogStatus, ModelVersion, Prediction, Row, VersionPage

T = TypeVar("T")
_log = logging.getLogger("modelserve")
_LOADS_AT_ONCE: Final = 4
_LONGEST_ID: Final = 256
_CLOSE_S: Final = 5.0
"""How long somebody else's code may take to close."""
_NONE: Final[Sequence[tuple[str, ...]]] = ()


Answer: TypeAlias = tuple[Sequence[Json], str, float, str, Sequence[bool], Sequence[tuple[str, ...]]]
"""What one request got: a value per row, the version that answered, the latency in milliseconds, the request's id, for
each row whether it came from the cache, and which of its features have their default (both empty: none of any row)."""


class AsyncModelServer:
    """Serves models inside an asyncio host.

    ``models`` names what to serve and how (None: every model that has a production version). Artifacts are kept
    under ``cache_dir``, at most ``cache_bytes`` of them, and fetching one may take ``download_limit_s`` seconds. The
    registry is polled every ``poll_s`` seconds; ``changes`` tells of changes by other processes sooner: ``"postgres"``
    (the registry's own database) or ``"redis://…"``. Answers of models with a ``cache_ttl_s`` are kept in this process,
    and also in ``cache``: ``"redis://…"``, or an object that is a :class:`modelserve.ports.Cache`. ``features`` is the
    store that the models' features are read from: ``"redis://…"``, ``"dynamodb://table"``,
    ``"feast:///path"``, or an object. With ``trusted_keys`` (Ed25519 public keys: PEM texts or the paths of files), a
    version that none of them signed is refused.

    A sample of the answers is written to ``log``: a database's URL, by default the registry's own if this account may
    add to it; False for none. ``log_key`` makes the hashes of inputs in it keyed ones. ``metrics`` counts for
    ``GET /metrics``; host processes that share a ``metrics_dir`` answer with the sum of all.

    Use it as ``async with AsyncModelServer(registry) as server``. It lives in the loop that started it; calls from the
    loops of other threads are answered there.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        download_limit_s: float = DOWNLOAD_LIMIT_S,
        cache: str | Cache | None = None,
        changes: str | ChangeHints | None = None,
        poll_s: float = 1.0,
        trusted_keys: Sequence[str | Path | TrustedKey] = (),
        features: str | FeatureStore | None = None,
        log: str | Literal[False] | None = None,
        log_key: str | None = None,
        metrics: bool = True,
        metrics_dir: str | Path | None = None,
    ) -> None:
        _check_options(models, poll_s=poll_s, cache_bytes=cache_bytes, cache_dir=cache_dir, metrics_dir=metrics_dir)
        self.registry = registry
        self._kept = plugins.cache(cache) if isinstance(cache, str) else cache
        self._own_kept = self._kept if isinstance(cache, str) else None
        self._predictions: PredictionCache | None = None
        self._hints = registry.change_hints(changes) if isinstance(changes, str) else changes
        self._own_hints = self._hints if isinstance(changes, str) else None
        self._models = None if models is None else dict(models)
        # As it is now: the host may change its directory before it starts.
        self._cache_dir = (Path(cache_dir) if cache_dir is not None else default_cache_folder()).absolute()
        self._cache_bytes = cache_bytes
        self._download_limit_s = download_limit_s
        self._cache: DiskCache | None = None
        self._poll_s = poll_s
        self._trusted_keys = signing.trusted_keys(trusted_keys)
        _refuse_unmeetable(self._models or {}, self._trusted_keys)
        self._snapshots = Snapshots(self._cache_dir, registry.shown_url)
        self._observers = Observers()
        self._feature_reader = feature_reader_of(
            features,
            {name: options.declared_features for name, options in (self._models or {}).items()},
            self._observers,
        )
        self._telemetry = Telemetry(
            self._observers,
            self._models,
            log=None if log is False else registry.inference_log(log),
            log_is_default=log is None,
            log_key=log_key,
            metrics=metrics,
            metrics_dir=metrics_dir,
        )
        self._live: Reconciler | None = None
        self._executors: tuple[Executor, ...] = ()
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._otherwise: NotRunningState = "not started"  # its state while there is no task
        self._warned = False
        self.new_request_id: Callable[[], str] = uuid7_source()

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> Self:
        """Build a server, registry included, from a TOML file, ``MODELSERVE_*`` and keyword arguments."""
        return cls(**from_settings(Settings.load(path, **overrides)))

    # -- the way of a request ------------------------------------------------------------------------------

    async def predict(
        self,
        model_name: str,
        inputs: Mapping[str, Any],
        *,
        version: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Answer one row with the production version, or with ``version`` if it is loaded.

        Raises ``InvalidInput``, ``ModelNotFound``, ``VersionNotFound``, ``NotReady``, ``Overloaded``,
        ``DeadlineExceeded`` after ``timeout_ms`` (default: the model's), ``InferenceFailed``, and for a feature that is
        required and could not be read ``BackendUnavailable``.
        """
        values, answered_by, latency_ms, request_id, cached, degraded = await self.answer(
            model_name, (inputs,), "", request_id, version, timeout_ms
        )
        by_default = degraded[0] if degraded else ()
        return Prediction(values[0], answered_by, latency_ms, request_id, True in cached, by_default)

    async def predict_many(
        self,
        model_name: str,
        instances: Sequence[Mapping[str, Any]],
        *,
        version: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """Answer several rows by one version, in order; raises like :meth:`predict`, for the first row at fault."""
        if not instances:
            return []
        values, answered_by, latency_ms, request_id, cached, degraded = await self.answer(
            model_name, instances, "instances[{}]", request_id, version, timeout_ms
        )
        known, by_default = cached or [False] * len(values), degraded or [()] * len(values)
        return [
            Prediction(value, answered_by, latency_ms, request_id, hit, names)
            for value, hit, names in zip(values, known, by_default, strict=True)
        ]

    async def answer(  # noqa: PLR0917  # by position: naming six arguments costs the hot path half a microsecond
        self,
        model_name: str,
        instances: Sequence[Any] | Pieces,
        where: str,
        request_id: str | None,
        version: str | None = None,
        timeout_ms: float | None = None,
    ) -> Answer:
        """Answer one request of one or more rows. Every prediction, from whichever face, goes through these lines.

        ``where`` says how an ``InvalidInput`` names row ``i``: ``"instances[{}]"``, or ``""`` for no prefix.
        """
        live = self._live_now()
        if self._loop is not asyncio.get_running_loop():
            answering = self.answer(model_name, instances, where, request_id, version, timeout_ms)
            return await self._at_home(answering)
        arrived = perf_counter()
        request_id = _checked_id(request_id) if request_id else self.new_request_id()
        with live[model_name].choose(version) as target:
            rows: Sequence[Row] = ()
            degraded, known = _NONE, None
            try:
                limit_s = target.timeout_s if timeout_ms is None else timeout_ms / 1000
                deadline = self._now() + limit_s
                cache = self._predictions if target.cache_ttl_s else None
                plan = None if self._feature_reader is None else target.plan
                validate: Callable[[Any], Any] = target.signature.validate if plan is None else plan.validate
                if len(instances) * target.signature.size <= AT_ONCE and type(instances) is not Pieces:
                    pending = _validated(target, validate, instances, where)
                else:
                    pending = await _validated_in_turns(target, validate, instances, where)
                if plan is None or self._feature_reader is None:
                    rows = pending
                else:
                    if cache is not None and target.request_key is not None:
                        known = await cache.look(target, target.request_key, pending, deadline)
                    answered = () if known is None else known.answered
                    rows, degraded = await self._feature_reader.enrich(plan, pending, where, deadline, answered)
                if cache is not None:
                    results, cached = await cache.answer(target, rows, deadline, known, degraded)
                else:
                    results, cached = await target.pool.submit(rows, deadline), ()
                values = _values(results)
            except DeadlineExceeded as error:  # it tells of what was left when the last part of the way began
                late = DeadlineExceeded(limit_s, target.pool.at_least(len(instances)))
                self._served(target, request_id, len(instances), arrived, rows, degraded, error=late)
                raise late from error
            except (Exception, asyncio.CancelledError) as error:
                self._served(target, request_id, len(instances), arrived, rows, degraded, error=error)
                raise
            latency_ms = self._served(target, request_id, len(instances), arrived, rows, degraded, values, cached)
        return values, target.meta.version, latency_ms, request_id, cached, degraded

    def _served(  # noqa: PLR0917  # by position, as above
        self,
        target: LoadedVersion,
        request_id: str,
        count: int,
        arrived: float,
        rows: Sequence[Row],
        degraded: Sequence[tuple[str, ...]],
        values: Sequence[Json] = (),
        cached: Sequence[bool] = (),
        error: BaseException | None = None,
    ) -> float:
        """Tell the observers; return the request's latency in milliseconds."""
        latency_ms = int((perf_counter() - arrived) * 1_000_000) / 1000  # uvloop's time() ticks in milliseconds
        if self._observers:
            meta, signature = target.meta, target.signature
            who = meta.model_name, meta.version, request_id
            self._observers.emit(
                Served(*who, count, latency_ms, error, rows, values, cached, degraded, meta, signature)
            )
        return latency_ms

    # -- looking at it -------------------------------------------------------------------------------------

    def status(self) -> list[ModelStatus]:
        """Return where each served model stands."""
        return self._live.status() if self._live is not None else []

    @property
    def ready(self) -> bool:
        """Whether there is at least one model to serve, and every one is loaded with its pool alive."""
        status = self.status()
        return self._closing is None and bool(status) and all(model.ready for model in status)

    @property
    def state(self) -> NotRunningState | Literal["running"]:
        """Where the server itself stands."""
        if self._closing is not None:
            return "closing"
        if self._opening is None:
            return self._otherwise
        return "running" if self._opening.done() else "starting"

    @property
    def runs_here(self) -> bool:
        """Whether it is started, in the event loop that runs this."""
        return self.state == "running" and self._loop is asyncio.get_running_loop()

    @property
    def home(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it was started in; None while it is not started."""
        return None if self._opening is None else self._opening.get_loop()

    def loaded(self, model_name: str) -> LoadedVersion:
        """Return the version that answers a model's requests now. Raises ``ModelNotFound``, ``NotReady``."""
        return self._live_now()[model_name].production

    @property
    def log_status(self) -> LogStatus | None:
        """What became of the rows that this process sampled for the inference log; None while there is no log."""
        return self._telemetry.log_status

    @property
    def counts(self) -> bool:
        """Whether there are metrics."""
        return self._telemetry.counts

    async def metrics(self) -> bytes | None:
        """Return the metrics in Prometheus' text format; None when they are off."""
        self._live_now()
        return await self._telemetry.figures()

    def status_of(self, model_name: str) -> ModelStatus:
        """Return where one served model stands. Raises ``ModelNotFound``."""
        return self._live_now().status_of(model_name)

    async def versions(self, model_name: str) -> list[ModelVersion]:
        """Return the registered versions of a model, newest first, without blocking the loop."""
        self._live_now()
        return await call_with_timeout(self._sql, self.registry.versions, model_name)

    async def page(self, model_name: str, limit: int = 20, before: str | None = None) -> VersionPage:
        """Return a page of a model's versions, newest first: one read, a second old at most, for all who ask for it.

        Raises ``VersionNotFound`` for an unknown ``before``, and ``BackendUnavailable``.
        """
        self._live_now()
        return await self._pages.get((model_name, limit, before), self.registry.page, model_name, limit, before)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Have ``observer`` called with every event (see :mod:`modelserve.events`); returns what ends it."""
        return self._observers.subscribe(observer)

    # -- lifecycle -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what is wanted. A model that cannot be loaded does not keep the others, or the host, from starting.

        Callers share one start. One that is cancelled leaves it running; :meth:`close` ends it.
        """
        if self._is_away():
            await self._at_home(self.start())
            return
        if self._closing is not None:
            await asyncio.shield(self._closing)
        if self._opening is None:
            self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
            self._opening = asyncio.create_task(self._open(), name="modelserve-open")
        opening = self._opening
        await asyncio.wait([opening])
        if opening.cancelled():
            raise NotReady("the server was closed while it started")
        opening.result()

    async def close(self) -> None:
        """Refuse new requests, answer the ones in flight, free everything. Safe to call twice, also at once."""
        if self._is_away():
            await self._at_home(self.close())
            return
        if self._opening is None:
            return
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut(self._opening), name="modelserve-close")
        await asyncio.shield(self._closing)

    def _is_away(self) -> bool:
        """Whether it lives in another loop. One that has ended without closing it leaves nothing that could be used."""
        home = self.home
        if home is None or home is asyncio.get_running_loop():
            return False
        if not home.is_running():
            self._abandon()
            return False
        return True

    async def _at_home(self, work: Coroutine[Any, Any, T]) -> T:
        if self._pid != os.getpid():
            work.close()
            raise ForkedServer(self._pid, os.getpid())
        return await elsewhere(self._loop, work)

    def _abandon(self) -> None:
        _log.error("lost: the event loop of the server has ended before close(); requests on their way got no answer")
        if self._live is not None:
            self._live.abandon()
        self._telemetry.stop_observing()
        if self._cache is not None:
            self._cache.close()
        for executor in self._executors:
            executor.shutdown(wait=False)
        self._live = self._predictions = self._cache = self._opening = self._closing = None
        self._otherwise = "closed"

    async def _open(self) -> None:
        self._now = self._loop.time
        self.new_request_id = uuid7_source()  # again, after any fork
        self._sql = DaemonExecutor(2, "modelserve-sql")
        self._following = DaemonExecutor(
            1, "modelserve-follow"
        )  # its own: pages that are read must not hold up a rollback
        self._loads = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="modelserve-load")
        self._starts = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="modelserve-start")
        self._disk = DaemonExecutor(1, "modelserve-disk")
        self._executors = (self._sql, self._following, self._loads, self._starts, self._disk)
        self._pages = SharedReads[VersionPage](self._sql)
        try:
            await self._telemetry.start(self.status, self._counted)
            self._predictions = PredictionCache.over(self._kept)
            if any(options.cache_ttl_s for options in (self._models or {}).values()):
                await self._predictions.open()
            if self._feature_reader is not None:
                await self._feature_reader.start()
            loader = await self._loop.run_in_executor(self._loads, self._open_loader)
            if await self._loop.run_in_executor(self._loads, self._snapshots.load):
                self.registry.expect()
            self._live = Reconciler(
                self.registry,
                loader,
                self._following,
                self._disk,
                models=self._models,
                observers=self._observers,
                poll_s=self._poll_s,
                hints=self._hints,
                snapshots=self._snapshots,
            )
            await self._live.start()
        except BaseException:
            await self._release()
            self._opening = None
            raise

    async def _shut(self, opening: asyncio.Task[None]) -> None:
        try:
            opening.cancel()
            await asyncio.wait([opening])
            await self._release()
        finally:
            self._opening = self._closing = None
            self._otherwise = "closed"

    async def _release(self) -> None:
        """Free everything, one after the other, whichever of it fails: an adapter can be anybody's code."""
        live, self._live = self._live, None
        if self._cache is not None:
            self._cache.close()  # or the interpreter, when it exits, waits for a download that nobody wants
        if live is not None:
            self._telemetry.close(live.status())
            await _ended(live.stop)
        if self._predictions is not None:
            await _ended(self._predictions.close)
        if self._feature_reader is not None:
            await _ended(self._feature_reader.close, _CLOSE_S)
        await _ended(self._telemetry.stop)
        self._predictions = self._cache = None
        if live is not None and self._own_hints is not None:
            await _ended(partial(self._close_hints, self._own_hints))
        for executor in self._executors:
            executor.shutdown(wait=False)
        if self._own_kept is not None:
            await _ended(self._own_kept.close, _CLOSE_S)

    async def _close_hints(self, hints: ChangeHints) -> None:
        # The threads for SQL may all be waiting for a database that stands still.
        closing = ThreadPoolExecutor(1, thread_name_prefix="modelserve-close")
        await self._loop.run_in_executor(closing, hints.close)
        closing.shutdown(wait=False)

    def _counted(self) -> ComponentCounts:
        """Return what the cache of predictions and that of artifacts have counted."""
        return ComponentCounts(
            cache_rows={} if self._predictions is None else self._predictions.counts,
            cache_failures={} if self._predictions is None else self._predictions.failures,
            downloads={} if self._cache is None else self._cache.downloads,
        )

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_live", None) is not None:
            _warn(f"{type(self).__name__} was dropped without close()", ResourceWarning, source=self, stacklevel=2)

    def _live_now(self) -> Reconciler:
        if self._live is None or self._closing is not None:
            raise self._not_running()
        return self._live

    def _not_running(self) -> NotRunning:
        state = self.state
        assert state != "running"
        error = NotRunning(state)
        if state == "not started" and not self._warned:
            self._warned = True  # once: the errors say it every time
            _log.warning("unavailable: %s", error)
        return error

    def _open_loader(self) -> Loader:
        self._cache = DiskCache(
            self._cache_dir,
            max_bytes=self._cache_bytes,
            download_limit_s=self._download_limit_s,
            spared=self._snapshots.artifact_keys,
        )
        return Loader(
            self.registry.artifacts,
            self._cache,
            self._loads,
            self._observers,
            starts=self._starts,
            trusted_keys=self._trusted_keys,
        )


def _checked_id(request_id: str) -> str:
    if not isinstance(request_id, str) or len(request_id) > _LONGEST_ID or not request_id.isprintable():
        raise InvalidInput("request_id", f"give a string of at most {_LONGEST_ID} printable characters")
    return request_id


async def _ended(step: Callable[[], Coroutine[Any, Any, None]], limit_s: float | None = None) -> None:
    """Take one step of closing. One that fails, or takes longer than it may, is told and left behind."""
    task = asyncio.ensure_future(step())
    await asyncio.wait([task], timeout=limit_s)
    if not task.done():
        task.cancel()
        _log.error("closing: %s did not end within %g s", step, limit_s)
    elif not task.cancelled() and (error := task.exception()) is not None:
        _log.error("closing: %s", describe(error), exc_info=error)


def from_settings(settings: Settings) -> dict[str, Any]:
    """Return what either server is made with, its registry among it."""
    return {
        "registry": Registry(settings.registry, artifacts=settings.artifacts, changes=settings.changes),
        "models": settings.models,
        "cache_dir": settings.cache_dir,
        "cache_bytes": settings.cache_bytes,
        "download_limit_s": settings.download_limit_s,
        "cache": settings.cache,
        "changes": settings.changes,
        "poll_s": settings.poll_s,
        "trusted_keys": settings.trusted_keys,
        "features": settings.features,
        "log": settings.log,
        "log_key": None if settings.log_key is None else settings.log_key.get_secret_value(),
        "metrics": settings.metrics,
        "metrics_dir": settings.metrics_dir,
    }


def _check_options(models: Any, *, poll_s: Any, cache_bytes: Any, **folders: Any) -> None:
    """Refuse what :class:`Settings` would refuse, and what would only be noticed once models are loaded."""
    if not isinstance(poll_s, int | float) or not poll_s > 0:
        raise ConfigError(f"poll_s: expected seconds, more than 0, got {poll_s!r:.40}")
    if cache_bytes is not None and (not isinstance(cache_bytes, int) or cache_bytes < 1):
        raise ConfigError(f"cache_bytes: expected a number of bytes, got {cache_bytes!r:.40}")
    for option, folder in folders.items():
        if folder == "":
            raise ConfigError(f"{option}: name a folder, or leave it out")  # as a path it would be the present folder
    for name, options in (models or {}).items():
        if not isinstance(options, ModelOptions):
            raise ConfigError(f"models.{name}: expected ModelOptions(...), got {type(options).__name__}")


def _refuse_unmeetable(models: Mapping[str, ModelOptions], trusted_keys: Sequence[TrustedKey]) -> None:
    for name, options in models.items():
        if options.require_signature and not trusted_keys:
            raise ConfigError(f"models.{name}.require_signature: no signature could be verified; give trusted_keys=")


def _validated(
    target: LoadedVersion, validate: Callable[[Any], T], instances: Sequence[Any] | Pieces, where: str
) -> list[T]:
    _refuse_too_many(target, instances)
    rows: list[T] = []
    try:
        for instance in instances:
            rows.append(validate(instance))  # noqa: PERF401  # the count says which row was wrong
    except InvalidInput as error:
        raise error.within(where.format(len(rows))) from None
    return rows


async def _validated_in_turns(
    target: LoadedVersion, validate: Callable[[Any], T], instances: Sequence[Any] | Pieces, where: str
) -> list[T]:
    """Validate rows that hold very much, or came in pieces, without holding the loop meanwhile."""
    _refuse_too_many(target, instances)
    rows: list[T] = []

    def steps() -> Steps[None]:
        for instance in instances:
            rows.append(validate((yield from target.signature.prepare(instance))))
            if len(rows) % rows_at_once == 0:
                yield

    rows_at_once = max(1, AT_ONCE // target.signature.size)
    try:
        await in_turns(steps())
    except InvalidInput as error:
        raise error.within(where.format(len(rows))) from None
    return rows


def _refuse_too_many(target: LoadedVersion, instances: Sequence[Any] | Pieces) -> None:
    limit = target.options.queue_limit
    if len(instances) > limit:
        raise InvalidInput("instances", f"{len(instances)} rows; one request takes at most {limit}")


def _values(results: Sequence[Json | Exception]) -> Sequence[Json]:
    """Return the values of a request's rows, or raise the first error among them."""
    for i, result in enumerate(results):
        if isinstance(result, Exception):
            if len(results) > 1 and isinstance(result, InferenceFailed):
                raise InferenceFailed(f"row {i}: {result}") from result
            raise result
    return results
