"""Large values: in pieces while they are read, and marked once they have been examined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from modelserve.signature.fields import Field
from modelserve.types import Array


class Pieces:
    """A long list as its consecutive runs: each a list, or numbers as an array along axis 0.

    The numbers of an array are those of JSON: finite, and whole ones exact.
    """

    __slots__ = ("runs",)

    def __init__(self, *runs: list[Any] | Array) -> None:
        self.runs = list(runs)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __iter__(self) -> Iterator[Any]:
        for run in self.runs:
            yield from run.tolist() if isinstance(run, np.ndarray) else run


class Examined(NamedTuple):
    """An array that fits ``field``, and that no caller can change any more."""

    field: Field
    array: Array
