"""Everything that watches one server: what is logged of its answers, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from modelserve.config import ModelOptions
from modelserve.events import Observers
from modelserve.monitor.log.writer import InferenceLog, log_key_of
from modelserve.monitor.metrics.counters import ComponentCounts, Metrics, ModelState
from modelserve.monitor.metrics.exporter import Exporter
from modelserve.monitor.metrics.exposition import Figures
from modelserve.ports import LogStore
from modelserve.types import LogStatus


class Telemetry:
    """Subscribes the inference log and the metrics, and ends them after the last answer.

    ``log`` is where answers are logged (None: nowhere), ``log_is_default`` says that nobody named that place. Raises
    ``ConfigError`` for a ``log_key`` that is too short.
    """

    def __init__(
        self,
        observers: Observers,
        models: Mapping[str, ModelOptions] | None,
        *,
        log: LogStore | None,
        log_is_default: bool,
        log_key: str | None,
        metrics: bool,
        metrics_dir: str | Path | None,
    ) -> None:
        self._observers = observers
        self._models = models
        samples = models is None or any(options.log_sample_rate for options in models.values())
        self._store = log if samples else None
        self._log_is_default = log_is_default
        self._log_key = log_key_of(log_key)
        self.counts = metrics
        """Whether there are metrics."""
        self._metrics_dir = None if metrics_dir is None else Path(metrics_dir)
        self._log: InferenceLog | None = None
        self._exporter: Exporter | None = None
        self._subscriptions: list[Callable[[], None]] = []

    @property
    def log_status(self) -> LogStatus | None:
        """What became of the rows that were sampled; None while there is no log."""
        return None if self._log is None or self._log.off else self._log.status()

    async def figures(self) -> bytes | None:
        """Return the metrics in Prometheus' text format; None when they are off."""
        return None if self._exporter is None else await self._exporter.text()

    async def start(self, status: Callable[[], Sequence[ModelState]], counted: Callable[[], ComponentCounts]) -> None:
        """Begin. ``status`` tells how the models stand, ``counted`` what others have counted.

        Raises ``ConfigError`` when ``metrics_dir`` cannot be used.
        """
        if self.counts:
            counts = self._counts = Metrics()

            def figures() -> Figures:
                return counts.figures(status(), self.log_status, counted())

            self._exporter = Exporter(figures, self._metrics_dir, counts.seen_loaded)
            await self._exporter.start()
            self._subscriptions.append(self._observers.subscribe(counts))
        if self._store is not None:
            self._start_log(self._store)

    def _start_log(self, store: LogStore) -> None:
        loop = asyncio.get_running_loop()

        def turned_off() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(unsubscribe)

        self._log = InferenceLog(
            store, self._models, key=self._log_key, optional=self._log_is_default, turned_off=turned_off
        )
        unsubscribe = self._observers.subscribe(self._log)
        self._subscriptions.append(unsubscribe)
        self._log.start()

    def close(self, models: Sequence[ModelState]) -> None:
        """Learn that every version is to be freed now, which is no reason to forget what it did."""
        if self._exporter is not None:
            self._counts.close(models)

    def stop_observing(self) -> None:
        """Count and note nothing more."""
        for unsubscribe in self._subscriptions:
            unsubscribe()
        self._subscriptions.clear()

    async def stop(self) -> None:
        """Write what is left. Called when the last request was answered."""
        self.stop_observing()
        if self._log is not None:
            await self._log.stop()
        if self._exporter is not None:
            await self._exporter.stop()
        self._log = self._exporter = None
