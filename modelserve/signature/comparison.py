"""Whether two answers are the same, as far as answers of different kernels can be."""

from __future__ import annotations

import math
from typing import Final

from modelserve.types import Json

RELATIVE: Final = 1e-4
ABSOLUTE: Final = 1e-6
"""What another CPU's kernels may change in the last digits of a float32."""


def outputs_match(wanted: Json, found: Json, *, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Whether two JSON values are the same but for the last digits of their floats."""
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=relative, abs_tol=absolute)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(
            outputs_match(a, b, relative=relative, absolute=absolute) for a, b in zip(wanted, found, strict=True)
        )
    if isinstance(wanted, dict) and isinstance(found, dict):
        return wanted.keys() == found.keys() and all(
            outputs_match(wanted[key], found[key], relative=relative, absolute=absolute) for key in wanted
        )
    return type(wanted) is type(found) and bool(wanted == found)
