"""From the columns of a batch to the arrays that a model takes. Knows shapes and names, and no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from modelserve.errors import InvalidInput
from modelserve.signature.fields import DTYPES
from modelserve.types import Array, Columns, Json

_MOST_LISTED: Final = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One input of a model. ``shape`` is that of one row, None where it is open: a size, or the whole shape."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"{['any' if size is None else size for size in self.shape]}"
        return f"{self.dtype}{shape.replace(chr(39), '')}"


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a batch: the type and the shape of one row's value."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Described = Mapping[str, Column]
Bound = dict[str, tuple[str, ...]]
"""Which columns go into each input; several are the columns of a matrix."""


def described(columns: Columns) -> dict[str, Column]:
    """Describe the columns of a batch."""
    return {name: Column(_dtype_of(column), column.shape[1:]) for name, column in columns.items()}


def to_json(columns: Described) -> Json:
    """Return what :func:`from_json` reads."""
    return {name: {"dtype": column.dtype, "shape": list(column.shape)} for name, column in columns.items()}


def from_json(document: Json) -> dict[str, Column]:
    """Read described columns."""
    return {name: Column(column["dtype"], tuple(column["shape"])) for name, column in document.items()}


def inputs_like(columns: Described, parameters: Sequence[str] = ()) -> tuple[Input, ...]:
    """Return the inputs of a model of which no more is known than the names of its parameters, or not even these.

    It takes the columns by name. A sole parameter takes a sole column, or several numbers as a matrix.
    """
    if not parameters or set(parameters) == columns.keys():
        return tuple(Input(name, columns[name].dtype, columns[name].shape) for name in parameters or columns)
    first = next(iter(columns.values()))
    if len(parameters) == 1 and len(columns) == 1:
        return (Input(parameters[0], first.dtype, first.shape),)
    if len(parameters) == 1 and _are_numbers(columns):
        return (Input(parameters[0], first.dtype, (len(columns),)),)
    raise _misnamed(parameters, columns)


def bind(inputs: Sequence[Input], columns: Described) -> Bound:
    """Choose the columns that go into each input: by name, the sole one, or several numbers as one matrix.

    Raises ``InvalidInput`` naming the column whose type or shape is not what the model takes.
    """
    names = {each.name for each in inputs}
    if names == columns.keys():
        bound: Bound = {name: (name,) for name in names}
    elif len(inputs) == 1 and (len(columns) == 1 or _are_numbers(columns)):
        bound = {inputs[0].name: tuple(columns)}
    else:
        raise _misnamed([each.name for each in inputs], columns)
    for each in inputs:
        _check(each, {name: columns[name] for name in bound[each.name]})
    return bound


def assemble(inputs: Sequence[Input], bound: Bound, columns: Columns) -> list[Array]:
    """Return one array of shape ``(rows, ...)`` per input, in their order."""
    return [_assembled(each, [columns[name] for name in bound[each.name]]) for each in inputs]


def _assembled(wanted: Input, parts: list[Array]) -> Array:
    array = np.column_stack(parts) if len(parts) > 1 else parts[0]
    return array.reshape(-1, 1) if array.ndim == 1 and wanted.shape and len(wanted.shape) == 1 else array


def _dtype_of(column: Array) -> str:
    return "string" if column.dtype.kind in "OUST" else column.dtype.name


def _are_numbers(columns: Described) -> bool:
    return all(column.shape == () and column.dtype != "string" for column in columns.values())


def _check(wanted: Input, columns: Described) -> None:
    for name, column in columns.items():
        if column.dtype != wanted.dtype:
            raise InvalidInput(name, f"the model takes {wanted} here, the example has {column}; {_fix(wanted.dtype)}")
    shape = (len(columns),) if len(columns) > 1 else next(iter(columns.values())).shape
    if not _fits(wanted.shape, shape):
        found = f"{len(columns)} columns" if len(columns) > 1 else f"{next(iter(columns.values()))}"
        raise InvalidInput(next(iter(columns)), f"the model takes {wanted} here, the example has {found}")


def _fits(wanted: tuple[int | None, ...] | None, found: tuple[int, ...]) -> bool:
    if wanted is None:
        return True
    if found == () and len(wanted) == 1:
        found = (1,)  # a number where the model takes rows of one number
    return len(wanted) == len(found) and all(w in {None, f} for w, f in zip(wanted, found, strict=True))


def _fix(dtype: str) -> str:
    if dtype not in DTYPES:
        return "no request can carry that: wrap the model in one that takes float32 and casts"
    if dtype == "string":
        return "pass strings"
    return f"pass example=X.astype({dtype!r}), or declare {dtype} in signature="


def _misnamed(wanted: Sequence[str], columns: Described) -> InvalidInput:
    return InvalidInput(
        "example",
        f"the model takes the inputs {_listing(wanted)}, the example has {_listing(list(columns))}; name them alike "
        "(in Keras: keras.Input(name=...))",
    )


def _listing(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(map(str, names[:_MOST_LISTED])) + more
