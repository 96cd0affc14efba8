"""Asking a database that may not answer: within a limit, and in threads that nobody has to wait for.

A thread that waits for a database which stands still, or for a connection that has gone silent, cannot be stopped. So
it is left behind: another one takes its place, and it does not keep the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, TypeVar

from modelserve.errors import BackendUnavailable

T = TypeVar("T")
ANSWER_LIMIT_S: Final = 10.0
_MOST_LEFT_BEHIND: Final = 8  # then what is asked waits with the rest: each of them holds a connection


class DaemonExecutor(Executor):
    """Up to ``workers`` daemon threads; one that has been busy for ``limit_s`` no longer counts."""

    def __init__(self, workers: int, name: str, *, limit_s: float = ANSWER_LIMIT_S) -> None:
        self._workers = workers
        self._name = name
        self._limit_s = limit_s
        self._questions: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._busy: dict[threading.Thread, float] = {}
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()
        self._over = False
        self.ended = 0
        """How many calls have ended: it stands still while none of the threads gets an answer."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call in one of the threads. Raises ``RuntimeError`` after :meth:`shutdown`."""
        future: Future[T] = Future()
        with self._guard:
            if self._over:
                raise RuntimeError("nothing is asked after the shutdown")
            self._questions.put((future, lambda: fn(*args, **kwargs)))
            if self._questions.qsize() > self._idle and self._has_room():
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.add(thread)
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002  # as the base says
        """Let the threads end once they have answered what was asked; nobody waits for them."""
        with self._guard:
            if not self._over:
                self._over = True
                for _ in self._threads:
                    self._questions.put(None)

    def _has_room(self) -> bool:
        since = time.monotonic() - self._limit_s
        left_behind = sum(begun < since for begun in self._busy.values())
        return len(self._threads) - min(left_behind, _MOST_LEFT_BEHIND) < self._workers

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._guard:
                self.ended += self._busy.pop(me, None) is not None
                self._idle += 1
            question = self._questions.get()
            with self._guard:
                self._idle -= 1
                if question is None:
                    self._threads.discard(me)
                    return
                self._busy[me] = time.monotonic()
            future, call = question
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  # for whoever asked
                    future.set_exception(error)


async def call_with_timeout(askers: DaemonExecutor, call: Callable[..., T], *args: Any) -> T:
    """Return what a call answers. Raises ``BackendUnavailable`` when it has not within ``ANSWER_LIMIT_S``.

    That counts from when the call begins. It waits for those before it as long as one of them ends now and then.
    """
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    def ask() -> T:
        loop.call_soon_threadsafe(begun.set)
        return call(*args)

    answer = loop.run_in_executor(askers, ask)
    try:
        await _begins(begun, askers)
        async with asyncio.timeout(ANSWER_LIMIT_S):
            return await answer
    except TimeoutError as error:
        raise BackendUnavailable("registry", f"it has not answered within {ANSWER_LIMIT_S:.0f} s") from error
    finally:
        answer.cancel()


async def _begins(begun: asyncio.Event, askers: DaemonExecutor) -> None:
    """Wait for a call to begin. Raises ``TimeoutError`` when none before it has ended for ``ANSWER_LIMIT_S``."""
    while not begun.is_set():
        ended = askers.ended
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                await begun.wait()
        except TimeoutError:
            if askers.ended == ended:
                raise
