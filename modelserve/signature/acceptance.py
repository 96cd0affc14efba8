"""Accepting the ordinary request: a few checks over all its values at once.

A check that says yes is right. One that says no only sends the values to be examined one by one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from modelserve.signature.fields import FLOATS, INTEGERS, Field
from modelserve.types import Row

Check: TypeAlias = Callable[[Sequence[Any]], bool]

_NUMBERS: Final = frozenset({float, int})


def picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Row]:
    """Return what takes the values of ``names``, in their order, out of a mapping."""
    if len(names) == 1:
        name = names[0]
        return lambda inputs: (inputs[name],)
    return operator.itemgetter(*names)


def is_plain(field: Field) -> bool:
    """Whether a fitting value of this input can be taken as it is: a scalar that is never missing."""
    return not field.shape and not field.nullable


def acceptance(inputs: tuple[Field, ...]) -> Callable[[Row], bool]:
    """Build the check over the values of all plain inputs of a row."""
    blocks: dict[str, list[int]] = {}
    for index, field in enumerate(inputs):
        if is_plain(field):
            blocks.setdefault(field.dtype, []).append(index)
    checks = [(_picker_of(indices, len(inputs)), BLOCK_CHECKS[dtype]) for dtype, indices in blocks.items()]
    if not checks:
        return lambda _: True
    if len(checks) == 1 and len(next(iter(blocks.values()))) == len(inputs):
        return checks[0][1]
    return lambda values: all(fits(pick(values)) for pick, fits in checks)


def _picker_of(indices: list[int], size: int) -> Callable[[Row], Row]:
    if len(indices) == 1:
        index = indices[0]
        return lambda values: (values[index],)
    return operator.itemgetter(*indices) if len(indices) < size else tuple


def _double_block(values: Sequence[Any]) -> bool:
    # One sum stands for every value: it is finite only if none is NaN or infinite. A sum of finite values that
    # overflows is merely sent to the exact examination.
    try:
        return _NUMBERS.issuperset(map(type, values)) and math.isfinite(sum(values))
    except OverflowError:
        return False


def _float_block(limit: float) -> Check:
    return lambda values: _double_block(values) and -limit <= min(values) and max(values) <= limit


def _integer_block(low: int, high: int) -> Check:
    integers = {int}
    return lambda values: integers.issuperset(map(type, values)) and low <= min(values) and max(values) <= high


def _bool_block(values: Sequence[Any]) -> bool:
    return all(type(value) is bool for value in values)


def _string_block(values: Sequence[Any]) -> bool:
    return all(type(value) is str and value.isascii() for value in values)


BLOCK_CHECKS: Final[dict[str, Check]] = {
    **{name: _float_block(float(np.finfo(name).max)) for name in FLOATS},
    "float64": _double_block,
    **{name: _integer_block(int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in INTEGERS},
    "bool": _bool_block,
    "string": _string_block,
}
"""Per dtype, whether values (at least one) are all of it, without conversion."""
