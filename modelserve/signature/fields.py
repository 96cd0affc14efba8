"""One input of a model: its name, its type, its shape, and whether it may be missing."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, Final

import numpy as np

from modelserve.errors import InvalidInput

FLOATS: Final = ("float16", "float32", "float64")
INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES: Final = (*FLOATS, *INTEGERS, "bool", "string")
"""The types an input can have. ``float32[3, 224, 224]`` is the type ``float32`` with a shape."""
MARKS: Final = ("None", "NaN", "NA")
"""What can stand for a missing string in the rows that a model was fitted on: None, a NaN, pandas.NA."""

MAX_NAME: Final = 256
_MAX_DIMENSIONS: Final = 32
_MAX_SIZE: Final = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One named input of one row.

    ``dtype`` is one of :data:`DTYPES`; ``shape`` is the shape of a single row's value, ``()`` for a scalar.
    ``nullable`` allows ``null`` (and NaN) where the model was trained on missing values: floats and strings only.
    ``missing`` says what stands for a missing string in the rows that the model was fitted on, one of :data:`MARKS`: to
    many estimators these are different values. None leaves it to the example, and is NaN where that has no gap.
    Raises ``InvalidInput`` for what cannot be an input.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    nullable: bool = False
    missing: str | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.dtype not in DTYPES:
            raise InvalidInput(self.name, f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", _checked_shape(self.name, self.shape))
        if self.nullable and self.dtype not in {*FLOATS, "string"}:
            raise InvalidInput(self.name, f"{self.dtype} has no null; declare it float64 to allow missing values")
        _check_mark(self)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of this input's column in a batch; strings travel as objects."""
        return np.dtype(object) if self.dtype == "string" else np.dtype(self.dtype)

    def __str__(self) -> str:
        shape = f"[{', '.join(map(str, self.shape))}]" if self.shape else ""
        return f"{self.dtype}{shape}{' or null' if self.nullable else ''}"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise InvalidInput("signature", f"an input's name is a string of 1 to {MAX_NAME} characters: {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput("signature", f"an input's name holds a lone surrogate: {name!r}") from None


def _check_mark(field: Field) -> None:
    if field.missing is None:
        return
    if field.missing not in MARKS:
        raise InvalidInput(field.name, f"missing={field.missing!r} is not one of {', '.join(map(repr, MARKS))}")
    if field.dtype != "string" or not field.nullable:
        raise InvalidInput(field.name, "missing= is for strings that may be missing: nullable=True")


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise InvalidInput(name, f"shape {shape!r} is no sequence of sizes") from None
    if len(sizes) > _MAX_DIMENSIONS or any(not 0 < size <= _MAX_SIZE for size in sizes):
        raise InvalidInput(name, f"shape {shape} must hold positive sizes of one row's value")
    return sizes
