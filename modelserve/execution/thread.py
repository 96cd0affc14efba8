"""A replica in a thread of the host process.

Cheapest to reach and shares the host's memory. Its model competes with the event loop for the interpreter
lock except where kernels release it (BLAS, GPU, onnxruntime); a model that hangs cannot be killed, only abandoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from modelserve.errors import InferenceFailed, LoadError, LoadFailed, NotReady
from modelserve.ports import Model
from modelserve.signature import Signature, unstack
from modelserve.types import Json, Row

_log = logging.getLogger("modelserve")
_STOP_S = 5.0  # how long stop() waits for a batch that does not end


class ThreadReplica:
    """Loads a model in a thread of its own and runs its batches there, one at a time."""

    def __init__(self, load: Callable[[], Model], signature: Signature, *, name: str = "modelserve-replica") -> None:
        self._load = load
        self._signature = signature
        self._model: Model | None = None
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._stopping = False

    async def start(self) -> None:
        """Load the model in the replica's thread. Raises ``LoadError``."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread.start()
        try:
            self._model = await self._call(self._load)
        except LoadError:
            raise
        except Exception as error:
            raise LoadFailed(f"the model did not load: {type(error).__name__}: {error}") from error

    def infer(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        """Stack the rows, run the model on them and unstack its answer, all in the replica's thread."""
        return self._call(lambda: self._infer(rows))

    async def stop(self) -> None:
        """End the thread after its running batch; a batch that hangs is left behind with a warning."""
        if self._stopping:
            return
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident is None:
            return
        # Not by joining it in an executor: at the end of the interpreter executors take no more work.
        await asyncio.wait([self._ended], timeout=_STOP_S)
        if not self._ended.done():
            _log.warning("%s does not end; its thread is left behind", self._thread.name)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and holds a model."""
        return self._model is not None and self._thread.is_alive()

    def _call(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        if self._stopping:
            future.set_exception(NotReady("the replica is stopping"))
        else:
            self._inbox.put((work, future))
        return future

    def _infer(self, rows: Sequence[Row]) -> list[Json]:
        assert self._model is not None  # infer() comes after start()
        try:
            return unstack(self._model.infer(self._signature.stack(rows)), len(rows))
        except InferenceFailed:
            raise
        except BaseException as error:
            raise InferenceFailed(f"the model raised {type(error).__name__}: {error}") from error

    # -- in the thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            work, future = job
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001  # even to exit: what a model does is its caller's to see
                error = raised if isinstance(raised, Exception) else InferenceFailed(f"it raised {raised!r}")
            self._tell(future, result, error)
            del job, work, future, result, error  # a waiting thread must not keep the last batch in memory
        self._model = None
        self._tell(self._ended, None, None)

    def _tell(self, future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        # The loop may be gone: a host that stops its loop without stopping the server has no one to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, future, result, error)


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
