"""The wiring: a server's options become its parts, and the parts a running server. All of them meet here alone."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias

from modelserve import plugins, signing
from modelserve.artifacts import DOWNLOAD_LIMIT_S, DiskCache, default_cache_folder
from modelserve.caching import PredictionCache
from modelserve.config import ModelOptions, ServerOptions, Settings
from modelserve.errors import ConfigError, describe
from modelserve.events import Observers
from modelserve.features.reader import FeatureReader, feature_reader_of
from modelserve.monitor.metrics.counters import ComponentCounts
from modelserve.monitor.telemetry import Telemetry
from modelserve.ports import ChangeHints, TrustedKey
from modelserve.registry import Registry
from modelserve.resilience.executor import DaemonExecutor
from modelserve.resilience.shared_reads import SharedReads
from modelserve.serving.loader import Loader, LoadThreads
from modelserve.serving.reconciler import Reconciler
from modelserve.serving.snapshots import Snapshots
from modelserve.types import Role, VersionPage

_log = logging.getLogger("modelserve")
_LOADS_AT_ONCE: Final = 4
_CLOSE_S: Final = 5.0
"""How long an adapter, which can be third-party code, may take to close."""


class _Executors(NamedTuple):
    """The threads of a running server. Each kind has its own, so that none waits for another's backend."""

    sql: DaemonExecutor
    follow: DaemonExecutor
    """For the reconciler's reads: pages that clients ask for must not hold up a rollback."""
    loads: ThreadPoolExecutor
    starts: ThreadPoolExecutor
    disk: DaemonExecutor
    canary: LoadThreads
    shadow: LoadThreads

    @classmethod
    def opened(cls) -> Self:
        return cls(
            DaemonExecutor(2, "modelserve-sql"),
            DaemonExecutor(1, "modelserve-follow"),
            ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="modelserve-load"),
            ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="modelserve-start"),
            DaemonExecutor(1, "modelserve-disk"),
            _load_threads("canary"),
            _load_threads("shadow"),
        )

    def shutdown(self) -> None:
        own = (self.sql, self.follow, self.loads, self.starts, self.disk)
        for executor in (*own, *self.canary, *self.shadow):
            executor.shutdown(wait=False)


def _load_threads(role: Role) -> LoadThreads:
    """Return threads for the loads of one role; they start when there is such a load."""
    return LoadThreads(
        ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix=f"modelserve-load-{role}"),
        ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix=f"modelserve-start-{role}"),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """What exists only while a server runs, in the event loop that it was started in."""

    executors: _Executors
    pages: SharedReads[VersionPage]
    disk_cache: DiskCache
    predictions: PredictionCache
    features: FeatureReader | None
    telemetry: Telemetry
    reconciler: Reconciler
    stack: AsyncExitStack

    async def close(self) -> None:
        """Answer what is in flight, then free every part, the last one to be opened first."""
        await self.stack.aclose()

    def abandon(self) -> None:
        """Free what can be freed without the loop, which has ended."""
        self.reconciler.abandon()
        self.telemetry.stop_observing()
        self.disk_cache.close()
        self.executors.shutdown()


class Wiring:
    """The parts of one server as its options say: made once, opened each time that the server starts.

    Raises ``ConfigError`` for options with which no server could start.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None,
        observers: Observers,
        options: ServerOptions,
    ) -> None:
        _check(models, options)
        self._registry = registry
        self._models = None if models is None else dict(models)
        self._observers = observers
        self._poll_s = options.get("poll_s", 1.0)
        self._trusted_keys = signing.trusted_keys(options.get("trusted_keys", ()))
        _refuse_unmeetable(self._models or {}, self._trusted_keys)
        cache, changes = options.get("cache"), options.get("changes")
        self._cache = plugins.cache(cache) if isinstance(cache, str) else cache
        self._owns_cache = isinstance(cache, str)
        self._hints = registry.change_hints(changes) if isinstance(changes, str) else changes
        self._owns_hints = isinstance(changes, str)
        folder = options.get("cache_dir")
        # As it is now: the host may change its directory before it starts.
        self._cache_dir = (default_cache_folder() if folder is None else Path(folder)).absolute()
        self._snapshots = Snapshots(self._cache_dir, registry.shown_url)
        self._new_disk_cache = partial(
            DiskCache,
            self._cache_dir,
            max_bytes=options.get("cache_bytes"),
            download_limit_s=options.get("download_limit_s", DOWNLOAD_LIMIT_S),
            spared=self._snapshots.artifact_keys,
        )
        self._features = feature_reader_of(
            options.get("features"),
            {name: model.declared_features for name, model in (self._models or {}).items()},
            observers,
        )
        log = options.get("log")
        self.telemetry = Telemetry(
            observers,
            self._models,
            log=None if log is False else registry.inference_log(log),
            log_is_default=log is None,
            log_key=options.get("log_key"),
            metrics=options.get("metrics", True),
            metrics_dir=options.get("metrics_dir"),
        )

    async def open(self) -> Running:
        """Open every part but the reconciler, which the caller starts. One that fails closes those before it.

        The order is that of their use: what is opened later uses what was opened before, and is closed first.
        """
        async with AsyncExitStack() as stack:
            if self._owns_cache and self._cache is not None:
                _on_close(stack, self._cache.close, _CLOSE_S)
            executors = _Executors.opened()
            stack.callback(executors.shutdown)
            loop = asyncio.get_running_loop()
            disk_cache = await loop.run_in_executor(executors.loads, self._new_disk_cache)
            if await loop.run_in_executor(executors.loads, self._snapshots.load):
                self._registry.expect()
            predictions = PredictionCache.over(self._cache)
            reconciler = self._new_reconciler(disk_cache, executors)

            def counted() -> ComponentCounts:
                return ComponentCounts(predictions.counts, predictions.failures, disk_cache.downloads)

            if self._owns_hints and self._hints is not None:
                _on_close(stack, partial(_close_hints, self._hints))
            _on_close(stack, self.telemetry.stop)
            await self.telemetry.start(reconciler.status, counted)
            if self._features is not None:
                _on_close(stack, self._features.close, _CLOSE_S)
                await self._features.start()
            _on_close(stack, predictions.close)
            if any(model.cache_ttl_s for model in (self._models or {}).values()):
                await predictions.open()
            _on_close(stack, reconciler.stop)
            stack.callback(lambda: self.telemetry.close(reconciler.status()))
            stack.callback(disk_cache.close)  # first: the interpreter would wait at its exit for a download
            return Running(
                executors,
                SharedReads[VersionPage](executors.sql),
                disk_cache,
                predictions,
                self._features,
                self.telemetry,
                reconciler,
                stack.pop_all(),
            )

    def _new_reconciler(self, disk_cache: DiskCache, executors: _Executors) -> Reconciler:
        loader = Loader(
            self._registry.artifacts,
            disk_cache,
            executors.loads,
            self._observers,
            starts=executors.starts,
            lesser={"canary": executors.canary, "shadow": executors.shadow},
            trusted_keys=self._trusted_keys,
        )
        return Reconciler(
            self._registry,
            loader,
            executors.follow,
            executors.disk,
            models=self._models,
            observers=self._observers,
            poll_s=self._poll_s,
            hints=self._hints,
            snapshots=self._snapshots,
        )


# -- closing -----------------------------------------------------------------------------------------------


_Step: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def _on_close(stack: AsyncExitStack, step: _Step, limit_s: float | None = None) -> None:
    stack.push_async_callback(_ended, step, limit_s)


async def _ended(step: _Step, limit_s: float | None) -> None:
    """Take one step of closing. One that fails, or takes longer than it may, is logged and left behind."""
    task = asyncio.ensure_future(step())
    await asyncio.wait([task], timeout=limit_s)
    if not task.done():
        task.cancel()
        _log.error("failed to close: %s did not end within %g s", step, limit_s)
    elif not task.cancelled() and (error := task.exception()) is not None:
        _log.error("failed to close: %s", describe(error), exc_info=error)


async def _close_hints(hints: ChangeHints) -> None:
    # The threads for SQL may all be waiting for a frozen database.
    closing = ThreadPoolExecutor(1, thread_name_prefix="modelserve-close")
    await asyncio.get_running_loop().run_in_executor(closing, hints.close)
    closing.shutdown(wait=False)


# -- options -----------------------------------------------------------------------------------------------


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


def _check(models: Any, options: ServerOptions) -> None:
    """Refuse what :class:`Settings` would refuse, and what would only be noticed once models are loaded."""
    for name in options.keys() - ServerOptions.__annotations__.keys():
        near = difflib.get_close_matches(name, ServerOptions.__annotations__, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(f"{name!r} is not an option of a server{hint}")
    poll_s, cache_bytes = options.get("poll_s", 1.0), options.get("cache_bytes")
    if not isinstance(poll_s, int | float) or not poll_s > 0:
        raise ConfigError(f"poll_s: expected seconds, more than 0, got {poll_s!r:.40}")
    if cache_bytes is not None and (not isinstance(cache_bytes, int) or cache_bytes < 1):
        raise ConfigError(f"cache_bytes: expected a number of bytes, got {cache_bytes!r:.40}")
    for option in ("cache_dir", "metrics_dir"):
        if options.get(option) == "":
            raise ConfigError(f"{option}: name a folder, or leave it out")  # as a path it would be the present folder
    for name, model in (models or {}).items():
        if not isinstance(model, ModelOptions):
            raise ConfigError(f"models.{name}: expected ModelOptions(...), got {type(model).__name__}")


def _refuse_unmeetable(models: Mapping[str, ModelOptions], trusted_keys: Sequence[TrustedKey]) -> None:
    for name, options in models.items():
        if options.require_signature and not trusted_keys:
            raise ConfigError(f"models.{name}.require_signature: no signature could be verified; give trusted_keys=")
