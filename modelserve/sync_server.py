"""The server for hosts that have no event loop: the very same one, on a loop of its own in a thread."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from modelserve.artifacts import DOWNLOAD_LIMIT_S
from modelserve.config import ModelOptions, Settings
from modelserve.errors import ConfigError, ForkedServer, NotReady
from modelserve.execution import stack
from modelserve.keeper import ModelStatus
from modelserve.ports import Cache, ChangeHints, FeatureStore, TrustedKey
from modelserve.registry import Registry
from modelserve.server import AsyncModelServer, from_settings
from modelserve.types import LogStatus, Prediction

T = TypeVar("T")
_GREEN: Final = ("threading", "queue", "select", "subprocess")  # all of them gevent's, or none


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
        self.core = AsyncModelServer(
            registry,
            models,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            download_limit_s=download_limit_s,
            cache=cache,
            changes=changes,
            poll_s=poll_s,
            trusted_keys=trusted_keys,
            features=features,
            log=log,
            log_key=log_key,
            metrics=metrics,
            metrics_dir=metrics_dir,
        )
        self._gate = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @classmethod
    def from_config(cls, path: str | Path | None = None, **overrides: Any) -> Self:
        """Build a server, registry included, from a TOML file, ``MODELSERVE_*`` and keyword arguments."""
        return cls(**from_settings(Settings.load(path, **overrides)))

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
    def log_status(self) -> LogStatus | None:
        """What became of the rows that this process sampled for the inference log; None while there is no log."""
        return self.core.log_status

    def metrics(self) -> bytes | None:
        """Return the metrics in Prometheus' text format; None when they are off."""
        return self.call(self.core.metrics())

    @property
    def started(self) -> bool:
        """Whether this process has started it."""
        return self._loop is not None and self._pid == os.getpid()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the core on the private loop and wait for it."""
        try:
            future = self._hand_over(work)
        except Exception:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise NotReady("the server was closed") from None
        except BaseException:
            future.cancel()  # the caller was interrupted, or has its error already
            raise

    def start(self) -> None:
        """Start the private loop and load what is wanted; returns when that is done, also if another thread began it.

        Raises ``ConfigError`` where gevent has patched only a part of what the loop needs.
        """
        self._refuse_forked()
        _refuse_half_patched()
        with self._gate:
            if self._loop is None:
                self._start_loop()
        try:
            self.call(self.core.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Answer what is in flight, free everything, end the loop. Safe to call twice, and in a forked copy."""
        if not self.started:
            return
        with contextlib.suppress(NotReady):  # another thread closed it first
            self.call(self.core.close())
        with self._gate:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Give work to the loop. Under the gate, so that none is given to a loop that was told to stop."""
        self._refuse_forked()
        with self._gate:
            if self._loop is None:
                raise NotReady("the server is not started: use it as a context manager, or call start()")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _start_loop(self) -> None:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(loop,), name="modelserve", daemon=True)
        stack.start(self._thread)
        self._loop, self._pid = loop, os.getpid()
        atexit.register(self.close)

    def _refuse_forked(self) -> None:
        if self._loop is not None and self._pid != os.getpid():
            raise ForkedServer(self._pid, os.getpid())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _refuse_half_patched() -> None:
    """Refuse a host in which a thread would wait for greenlets that do not run there, or a greenlet would stop all."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return
    left = [name for name in _GREEN if not monkey.is_module_patched(name)]
    if left and len(left) < len(_GREEN):
        raise ConfigError(
            f"gevent has patched other modules, but not {', '.join(left)}: call gevent.monkey.patch_all() without "
            f"exceptions and before other imports, or leave all of {', '.join(_GREEN)} unpatched"
        )


def _run(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()
