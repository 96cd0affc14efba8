"""Example rows in the form in which their owner has them: some of them, or with a column replaced.

The forms are those that :meth:`Signature.infer` reads: a frame, a mapping of columns, a list of records, an array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelserve.types import Array


def is_frame(example: Any) -> bool:
    """Whether it is a DataFrame."""
    return hasattr(example, "columns") and hasattr(example, "iloc")


def are_records(example: Any) -> bool:
    """Whether it is a list of row mappings."""
    return isinstance(example, list | tuple) and bool(example) and isinstance(example[0], Mapping)


def taken(example: Any, places: Sequence[int]) -> Any:
    """Return the rows at these places, in the form of the example."""
    if isinstance(example, Mapping):
        return {name: taken(column, places) for name, column in example.items()}
    if hasattr(example, "iloc"):
        return example.iloc[list(places)]
    if isinstance(example, list | tuple):
        return [example[place] for place in places]
    return np.asarray(example)[list(places)]


def with_column(example: Any, name: str, column: Array) -> Any:
    """Return the rows with other values in one column."""
    if isinstance(example, Mapping):
        return {**example, name: column}
    if is_frame(example):
        return example.assign(**{name: column})
    if are_records(example):
        return [{**record, name: value} for record, value in zip(example, column.tolist(), strict=True)]
    return column
