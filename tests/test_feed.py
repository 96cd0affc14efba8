"""The thread that listens, against carriers of plain Python: each loss and each return is ordered by the test."""

from __future__ import annotations

import logging
import queue
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelserve.errors import BackendUnavailable
from modelserve.feed import Feed, Turn, pause_s
from modelserve.testing.changes import Heard

LIMIT_S = 20.0


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_pauses_grow_to_half_a_minute_and_differ(failures: int, chance: float) -> None:
    """A pause lies between half of 1, 2, 4 … 30 seconds and all of it, however long it has been."""
    longest = min(30.0, 2.0 ** min(failures - 1, 100))
    assert longest / 2 <= pause_s(failures, chance) <= longest
    assert pause_s(failures, 0.0) == longest


class Carrier:
    """Does in each attempt what the test says: "down", "crash", or a list of names to tell before it is lost."""

    def __init__(self) -> None:
        self.script: queue.SimpleQueue[str | list[str]] = queue.SimpleQueue()
        self.pauses: list[int] = []
        self.feed = Feed("carrier", self.listen, self.pause)

    def listen(self, turn: Turn) -> None:
        while not turn.over:
            try:
                step = self.script.get(timeout=0.01)
            except queue.Empty:
                continue
            if step == "down":
                raise BackendUnavailable("carrier", "no connection")
            if step == "crash":
                raise ZeroDivisionError("a driver's bug")
            turn.connected()
            for name in step:
                turn.tell(name)
            raise BackendUnavailable("carrier", "it went away")

    def pause(self, failures: int) -> float:
        self.pauses.append(failures)
        return 0.0


def test_it_connects_again_after_whatever_happens(caplog: pytest.LogCaptureFixture) -> None:
    """Refusals and a driver's bugs are tried again; each connection begins with None and counts pauses anew."""
    carrier, heard = Carrier(), Heard()
    end = carrier.feed.subscribe(heard)
    for step in ("down", "crash", "down", ["churn"], "down", ["fraud"]):
        carrier.script.put(step)
    with caplog.at_level(logging.WARNING, logger="modelserve"):
        heard.until("fraud")
        carrier.feed.close()
    end()
    assert heard.names == [None, "churn", None, "fraud"]
    assert carrier.pauses[:5] == [1, 2, 3, 1, 2]
    told = [record.getMessage() for record in caplog.records]
    assert sum("no longer told" in line for line in told) >= 2
    assert sum("told by carrier again" in line for line in told) == 2


def test_closing_does_not_wait_for_a_pause_to_end() -> None:
    """However long the pause before the next attempt is, close ends it."""
    pausing = threading.Event()

    def listen(turn: Turn) -> None:
        raise BackendUnavailable("carrier", "no connection")

    def pause(failures: int) -> float:
        pausing.set()
        return 1e6

    before = set(threading.enumerate())
    feed = Feed("carrier", listen, pause)
    feed.subscribe(Heard())
    assert pausing.wait(LIMIT_S)
    feed.close()
    assert set(threading.enumerate()) <= before


def test_a_thread_that_hangs_is_left_behind_and_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close gives a thread a bounded time, and what it says afterwards reaches no later subscription."""
    monkeypatch.setattr("modelserve.feed._CLOSE_LIMIT_S", 0.01)
    hanging, go_on, gone = threading.Event(), threading.Event(), threading.Event()
    first = True

    def listen(turn: Turn) -> None:
        nonlocal first
        if first:
            first = False
            hanging.set()
            assert go_on.wait(LIMIT_S)
            turn.tell("from the one left behind")
            gone.set()
            return
        turn.connected()
        assert gone.wait(LIMIT_S)
        turn.tell("churn")
        turn._over.wait(LIMIT_S)

    feed, heard = Feed("carrier", listen), Heard()
    feed.subscribe(Heard())
    assert hanging.wait(LIMIT_S)
    feed.close()
    feed.subscribe(heard)
    heard.until(None)
    go_on.set()
    heard.until("churn")
    feed.close()
    assert heard.names == [None, "churn"]


def test_a_listener_may_close_what_calls_it() -> None:
    """Closing from within the thread does not wait for the thread."""
    carrier, closed = Carrier(), threading.Event()

    def listener(_: str | None) -> None:
        carrier.feed.close()
        closed.set()

    carrier.feed.subscribe(listener)
    carrier.script.put([])
    assert closed.wait(LIMIT_S)
