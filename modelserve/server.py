"""The server: its lifecycle, and the way of a request on one screen.

:class:`AsyncModelServer` is the core and runs in the host's own event loop. :class:`ModelServer` runs the very same
object on one private event-loop thread, for hosts that have no loop. There is no second implementation.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar

from modelserve.artifacts import DiskCache, default_cache_folder
from modelserve.config import ModelOptions, Settings
from modelserve.errors import ForkedServer, InferenceFailed, InvalidInput, NotReady
from modelserve.events import Observer, Observers, Served
from modelserve.ids import uuid7_source
from modelserve.live import Live, ModelStatus
from modelserve.loading import LoadedVersion, Loader
from modelserve.registry import Registry
from modelserve.types import Json, ModelVersion, Prediction, Row

T = TypeVar("T")
_LOADS_AT_ONCE: Final = 4


Answer: TypeAlias = tuple[Sequence[Json], str, float, str]
"""What one request got: a value per row, the version that answered, the latency in milliseconds, the request's id."""


class AsyncModelServer:
    """Serves models inside an asyncio host.

    ``models`` names what to serve and how (None: every model that has a production version). Artifacts are kept
    under ``cache_dir``, at most ``cache_bytes`` of them; the registry is polled every ``poll_s`` seconds.

    Use it as ``async with AsyncModelServer(registry) as server``. All of it belongs to the loop that started it.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self.registry = registry
        self._models = None if models is None else dict(models)
        self._cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_folder()
        self._cache_bytes = cache_bytes
        self._poll_s = poll_s
        self._observers = Observers()
        self._live: Live | None = None
        self._closing = False
        self.new_request_id: Callable[[], str] = uuid7_source()

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> Self:
        """Build a server, registry included, from a TOML file, ``MODELSERVE_*`` and keyword arguments."""
        return cls(**_from_settings(Settings.load(path, **overrides)))

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
        ``DeadlineExceeded`` after ``timeout_ms`` (default: the model's), ``InferenceFailed``.
        """
        values, answered_by, latency_ms, request_id = await self.answer(
            model_name, (inputs,), "", request_id, version, timeout_ms
        )
        return Prediction(values[0], answered_by, latency_ms, request_id)

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
        values, answered_by, latency_ms, request_id = await self.answer(
            model_name, instances, "instances[{}]", request_id, version, timeout_ms
        )
        return [Prediction(value, answered_by, latency_ms, request_id) for value in values]

    async def answer(  # noqa: PLR0917  # by position: naming six arguments costs the hot path half a microsecond
        self,
        model_name: str,
        instances: Sequence[Any],
        where: str,
        request_id: str | None,
        version: str | None = None,
        timeout_ms: float | None = None,
    ) -> Answer:
        """Answer one request of one or more rows. Every prediction, from whichever face, goes through these lines.

        ``where`` says how an ``InvalidInput`` names row ``i``: ``"instances[{}]"``, or ``""`` for no prefix.
        """
        live = self._live_now()
        arrived = perf_counter()
        request_id = request_id or self.new_request_id()
        with live[model_name].choose(version) as target:
            try:
                rows = _validated(target, instances, where)
                deadline = self._now() + (target.timeout_s if timeout_ms is None else timeout_ms / 1000)
                values = _values(await target.pool.submit(rows, deadline))
            except Exception as error:
                self._served(target, request_id, len(instances), arrived, error)
                raise
            latency_ms = self._served(target, request_id, len(instances), arrived)
        return values, target.meta.version, latency_ms, request_id

    def _served(
        self, target: LoadedVersion, request_id: str, rows: int, arrived: float, error: Exception | None = None
    ) -> float:
        """Tell the observers; return the request's latency in milliseconds."""
        latency_ms = int((perf_counter() - arrived) * 1_000_000) / 1000  # uvloop's time() ticks in milliseconds
        if self._observers:
            meta = target.meta
            self._observers.emit(Served(meta.model_name, meta.version, request_id, rows, latency_ms, error))
        return latency_ms

    # -- looking at it -------------------------------------------------------------------------------------

    def status(self) -> list[ModelStatus]:
        """Return where each served model stands."""
        return self._live.status() if self._live is not None else []

    @property
    def ready(self) -> bool:
        """Whether there is at least one model to serve, and every one is loaded with its pool alive."""
        status = self.status()
        return not self._closing and bool(status) and all(model.ready for model in status)

    def loaded(self, model_name: str) -> LoadedVersion:
        """Return the version that answers a model's requests now. Raises ``ModelNotFound``, ``NotReady``."""
        return self._live_now()[model_name].production

    async def versions(self, model_name: str) -> list[ModelVersion]:
        """Return the registered versions of a model, newest first, without blocking the loop."""
        self._live_now()
        return await self._loop.run_in_executor(self._sql, self.registry.versions, model_name)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Have ``observer`` called with every event (see :mod:`modelserve.events`); returns what ends it."""
        return self._observers.subscribe(observer)

    # -- lifecycle -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what is wanted. A model that cannot be loaded does not keep the others, or the host, from starting."""
        if self._live is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self.new_request_id = uuid7_source()  # again, after any fork
        self._sql = ThreadPoolExecutor(2, thread_name_prefix="modelserve-sql")
        self._loads = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="modelserve-load")
        try:
            loader = await self._loop.run_in_executor(self._loads, self._open_loader)
            self._live = Live(
                self.registry, loader, self._sql, models=self._models, observers=self._observers, poll_s=self._poll_s
            )
            await self._live.start()
        except BaseException:
            await self._release()
            raise

    async def close(self) -> None:
        """Refuse new requests, answer the ones in flight, free everything. Safe to call twice."""
        if self._live is None or self._closing:
            return
        self._closing = True
        await self._release()
        self._closing = False

    async def _release(self) -> None:
        if self._live is not None:
            await self._live.stop()
            self._live = None
        self._sql.shutdown(wait=False)
        self._loads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_live", None) is not None:
            _warn(f"{type(self).__name__} was dropped without close()", ResourceWarning, source=self, stacklevel=2)

    def _live_now(self) -> Live:
        if self._live is None or self._closing:
            problem = "closing" if self._closing else "not started: use it as a context manager, or call start()"
            raise NotReady(f"the server is {problem}")
        return self._live

    def _open_loader(self) -> Loader:
        cache = DiskCache(self._cache_dir, max_bytes=self._cache_bytes)
        return Loader(self.registry.artifacts, cache, self._loads)


class ModelServer:
    """Serves models inside a synchronous host (Flask, Django, a script): the verbs of the async server, thread-safe.

    It may be made before a fork and is started after it: each process starts its own. Using a forked copy of a
    started server raises ``ForkedServer``.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self.core = AsyncModelServer(registry, models, cache_dir=cache_dir, cache_bytes=cache_bytes, poll_s=poll_s)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> Self:
        """Build a server, registry included, from a TOML file, ``MODELSERVE_*`` and keyword arguments."""
        return cls(**_from_settings(Settings.load(path, **overrides)))

    def predict(
        self,
        model_name: str,
        inputs: Mapping[str, Any],
        *,
        version: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Answer one row; options and errors as in :meth:`AsyncModelServer.predict`."""
        return self.call(
            self.core.predict(model_name, inputs, version=version, timeout_ms=timeout_ms, request_id=request_id)
        )

    def predict_many(
        self,
        model_name: str,
        instances: Sequence[Mapping[str, Any]],
        *,
        version: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """Answer several rows; options and errors as in :meth:`AsyncModelServer.predict_many`."""
        return self.call(
            self.core.predict_many(model_name, instances, version=version, timeout_ms=timeout_ms, request_id=request_id)
        )

    def status(self) -> list[ModelStatus]:
        """Return where each served model stands."""
        return self.core.status()

    @property
    def ready(self) -> bool:
        """Whether there is at least one model to serve, and every one is loaded with its pool alive."""
        return self.core.ready

    @property
    def started(self) -> bool:
        """Whether this process has started it."""
        return self._loop is not None and self._pid == os.getpid()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the core on the private loop and wait for it."""
        try:
            loop = self._running_loop()
        except Exception:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted, or has its error already
            raise

    def start(self) -> None:
        """Start the private loop and load what is wanted; returns when it has been loaded. Safe to call twice."""
        with self._lock:
            if self.started:
                return
            self._refuse_forked()
            self._pid = os.getpid()
            running = threading.Event()
            self._thread = threading.Thread(target=self._run_loop, args=(running,), name="modelserve", daemon=True)
            self._thread.start()
            running.wait()
        try:
            self.call(self.core.start())
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def close(self) -> None:
        """Answer what is in flight, free everything, end the loop. Safe to call twice, and in a forked copy."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None or not self.started:
                return
            asyncio.run_coroutine_threadsafe(self.core.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            self._loop = self._thread = None
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run_loop(self, running: threading.Event) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._loop.call_soon(running.set)
            self._loop.run_forever()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        self._refuse_forked()
        if self._loop is None:
            raise NotReady("the server is not started: use it as a context manager, or call start()")
        return self._loop

    def _refuse_forked(self) -> None:
        if self._loop is not None and self._pid != os.getpid():
            raise ForkedServer(self._pid, os.getpid())


def _from_settings(settings: Settings) -> dict[str, Any]:
    return {
        "registry": Registry(settings.registry, artifacts=settings.artifacts),
        "models": settings.models,
        "cache_dir": settings.cache_dir,
        "cache_bytes": settings.cache_bytes,
        "poll_s": settings.poll_s,
    }


def _validated(target: LoadedVersion, instances: Sequence[Any], where: str) -> list[Row]:
    if len(instances) > target.options.queue_limit:
        limit = target.options.queue_limit
        raise InvalidInput("instances", f"{len(instances)} rows; one request takes at most {limit}")
    rows: list[Row] = []
    try:
        for instance in instances:
            rows.append(target.signature.validate(instance))  # noqa: PERF401  # the count says which row was wrong
    except InvalidInput as error:
        raise error.within(where.format(len(rows))) from None
    return rows


def _values(results: Sequence[Json | Exception]) -> Sequence[Json]:
    """Return the values of a request's rows, or raise the first error among them."""
    for i, result in enumerate(results):
        if isinstance(result, Exception):
            if len(results) > 1 and isinstance(result, InferenceFailed):
                raise InferenceFailed(f"row {i}: {result}") from result
            raise result
    return results
