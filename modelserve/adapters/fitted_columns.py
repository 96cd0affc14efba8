"""The columns that a model was fitted on, matched by name and never by place. For adapters whose format has names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from modelserve.errors import InvalidInput

_MOST_LISTED: Final = 12


def fitted_names(estimator: Any) -> tuple[str, ...] | None:
    """Return the names of the columns that an estimator was fitted on; None where it was fitted on an array.

    What stands in for an estimator, and takes a matrix in its place, has them as ``column_order``.
    """
    names = getattr(estimator, "feature_names_in_", getattr(estimator, "column_order", None))
    return None if names is None else tuple(map(str, names))


def in_fitted_order(fitted: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return the given names in the order in which a model was fitted on them; what it does not know comes last.

    Most estimators refuse another order, and LightGBM goes by it. Raises ``InvalidInput`` where columns of other names
    stand in for some that it was fitted on.
    """
    known = {_as_lightgbm_writes(name): name for name in given} | {name: name for name in given}
    first = [known[name] for name in fitted if name in known]
    rest = [name for name in given if name not in first]
    if rest and len(first) < len(fitted):
        problem = f"the model was not fitted on it, but on {_listing(fitted)}; name the example's columns like these"
        raise InvalidInput(rest[0], problem)
    return first + rest


def _as_lightgbm_writes(name: str) -> str:
    return re.sub(r"\s", "_", name)


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
