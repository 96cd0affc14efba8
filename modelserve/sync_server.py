"""The server for hosts that have no event loop: the very same one, on a loop of its own in a thread."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from modelserve.config import ModelOptions, ServerOptions, Settings
from modelserve.registry import Registry
from modelserve.server import AsyncModelServer
from modelserve.serving.inference import PredictRequest
from modelserve.serving.loops import PrivateLoop
from modelserve.serving.model_reconciler import ModelStatus
from modelserve.types import LogStatus, Prediction
from modelserve.wiring import from_settings

T = TypeVar("T")


class ModelServer:
    """Serves models inside a synchronous host (Flask, Django, a script): the verbs of the async server, thread-safe.

    It may be made before a fork and is started after it: each process starts its own. Using a forked copy of a
    started server raises ``ForkedServer``.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, ModelOptions] | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        self.core = AsyncModelServer(registry, models, **options)
        self._home = PrivateLoop(self.core.close)

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
        key: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """Answer one row; options and errors as in :meth:`AsyncModelServer.predict`."""
        request = PredictRequest(model_name, (inputs,), "", version, key, request_id, timeout_ms)
        return self.call(self.core.answer(request)).prediction()

    def predict_many(
        self,
        model_name: str,
        instances: Sequence[Mapping[str, Any]],
        *,
        version: str | None = None,
        key: str | None = None,
        timeout_ms: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]:
        """Answer several rows; options and errors as in :meth:`AsyncModelServer.predict_many`."""
        return self.call(
            self.core.predict_many(
                model_name, instances, version=version, key=key, timeout_ms=timeout_ms, request_id=request_id
            )
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
        return self._home.is_open

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the core on the private loop and wait for it."""
        return self._home.call(work)

    def start(self) -> None:
        """Start the private loop and load what is wanted; returns when that is done, whichever thread began it."""
        self._home.open()
        try:
            self.call(self.core.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Answer what is in flight, free everything, end the loop. Safe to call twice, and in a forked copy."""
        self._home.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
