"""What models under test are made of. A saved model refers to these by name, so they live in a module of their own."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

RELEASED = threading.Event()
RELEASED.set()
SECRET = "/secret/models/churn.skops of postgresql://admin:password@db.internal:5432/models"


def fail_below_zero(x: Any) -> Any:
    """Return ``x``; fail on a negative element, with a message that no client may read."""
    if (x < 0).any():
        raise FileNotFoundError(SECRET)
    return x


def wait_until_released(x: Any) -> Any:
    """Return ``x`` once a test lets it."""
    assert RELEASED.wait(30)
    return x


def lose_a_row(x: Any) -> Any:
    """Return one row less than it was given, unless that leaves none to lose."""
    return x if (x >= 0).all() else x[1:]


def answer_bytes(x: Any) -> Any:
    """Return what has no JSON form where an element is negative."""
    return x if (x >= 0).all() else np.array([b"bytes"] * len(x), dtype=object)


def measure(x: Any) -> Any:
    """Return the sum of each row's numbers, or the length of its string."""
    if x.dtype == object:
        return np.array([[float(len(each))] for each in x.ravel()])
    return x.reshape(len(x), -1).sum(axis=1, dtype=float)[:, np.newaxis]


def take_long(x: Any) -> Any:
    """Return ``x``, thirty milliseconds a row later."""
    time.sleep(0.03 * len(x))
    return x
