"""The database's clock, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import time

import pytest

from modelserve.database import clock
from modelserve.registry import Registry


def test_the_time_is_utc_and_goes_on_within_a_transaction(registry: Registry) -> None:
    """It is the moment of the question, aware, and never earlier than one before."""
    with registry._database.read() as connection:
        first = clock.now(connection)
        while (second := clock.now(connection)) == first:
            pass
    assert first < second
    assert first.tzinfo is dt.UTC
    assert abs(second - dt.datetime.now(dt.UTC)) < dt.timedelta(hours=1)


def test_the_clock_of_the_process_is_not_asked(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose own clock is a day off reads the same time."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with registry._database.read() as connection:
        assert clock.now(connection).year > 2000
