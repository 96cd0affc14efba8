"""Listening for changes: who is told of them, and the thread that keeps a connection on which they are told."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Final

from modelserve.errors import BackendUnavailable
from modelserve.ports import ChangeListener

_log = logging.getLogger("modelserve")
TICK_S: Final = 0.25
"""How long a connection may be waited on before :attr:`Turn.over` is looked at again."""
_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 30.0
_CLOSE_LIMIT_S: Final = 2.0


def pause_s(failures: int, chance: float) -> float:
    """Return the seconds before the next attempt after so many in a row: 1, 2, 4 … 30, less up to half by ``chance``.

    ``chance`` lies between 0 and 1. Without it all the processes that lost one server would come back at one moment.
    """
    longest = min(_LAST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10))
    return longest * (1.0 - chance / 2)


class Listeners:
    """Those who are told. One that raises does not hurt the others."""

    def __init__(self) -> None:
        self._listeners: dict[object, ChangeListener] = {}

    def __len__(self) -> int:
        return len(self._listeners)

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener(model_name)`` on changes, from any thread; return what ends the subscription."""
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    def tell(self, model_name: str | None) -> None:
        """Call every listener, in the order in which they subscribed."""
        for listener in list(self._listeners.values()):  # a copy: a listener may end its own subscription
            try:
                listener(model_name)
            except Exception:  # noqa: BLE001  # the change is committed; whoever listens cannot undo it
                _log.exception("a listener to changes of %s raised", model_name or "any model")

    def clear(self) -> None:
        """End every subscription."""
        self._listeners.clear()


class Feed:
    """Has a thread listen for as long as there are subscriptions.

    ``listen`` is called in that thread, again and again with growing pauses. It connects, calls :meth:`Turn.connected`
    once nothing more can be missed, and :meth:`Turn.tell` for what comes; it returns soon after :attr:`Turn.over`
    and raises ``BackendUnavailable`` when the connection is lost. ``pause`` says how many seconds to wait after so
    many failures in a row.
    """

    def __init__(
        self,
        source: str,
        listen: Callable[[Turn], None],
        pause: Callable[[int], float] = lambda failures: pause_s(failures, random.random()),  # noqa: S311  # no secret
    ) -> None:
        self._source = source
        self._listen = listen
        self._pause = pause
        self._listeners = Listeners()
        self._lock = threading.Lock()
        self._turn: Turn | None = None

    def subscribe(self, listener: ChangeListener) -> Callable[[], None]:
        """Call ``listener`` from the thread, which starts with the first subscription; return what ends this one."""
        with self._lock:
            end = self._listeners.subscribe(listener)
            if self._turn is None or self._turn.over or not self._turn.alive:
                self._turn = Turn(self._source, self._listen, self._listeners, self._pause)
                self._turn.start()

        def unsubscribe() -> None:
            with self._lock:
                end()
                if self._turn is not None and not self._listeners:
                    self._turn.end()

        return unsubscribe

    def close(self) -> None:
        """End every subscription and the thread; a later subscription starts another. Safe to call twice.

        A thread that hangs in an attempt to connect is not waited for: it ends by itself when that times out.
        """
        with self._lock:
            self._listeners.clear()
            turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()
            turn.join(_CLOSE_LIMIT_S)


class Turn:
    """One life of the thread: from a first subscription until the last one has ended."""

    def __init__(
        self,
        source: str,
        listen: Callable[[Turn], None],
        listeners: Listeners,
        pause: Callable[[int], float],
    ) -> None:
        self._source = source
        self._listen = listen
        self._listeners = listeners
        self._pause = pause
        self._failures = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"modelserve-changes-{source}", daemon=True)

    @property
    def over(self) -> bool:
        """Whether nobody listens any more."""
        return self._over.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs: not in a copy made by ``fork``."""
        return self._thread.is_alive()

    def connected(self) -> None:
        """Say that what changes from now on will be told; what changed before may have been missed."""
        if self._failures:
            _log.warning("changes are told by %s again", self._source)
        self._failures = 0
        self.tell(None)

    def tell(self, model_name: str | None) -> None:
        """Pass on that a model changed, or with None that any may have."""
        if not self.over:
            self._listeners.tell(model_name)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Have the thread end; does not wait for it."""
        self._over.set()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, at most so long, and not where it would wait for itself."""
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        while not self.over:
            try:
                self._listen(self)
            except BackendUnavailable as error:
                self._failed(str(error))
            except Exception:  # noqa: BLE001  # a thread that ended would leave its server to the poll for ever
                _log.exception("listening to %s failed", self._source)
                self._failed("see the exception above")
            self._over.wait(self._pause(max(1, self._failures)))

    def _failed(self, problem: str) -> None:
        if not (self._failures or self.over):
            _log.warning("changes are no longer told by %s, they are found by polling: %s", self._source, problem)
        self._failures += 1
