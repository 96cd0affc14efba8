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
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, Unpack

from modelserve.config import ModelOptions, ServerOptions, Settings
from modelserve.errors import (
    ForkedServer,
    NotReady,
    NotRunning,
    NotRunningState,
)
from modelserve.events import Observer, Observers
from modelserve.ids import uuid7_source
from modelserve.registry import Registry
from modelserve.resilience.executor import call_with_timeout
from modelserve.serving.inference import Inference, PredictRequest
from modelserve.serving.loops import elsewhere
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.serving.version import LoadedVersion
from modelserve.types import LogStatus, ModelVersion, Prediction, VersionPage
from modelserve.wiring import Running, Wiring, from_settings

T = TypeVar("T")
_log = logging.getLogger("modelserve")


class AsyncModelServer:
    """Serves models inside an asyncio host.

    ``models`` names what to serve and how (None: every model that has a production version). The options are those of
    :class:`modelserve.config.ServerOptions`. Raises ``ConfigError`` for options with which no server could start.

    Use it as ``async with AsyncModelServer(registry) as server``. It lives in the loop that started it; calls from the
    loops of other threads are answered there.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        self.registry = registry
        self.new_request_id: Callable[[], str] = uuid7_source()
        self._observers = Observers()
        self._wiring = Wiring(registry, models, self._observers, options)
        self._running: Running | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._otherwise: NotRunningState = "not started"  # its state while there is no task
        self._warned = False

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
        key: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Answer one row with the production version, or with ``version`` if it is loaded.

        ``key`` is the unit that a canary keeps on one version, such as a user's id: at most 256 printable characters.
        Raises ``InvalidInput``, ``ModelNotFound``, ``VersionNotFound``, ``NotReady``, ``Overloaded``,
        ``DeadlineExceeded`` after ``timeout_ms`` (default: the model's), ``InferenceFailed``, and for a feature that is
        required and could not be read ``BackendUnavailable``.
        """
        request = PredictRequest(model_name, (inputs,), "", version, key, request_id, timeout_ms)
        return (await self.answer(request)).prediction()

    async def predict_many(
        self,
        model_name: str,
        instances: Sequence[Mapping[str, Any]],
        *,
        version: str | None = None,
        key: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """Answer several rows by one version, in order; raises like :meth:`predict`, for the first row at fault."""
        if not instances:
            return []
        request = PredictRequest(model_name, instances, "instances[{}]", version, key, request_id, timeout_ms)
        inference = await self.answer(request)
        return [inference.prediction(row) for row in range(len(instances))]

    async def answer(self, request: PredictRequest) -> Inference:
        """Answer one request of one or more rows. Every prediction, from every face, goes through these lines."""
        running = self._require_running()
        if self._loop is not asyncio.get_running_loop():
            return await self._at_home(self.answer(request))
        version, arm = running.reconciler[request.model_name].choose(request)
        with Inference(request, version, arm, self._observers, self.new_request_id) as inference:
            await inference.validate()
            if version.caches_by_request:
                await inference.look_up(running.predictions)  # before its features are read
            if version.plan is not None:
                await inference.complete(running.features)
            if version.cache_ttl_s:
                await inference.execute_cached(running.predictions)  # known, joined, or run and kept
            else:
                await inference.execute()  # batch, replica, model
        return inference

    # -- looking at it -------------------------------------------------------------------------------------

    def status(self) -> list[ModelStatus]:
        """Return where each served model stands."""
        return [] if self._running is None else self._running.reconciler.status()

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

    def serving_version(self, model_name: str) -> LoadedVersion:
        """Return the version that answers a model's requests now. Raises ``ModelNotFound``, ``NotReady``."""
        return self._require_running().reconciler[model_name].production

    @property
    def log_status(self) -> LogStatus | None:
        """What became of the rows that this process sampled for the inference log; None while there is no log."""
        return self._wiring.telemetry.log_status

    @property
    def metrics_enabled(self) -> bool:
        """Whether there are metrics."""
        return self._wiring.telemetry.counts

    async def metrics(self) -> bytes | None:
        """Return the metrics in Prometheus' text format; None when they are off."""
        return await self._require_running().telemetry.figures()

    def status_of(self, model_name: str) -> ModelStatus:
        """Return where one served model stands. Raises ``ModelNotFound``."""
        return self._require_running().reconciler.status_of(model_name)

    async def versions(self, model_name: str) -> list[ModelVersion]:
        """Return the registered versions of a model, newest first, without blocking the loop."""
        return await call_with_timeout(self._require_running().executors.sql, self.registry.versions, model_name)

    async def page(self, model_name: str, limit: int = 20, before: str | None = None) -> VersionPage:
        """Return a page of a model's versions, newest first: one read, a second old at most, for all who ask for it.

        Raises ``VersionNotFound`` for an unknown ``before``, and ``BackendUnavailable``.
        """
        return await self._require_running().pages.get(
            (model_name, limit, before), self.registry.page, model_name, limit, before
        )

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
        if self._running is not None:
            self._running.abandon()
        self._running = self._opening = self._closing = None
        self._otherwise = "closed"

    async def _open(self) -> None:
        self.new_request_id = uuid7_source()  # again, after any fork
        try:
            self._running = await self._wiring.open()
            await self._running.reconciler.start()
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
        running, self._running = self._running, None
        if running is not None:
            await running.close()

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
        if getattr(self, "_running", None) is not None:
            _warn(f"{type(self).__name__} was dropped without close()", ResourceWarning, source=self, stacklevel=2)

    def _require_running(self) -> Running:
        if self._running is None or self._closing is not None:
            raise self._not_running()
        return self._running

    def _not_running(self) -> NotRunning:
        state = self.state
        assert state != "running"
        error = NotRunning(state)
        if state == "not started" and not self._warned:
            self._warned = True  # once: the errors say it every time
            _log.warning("unavailable: %s", error)
        return error
