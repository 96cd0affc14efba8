"""The contract of what tells of changes, as tests. Inherit :class:`ChangeHintsContract` and say what to run it on.

::

    class TestMyChanges(ConnectedHintsContract):
        @pytest.fixture
        def hints(self) -> Iterator[ChangeHints]: ...

        @pytest.fixture
        def change(self) -> Callable[[str], None]:  # makes a change to the model of that name, elsewhere
            ...

        @pytest.fixture
        def sever(self) -> Callable[[], None]:  # cuts the connections that listen, at the other end
            ...
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import ClassVar, Final

import pytest

from modelserve.ports import ChangeHints

_LIMIT_S: Final = 20.0


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.names: list[str | None] = []

    def __call__(self, model_name: str | None) -> None:
        """Take what is told."""
        self._told.put(model_name)

    def until(self, model_name: str | None) -> None:
        """Wait until that is told."""
        while True:
            self.names.append(self._told.get(timeout=_LIMIT_S))
            if self.names[-1] == model_name:
                return


class ChangeHintsContract:
    """A change is told to whoever listens, and to nobody else."""

    connects: ClassVar = False
    """Whether there is a connection, so that listening begins with a None."""

    def listen(self, hints: ChangeHints) -> tuple[Heard, Callable[[], None]]:
        """Subscribe, and wait until nothing more can be missed."""
        heard = Heard()
        end = hints.subscribe(heard)
        if self.connects:
            heard.until(None)
        return heard, end

    def test_it_satisfies_the_port(self, hints: ChangeHints) -> None:
        """It has the methods of :class:`modelserve.ports.ChangeHints`, and answers a ping."""
        assert isinstance(hints, ChangeHints)
        hints.ping()

    def test_a_change_made_elsewhere_is_told(self, hints: ChangeHints, change: Callable[[str], None]) -> None:
        """Every listener hears the model's name, in the order of the changes."""
        listening = [self.listen(hints)[0], Heard()]
        hints.subscribe(listening[1])
        for name in ("churn", "fraud", "churn"):
            change(name)
        for heard in listening:
            for name in ("churn", "fraud", "churn"):
                heard.until(name)
            assert [name for name in heard.names if name is not None] == ["churn", "fraud", "churn"]

    def test_nothing_is_told_after_a_subscription_has_ended(
        self, hints: ChangeHints, change: Callable[[str], None]
    ) -> None:
        """Whoever unsubscribed, even twice, hears no more; the others do."""
        first, end = self.listen(hints)
        second = Heard()
        hints.subscribe(second)
        end()
        end()
        change("churn")
        second.until("churn")
        with pytest.raises(queue.Empty):
            first._told.get_nowait()  # noqa: SLF001  # told before the second, if at all

    def test_a_listener_that_raises_hurts_nobody(self, hints: ChangeHints, change: Callable[[str], None]) -> None:
        """The next listener is told, of this change and of later ones."""

        def bad(_: str | None) -> None:
            raise RuntimeError("not a good listener")

        hints.subscribe(bad)
        heard, _ = self.listen(hints)
        for name in ("churn", "fraud"):
            change(name)
            heard.until(name)

    def test_closing_ends_all_of_it(self, hints: ChangeHints, change: Callable[[str], None]) -> None:
        """After close, also a second one, no thread is left; a later subscription hears again."""
        before = set(threading.enumerate())
        self.listen(hints)
        hints.close()
        hints.close()
        assert set(threading.enumerate()) <= before
        heard, _ = self.listen(hints)
        change("churn")
        heard.until("churn")

    def test_the_last_subscription_takes_the_thread_with_it(self, hints: ChangeHints) -> None:
        """Coming and going listeners leave no threads behind."""
        before = set(threading.enumerate())
        for _ in range(5):
            _, end = self.listen(hints)
            end()
        for thread in set(threading.enumerate()) - before:
            thread.join(_LIMIT_S)
        assert set(threading.enumerate()) <= before


class ConnectedHintsContract(ChangeHintsContract):
    """What comes over a connection: that it was lost is told, too."""

    connects = True

    def test_a_lost_connection_is_made_anew(
        self, hints: ChangeHints, change: Callable[[str], None], sever: Callable[[], None]
    ) -> None:
        """After a cut, and another, listeners hear None, and then of each change again."""
        heard, _ = self.listen(hints)
        for name in ("churn", "fraud"):
            sever()
            heard.until(None)
            change(name)
            heard.until(name)

    def test_a_change_during_a_cut_is_not_lost(
        self, hints: ChangeHints, change: Callable[[str], None], sever: Callable[[], None]
    ) -> None:
        """Of what happened while nobody listened, the None that follows tells."""
        heard, _ = self.listen(hints)
        sever()
        change("churn")
        heard.until(None)
