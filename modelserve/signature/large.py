"""Examining large values in steps, so that an event loop is not held by one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from modelserve.signature.acceptance import BLOCK_CHECKS
from modelserve.signature.examination import ElementExaminer, check_length, flattened
from modelserve.signature.fields import FLOATS, INTEGERS, Field
from modelserve.signature.pieces import Examined, Pieces
from modelserve.turns import Steps
from modelserve.types import Array

AT_ONCE: Final = 32_768
"""Elements that one step examines: some milliseconds, or three times that where each has to be converted."""


def takes_steps(field: Field, value: Any) -> bool:
    """Whether a value is better examined in steps: a list in pieces, or one of very many elements."""
    if type(value) is Pieces:
        return True
    is_nested = type(value) in {list, tuple} and len(value) > 0 and not isinstance(value[0], np.ndarray)
    return is_nested and math.prod(field.shape) > AT_ONCE


def examined(field: Field, value: Any) -> Steps[Examined]:
    """Examine nested lists, whole or in pieces, as the field's examiner would; raises ``InvalidInput`` as it does."""
    filling = _Filling(field)
    yield from filling.take(value, 0)
    return Examined(field, filling.array.reshape(field.shape))


class _Filling:
    """An array of the field's elements, filled from the front."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._fits, self._examine = BLOCK_CHECKS[field.dtype], ElementExaminer(field)
        self.array: Array = np.empty(math.prod(field.shape), field.numpy_dtype)
        self._filled = 0

    def take(self, value: Any, depth: int) -> Steps[None]:
        """Take a list whose length is the field's size at ``depth``."""
        check_length(self._field, value, depth)
        below = self._field.shape[depth + 1 :]
        for run in _runs(value, max(1, AT_ONCE // math.prod(below))):
            if below and _is_in_pieces(run, math.prod(below)):
                for part in run:
                    yield from self.take(part, depth + 1)
            else:
                self._put(self._elements(run, depth + 1))
                yield

    def _put(self, elements: Array) -> None:
        self.array[self._filled : self._filled + len(elements)] = elements
        self._filled += len(elements)

    def _elements(self, run: list[Any] | Array, depth: int) -> Array:
        if isinstance(run, np.ndarray):
            if run.shape[1:] == self._field.shape[depth:] and _is_in_range(self._field, run):
                return run.ravel()
            run = list(run.tolist())
        elements = flattened(self._field, run, depth)
        if not self._fits(elements):
            elements = self._examine(elements, self._filled)
        return np.array(elements, dtype=self._field.numpy_dtype)


def _runs(value: Any, most: int) -> Iterator[Any]:
    """Return what a list consists of, in runs of at most so many entries; those of pieces as they are."""
    if isinstance(value, Pieces):
        return iter(value.runs)
    return (value[i : i + most] for i in range(0, len(value), most))


def _is_in_pieces(run: Any, each: int) -> bool:
    """Whether the entries of a run have to be taken one by one: they are large, or come in pieces themselves."""
    return not isinstance(run, np.ndarray) and (each > AT_ONCE or Pieces in map(type, run))


def _is_in_range(field: Field, numbers: Array) -> bool:
    """Whether the numbers of JSON can be cast into the field; others are examined one by one."""
    if field.dtype in INTEGERS:
        bounds = np.iinfo(field.dtype)
        whole = numbers.dtype.kind in "iu"
        return whole and bounds.min <= int(numbers.min()) and int(numbers.max()) <= bounds.max
    limit = float(np.finfo(field.dtype).max) if field.dtype in FLOATS else -math.inf
    return -limit <= float(numbers.min()) and float(numbers.max()) <= limit


def stand_in(value: Any) -> Any:
    """Return a list for one in pieces, where no list fits: any is refused alike."""
    return [] if isinstance(value, Pieces) else value
