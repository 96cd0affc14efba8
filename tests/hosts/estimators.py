"""Estimators that host programs serve."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from sklearn.base import BaseEstimator


class Stubborn(BaseEstimator):  # type: ignore[misc]  # published without types
    """Doubles; sleeps for a second on 1, loops for ever on -1, and on -2 holds the interpreter lock for ever."""

    def predict(self, rows: Any) -> Any:
        if rows[0, 0] == 1:
            time.sleep(1)
        while rows[0, 0] == -1:
            pass
        if rows[0, 0] == -2:
            ctypes.PyDLL(None).sleep(1000)
        return rows[:, 0] * 2
