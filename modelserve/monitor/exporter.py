"""``GET /metrics``: this process' figures, or those of all processes that share a folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from modelserve.monitor.exposition import Figures, merged, text
from modelserve.monitor.metrics import FAMILIES
from modelserve.monitor.sharing import Everybody, SharedFigures

_log = logging.getLogger("modelserve")
_WRITE_EVERY_S: Final = 1.0


class Exporter:
    """Writes the figures that ``figures`` returns.

    With a folder they are those of every process that uses it: this one's as of now, the others' as of a second ago at
    most. Files are read and written on ``executor``.
    """

    def __init__(self, figures: Callable[[], Figures], folder: Path | None, executor: Executor) -> None:
        self._figures = figures
        self._folder = folder
        self._executor = executor
        self._shared: SharedFigures | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take a place in the folder, if there is one. Raises ``ConfigError`` when it cannot be used."""
        self._loop = asyncio.get_running_loop()
        if self._folder is not None:
            self._shared = await self._loop.run_in_executor(self._executor, SharedFigures, self._folder)
            self._task = asyncio.create_task(self._keep_writing(self._shared), name="modelserve-metrics")

    async def text(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        figures = self._figures()
        everybody = Everybody([figures], [])
        if self._shared is not None:
            everybody = await self._loop.run_in_executor(self._executor, self._shared.exchange, figures)
        return text(merged(everybody.alive, everybody.ended, FAMILIES), FAMILIES).encode()

    async def stop(self) -> None:
        """Leave the last figures in the folder."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._shared is not None:
            shared, self._shared = self._shared, None
            with contextlib.suppress(OSError):
                await self._run(shared.close, self._figures())

    async def _run(self, call: Callable[[Figures], None], figures: Figures) -> None:
        try:
            await self._loop.run_in_executor(self._executor, call, figures)
        except RuntimeError:  # the interpreter exits and runs nothing in threads any more
            call(figures)

    async def _keep_writing(self, shared: SharedFigures) -> None:
        told = False
        while True:
            try:
                await self._loop.run_in_executor(self._executor, shared.write, self._figures())
            except OSError as error:
                if not told:
                    _log.error("metrics: %s cannot be written: %s", self._folder, error.strerror)
                told = True
            await asyncio.sleep(_WRITE_EVERY_S)
