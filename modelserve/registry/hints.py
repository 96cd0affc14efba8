"""Change hints: those within one process, and what else a registry tells after a commit."""

from __future__ import annotations

import logging

from modelserve.errors import BackendUnavailable
from modelserve.feed import Listeners
from modelserve.ports import ChangePublisher

_log = logging.getLogger("modelserve")


class Hints(Listeners):
    """Calls its listeners with the name of a model that changed, in the thread that changed it.

    Other processes are told by ``publisher``, where there is one.
    """

    def __init__(self, publisher: ChangePublisher | None = None) -> None:
        super().__init__()
        self._publisher = publisher

    def publish(self, model_name: str) -> None:
        """Tell everybody. What cannot be told is logged: the change is made, and servers find it by polling."""
        self.tell(model_name)
        if self._publisher is None:
            return
        try:
            self._publisher.publish(model_name)
        except BackendUnavailable as error:
            _log.warning("the change of %s is left to be found by polling: %s", model_name, error)

    def ping(self) -> None:
        """Do nothing: there is no connection that could be down."""

    def close(self) -> None:
        """End every subscription, and close the publisher's connections; later use opens new ones."""
        self.clear()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the publisher's connections and leave the subscriptions."""
        if self._publisher is not None:
            self._publisher.close()
