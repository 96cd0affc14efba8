"""Change hints within one process."""

from __future__ import annotations

import logging

import pytest

from modelserve.registry.hints import Hints


def test_listeners_hear_in_order_until_they_end_it() -> None:
    """Each listener gets each name once, and nothing after it unsubscribed."""
    hints = Hints()
    heard: list[tuple[str, str | None]] = []
    end_first = hints.subscribe(lambda name: heard.append(("first", name)))
    hints.subscribe(lambda name: heard.append(("second", name)))
    hints.publish("churn")
    end_first()
    hints.publish("fraud")
    assert heard == [("first", "churn"), ("second", "churn"), ("second", "fraud")]


def test_one_listener_subscribed_twice_is_two_subscriptions() -> None:
    """Ending one of them, even twice, leaves the other."""
    hints = Hints()
    heard: list[str | None] = []
    end = hints.subscribe(heard.append)
    hints.subscribe(heard.append)
    end()
    end()
    hints.publish("churn")
    assert heard == ["churn"]


def test_a_listener_that_raises_is_logged_and_the_next_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """One bad listener costs neither the change nor the other listeners."""
    hints = Hints()
    heard: list[str | None] = []

    def bad(name: str | None) -> None:
        raise RuntimeError(name)

    hints.subscribe(bad)
    hints.subscribe(heard.append)
    with caplog.at_level(logging.ERROR, logger="modelserve"):
        hints.publish("churn")
    assert heard == ["churn"]
    assert "churn" in caplog.text
    assert "RuntimeError" in caplog.text


def test_a_listener_may_unsubscribe_while_it_is_called() -> None:
    """A one-shot listener is possible."""
    hints = Hints()
    heard: list[str | None] = []

    def once(name: str | None) -> None:
        heard.append(name)
        end()

    end = hints.subscribe(once)
    hints.publish("churn")
    hints.publish("churn")
    assert heard == ["churn"]
