"""An event loop whose time is the test's: a deadline of an hour passes in no time, and always in the same order."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs like asyncio's loop, but never waits: when nothing is ready, its clock jumps to the next timer.

    For code that only waits for timers and other coroutines. A test that waits for a thread or a socket would see
    its timers fire first; with no timer left it waits as any loop does.
    """

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self._now = 0.0

    def time(self) -> float:
        """Return the virtual time in seconds, which starts at 0."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Move the clock forward."""
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout is not None and timeout > 0:
            self._loop.jump(timeout)
        return ready
