"""Event loops: work in another thread's loop, and a loop of one's own for hosts that have none, or whose loops end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Final, TypeVar

from modelserve.errors import ConfigError, ForkedServer, NotRunning
from modelserve.execution import stack

T = TypeVar("T")
_GREEN: Final = ("threading", "queue", "select", "subprocess")  # all of them gevent's, or none
_LOOK_S: Final = 0.5  # between two looks whether the other loop still runs: one that stops says nothing


async def elsewhere(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Await work in a loop of another thread. Cancelling this cancels that.

    Raises ``NotRunning`` when that loop ends before the work does.
    """
    try:
        future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except RuntimeError:  # it has been closed
        work.close()
        raise NotRunning("closed") from None
    try:
        while not future.done() and loop.is_running():
            await asyncio.wait([future], timeout=_LOOK_S)
    except asyncio.CancelledError:
        future.cancel()
        raise
    if future.done() and not future.cancelled():
        return future.result()
    future.cancel()
    raise NotRunning("closed")


class PrivateLoop:
    """An event loop in a thread of its own. Work may be given to it from any thread.

    ``last`` makes the work to be done before it ends: at :meth:`close`, or when the interpreter exits. After a fork
    each process opens its own; a forked copy of an open one raises ``ForkedServer``.
    """

    def __init__(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._last = last
        self._gate = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def is_open(self) -> bool:
        """Whether this process has opened it."""
        return self._loop is not None and self._pid == os.getpid()

    def open(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which runs from now on if it did not.

        Raises ``ConfigError`` where gevent has patched only a part of what the loop needs.
        """
        self._refuse_forked()
        _refuse_half_patched()
        with self._gate:
            if self._loop is None:
                self._begin()
            assert self._loop is not None
            return self._loop

    def _begin(self) -> None:
        loop, runs = asyncio.new_event_loop(), threading.Event()
        loop.call_soon(runs.set)
        self._thread = threading.Thread(target=_run, args=(loop,), name="modelserve", daemon=True)
        stack.start(self._thread)
        runs.wait()
        self._loop, self._pid = loop, os.getpid()
        atexit.register(self.close)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. Raises ``NotRunning`` if the loop is not open."""
        try:
            future = self._hand_over(work)
        except Exception:
            work.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise NotRunning("closed") from None
        except BaseException:
            future.cancel()  # the caller was interrupted, or has its error already
            raise

    def close(self) -> None:
        """Do the last work and end the loop. Safe to call twice, and in a forked copy."""
        if not self.is_open:
            return
        with contextlib.suppress(NotRunning):  # another thread closed it first
            self.call(self._last())
        with self._gate:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Give work to the loop. Under the gate, so that a loop that is about to stop gets none."""
        self._refuse_forked()
        with self._gate:
            if self._loop is None:
                raise NotRunning("not started" if self._thread is None else "closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _refuse_forked(self) -> None:
        if self._loop is not None and self._pid != os.getpid():
            raise ForkedServer(self._pid, os.getpid())


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
