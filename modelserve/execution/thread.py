"""A replica in a thread of the host process.

Cheapest to reach and shares the host's memory. Its model competes with the event loop for the interpreter
lock except where kernels release it (BLAS, GPU, onnxruntime); a model that hangs cannot be killed, only given up on.
A batch that costs less than the way to the thread and back is run on the event loop, in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Final, NamedTuple

from modelserve.errors import InferenceFailed, LoadError, LoadFailed, WorkerDied, describe, failure_of
from modelserve.execution import stack
from modelserve.execution.in_place import InPlace
from modelserve.ports import Model, NotRun
from modelserve.signature import Signature, unstack
from modelserve.types import Json, Row

_log = logging.getLogger("modelserve")
_STOP_S: Final = 5.0  # how long stop() waits for a batch that does not end


class ThreadReplica:
    """Loads a model in a thread of its own and runs its batches there, one at a time."""

    def __init__(self, load: Callable[[], Model], signature: Signature, *, name: str = "modelserve-replica") -> None:
        self._load = load
        self._signature = signature
        self._model: Model | None = None
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._in_hand: deque[asyncio.Future[Any]] = deque()
        self._in_place = InPlace()
        self._context = contextvars.Context()  # the model's own: no caller's NumPy error state or decimal precision
        self._stopping: str | None = None

    async def start(self) -> None:
        """Load the model in the replica's thread. Raises ``LoadError``."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        stack.start(self._thread)
        try:
            self._model = await self._call(self._load)
        except LoadError:
            raise
        except Exception as error:
            raise LoadFailed(f"the model did not load: {describe(error)}") from error

    def infer(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        """Stack the rows, run the model on them and unstack its answer, in the replica's thread or in place."""
        if not self._in_hand and self._stopping is None and self._in_place.allows(len(rows)):
            return self._infer_here(rows)
        return self._call(lambda: self._infer(rows), rows=len(rows))

    async def stop(self) -> None:
        """End the thread after its running batch; a batch that hangs is left behind with a warning."""
        self._end("it was stopped")
        if self._thread.ident is None:
            return
        # Not by joining it in an executor: at the end of the interpreter executors take no more work.
        await asyncio.wait([self._ended], timeout=_STOP_S)
        if not self._ended.done():
            _log.warning("%s does not end; its thread is left behind", self._thread.name)

    def kill(self, reason: str) -> None:
        """Take no more batches and give up the running one; a thread that hangs lives on until its batch ends."""
        self._end(reason)
        in_hand, self._in_hand = self._in_hand, deque()
        for i, future in enumerate(in_hand):
            _resolve(future, None, WorkerDied(f"the worker was given up: {reason}") if i == 0 else NotRun())

    async def ended(self) -> str:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            await asyncio.shield(self._ended)
        return self._stopping or "its thread ended"

    @property
    def alive(self) -> bool:
        """Whether the thread runs and holds a model."""
        return self._model is not None and self._stopping is None and self._thread.is_alive()

    def detail(self) -> Mapping[str, Json]:
        """Tell how many batches ran in place, and how many of them took longer than they may."""
        return {"in_place": self._in_place.batches, "over_cap": self._in_place.over_cap}

    def _over(self) -> None:
        self.kill("its thread ended")
        _resolve(self._ended, None, None)

    def _end(self, reason: str) -> None:
        if self._stopping is None:
            self._stopping = reason
            self._inbox.put(None)

    def _infer_here(self, rows: Sequence[Row]) -> asyncio.Future[list[Json]]:
        answer: asyncio.Future[list[Json]] = self._loop.create_future()
        began = perf_counter()
        try:
            answer.set_result(self._context.run(self._infer, rows))
        except InferenceFailed as error:
            answer.set_exception(error)
        self._in_place.ran(len(rows), perf_counter() - began)
        return answer

    def _call(self, work: Callable[[], Any], *, rows: int = 0) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._stopping is not None:
            future.set_exception(NotRun())
        else:
            self._in_hand.append(future)
            self._inbox.put(_Job(work, rows, future))
        return future

    def _settle(self, job: _Job, seconds: float, result: Any, error: Exception | None) -> None:
        if job.future in self._in_hand:  # it is not when it was given up
            self._in_hand.remove(job.future)
        if job.rows and error is None:
            self._in_place.ran_elsewhere(job.rows, seconds)
        _resolve(job.future, result, error)

    def _infer(self, rows: Sequence[Row]) -> list[Json]:
        assert self._model is not None  # infer() comes after start()
        try:
            return unstack(self._model.infer(self._signature.stack(rows)), len(rows))
        except InferenceFailed:
            raise
        except BaseException as error:
            raise failure_of(error) from error

    # -- in the thread -------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._work()
        finally:  # also when a tracer or a debugger of the host ends the thread
            self._tell(self._over)

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            result, error = None, None
            began = perf_counter()
            try:
                result = self._context.run(job.work)
            except BaseException as raised:  # noqa: BLE001  # even to exit: what a model does is its caller's to see
                error = raised if isinstance(raised, Exception) else InferenceFailed(f"it raised {describe(raised)}")
            self._tell(self._settle, job, perf_counter() - began, result, error)
            del job, result, error  # a waiting thread must not keep the last batch in memory
        self._model = None

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        # The loop may be gone: a host that stops its loop without stopping the server has no one to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


class _Job(NamedTuple):
    """Work for the thread; ``rows`` is 0 when it is not a batch."""

    work: Callable[[], Any]
    rows: int
    future: asyncio.Future[Any]


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
