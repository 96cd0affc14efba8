"""``GET /metrics``: this process' figures, or those of all processes that share a folder."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from modelserve.monitor.metrics.counters import FAMILIES
from modelserve.monitor.metrics.exposition import Figures, loaded, merged, text
from modelserve.monitor.metrics.shared_folder import HostMetrics, MetricsFolder
from modelserve.resilience.executor import DaemonExecutor

T = TypeVar("T")
_log = logging.getLogger("modelserve")
_WRITE_EVERY_S: Final = 1.0
_READ_EVERY: Final = 60  # writes, also when nobody asks
_LIMIT_S: Final = 2.0


class Exporter:
    """Writes the figures that ``figures`` returns.

    With a folder they are those of every process that uses it: this one's as of now, the others' as of a second ago at
    most, or, while the folder does not answer, as they were last read. ``seen_loaded`` is told which versions living
    processes have. Files are read and written in a thread for that alone.
    """

    def __init__(
        self, figures: Callable[[], Figures], folder: Path | None, seen_loaded: Callable[[set[str]], None]
    ) -> None:
        self._figures = figures
        self._folder = folder
        self._seen_loaded = seen_loaded
        self._executor = DaemonExecutor(1, "modelserve-metrics", limit_s=_LIMIT_S)
        self._shared: MetricsFolder | None = None
        self._others = HostMetrics([], [])
        self._task: asyncio.Task[None] | None = None
        self._told = False

    async def start(self) -> None:
        """Take a place in the folder, if there is one. Raises ``ConfigError`` when it cannot be used."""
        if self._folder is not None:
            self._shared = await self._ask(MetricsFolder, self._folder)
            self._task = asyncio.create_task(self._keep_writing(self._shared), name="modelserve-metrics")

    async def text(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        figures = self._figures()
        if self._shared is not None:
            await self._exchange(self._shared, figures)
        alive = [figures, *self._others.alive]
        return text(merged(alive, self._others.ended, FAMILIES), FAMILIES).encode()

    async def stop(self) -> None:
        """Leave the last figures in the folder."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._shared is not None:
            shared, self._shared = self._shared, None
            figures = self._figures()
            with contextlib.suppress(OSError):
                try:
                    await self._leave(shared, figures)
                except RuntimeError:  # the interpreter exits and starts no threads any more
                    shared.close(figures)
        self._executor.shutdown(wait=False)

    async def _leave(self, shared: MetricsFolder, figures: Figures) -> None:
        """Wait within the limit. A folder that does not answer by then is left, and its lock closed, when it does."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed by now
                loop.call_soon_threadsafe(over.set)

        self._executor.submit(shared.close, figures).add_done_callback(wake)
        async with asyncio.timeout(_LIMIT_S):
            await over.wait()

    async def _exchange(self, shared: MetricsFolder, figures: Figures) -> None:
        """Write this process' figures and read the others', within the limit."""
        try:
            async with asyncio.timeout(_LIMIT_S):
                self._others = await self._ask(shared.exchange, figures)
        except OSError as error:  # a TimeoutError is one
            self._tell(error)
        self._seen_loaded(loaded(self._others.alive))

    async def _keep_writing(self, shared: MetricsFolder) -> None:
        for i in itertools.count():
            if i % _READ_EVERY == 0:
                await self._exchange(shared, self._figures())
            try:
                await self._ask(shared.write, self._figures())
            except OSError as error:
                self._tell(error)
            await asyncio.sleep(_WRITE_EVERY_S)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            _log.error("metrics: %s cannot be used: %s", self._folder, error.strerror or "it does not answer")
        self._told = True

    async def _ask(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)
