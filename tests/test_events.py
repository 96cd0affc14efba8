"""Observers."""

from __future__ import annotations

import logging

import pytest

from modelserve.events import Event, Observers, VersionUnloaded

EVENT = VersionUnloaded("m", "1")


def test_observers_are_told_in_order_until_they_leave() -> None:
    """Each event reaches every observer, in the order of subscription, until it unsubscribes."""
    seen: list[tuple[str, Event]] = []
    observers = Observers()
    assert not observers
    leave = observers.subscribe(lambda event: seen.append(("first", event)))
    observers.subscribe(lambda event: seen.append(("second", event)))
    observers.emit(EVENT)
    leave()
    leave()
    observers.emit(EVENT)
    assert [name for name, _ in seen] == ["first", "second", "second"]
    assert observers


def test_each_subscription_ends_by_itself() -> None:
    """A function that subscribed twice is told twice, and once after one of the two has ended."""
    seen: list[Event] = []
    observers = Observers()
    leave = observers.subscribe(seen.append)
    observers.subscribe(seen.append)
    observers.emit(EVENT)
    leave()
    observers.emit(EVENT)
    assert len(seen) == 3


def test_a_failing_observer_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One that raises does not stop the others, and does not flood the log."""
    seen: list[Event] = []

    def broken(_: Event) -> None:
        raise RuntimeError("no")

    observers = Observers()
    observers.subscribe(broken)
    observers.subscribe(seen.append)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            observers.emit(EVENT)
    assert len(seen) == 3
    assert observers.failures == 3
    assert len(caplog.records) == 1
