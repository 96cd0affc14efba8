"""Models whose answers tell on them: which version answered, and to which input."""

from __future__ import annotations

from typing import Any

import numpy as np

STEP = 1_000.0


def telltale(version: int) -> Any:
    """Return a real scikit-learn model of one array input ``x`` of shape (1,): it answers ``x + 1000 * version``.

    A swapped answer, or one from another version than it claims, shows in the number alone.
    """
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415  # an extra

    x = np.array([[0.0], [1.0]])
    return LinearRegression().fit(x, x[:, 0] + STEP * version)


def tells(prediction: float, x: float) -> int:
    """Return the version that gave this answer to ``x``."""
    version = round((prediction - x) / STEP)
    if abs(prediction - x - STEP * version) > 0.01:  # noqa: PLR2004
        raise AssertionError(f"{prediction} is no version's answer to {x}")
    return version
