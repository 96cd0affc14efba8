"""Change hints within one process."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("modelserve")


class Hints:
    """Calls its listeners with the name of a model that changed. One that raises does not hurt the others."""

    def __init__(self) -> None:
        self._listeners: dict[object, Callable[[str], None]] = {}

    def subscribe(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call ``listener(model_name)`` on changes, from any thread; return what ends the subscription."""
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    def publish(self, model_name: str) -> None:
        """Call every listener, in the order in which they subscribed."""
        for listener in list(self._listeners.values()):  # a copy: a listener may end its own subscription
            try:
                listener(model_name)
            except Exception:  # noqa: BLE001  # the change is committed; whoever listens cannot undo it
                _log.exception("a listener to changes of %s raised", model_name)
