"""One version on its way into service: attempts, refusals, and the pauses between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from modelserve.errors import LoadFailed
from modelserve.serving.version import LoadedVersion
from modelserve.serving.wanted import Wanted

_FIRST_RETRY_S: Final = 1.0
_LAST_RETRY_S: Final = 60.0

Attempt: TypeAlias = Coroutine[Any, Any, LoadedVersion]


class Load:
    """The attempts to load one wanted version. Each version has its own, so that none waits for another.

    ``begin`` makes an attempt. ``notify`` is called when an attempt has ended, and when a pause is over.
    """

    def __init__(self, wanted: Wanted, begin: Callable[[Wanted], Attempt], notify: Callable[[], None]) -> None:
        self.wanted = wanted
        self.problem: str | None = None
        """Why the last attempt was refused."""
        self._begin = begin
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self._attempt: asyncio.Task[LoadedVersion] | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._retry_s = 0.0

    @property
    def running(self) -> bool:
        """Whether an attempt is under way, or has ended and was not received yet."""
        return self._attempt is not None

    def proceed(self, wanted: Wanted) -> None:
        """Begin an attempt unless one is under way, or the same row was refused a moment ago."""
        if self._attempt is not None:
            return
        if wanted != self.wanted:  # one that was signed since is tried at once
            self.wanted, self._retry_s = wanted, 0.0
            self._end_pause()
        if self._pause is None:
            name = f"modelserve-load-{wanted.version.model_name}"
            self._attempt = asyncio.create_task(self._begin(wanted), name=name)
            self._attempt.add_done_callback(self._ended)

    def receive(self) -> LoadedVersion | BaseException | None:
        """Return what an attempt ended with, once; None when none has ended."""
        attempt = self._attempt
        if attempt is None or not attempt.done():
            return None
        self._attempt = None
        if attempt.cancelled():  # by the model's own code: nothing here waits for an attempt that was abandoned
            return LoadFailed("the load was cancelled")
        return attempt.exception() or attempt.result()

    def refuse(self, error: BaseException) -> float:
        """Pause before the next attempt, each time longer; return for how many seconds."""
        self._retry_s = min(_LAST_RETRY_S, self._retry_s * 2) or _FIRST_RETRY_S
        self._end_pause()
        self._pause = self._loop.call_later(self._retry_s, self.retry)
        self.problem = str(error)
        return self._retry_s

    def retry(self) -> None:
        """Let the next attempt begin now."""
        self._end_pause()
        self._notify()

    def abandon(self) -> asyncio.Task[LoadedVersion] | None:
        """Give it up; return the attempt that was under way, which frees what it had by itself."""
        self._end_pause()
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()
        return attempt

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _ended(self, attempt: asyncio.Task[LoadedVersion]) -> None:
        if self._attempt is attempt:
            self._notify()
