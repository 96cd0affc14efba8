"""From the inputs that MLflow wrote down to ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from modelserve.errors import InvalidInput
from modelserve.signature import DTYPES, Field, Signature

UNNAMED: Final = "x"
"""What the sole input of a model is called that MLflow has no name for; as for an example that is an array."""
_DTYPES: Final = {
    "boolean": "bool",
    "integer": "int32",
    "long": "int64",
    "float": "float32",
    "double": "float64",
    "string": "string",
}
_NULLABLE: Final = ("float32", "float64", "string")
_BATCH: Final = -1


def signature_of(description: Mapping[str, Any]) -> Signature | None:
    """Return the inputs of a model; None where MLflow knows none. Raises ``InvalidInput`` naming the column."""
    text = (description.get("signature") or {}).get("inputs")
    if not text:
        return None
    try:
        columns = [dict(column) for column in json.loads(text)]
    except (TypeError, ValueError) as error:
        raise InvalidInput("signature", "MLflow's signature of the model cannot be read") from error
    named = [column for column in columns if column.get("name") is not None]
    if not named:
        return Signature([_unnamed(columns)])
    if len(named) != len(columns):
        raise InvalidInput("signature", "some columns have a name and some have none; log the model with names for all")
    return Signature(_field(str(column["name"]), column) for column in columns)


def _unnamed(columns: Sequence[Mapping[str, Any]]) -> Field:
    """Return the input that columns without names are: a tensor, or a row of numbers."""
    fields = [_field(UNNAMED, column) for column in columns]
    if len(fields) == 1 and columns[0].get("type") == "tensor":
        return fields[0]
    if any(field.shape or field != fields[0] for field in fields):
        raise InvalidInput("signature", "columns of several types need names; log the model with a DataFrame")
    return Field(UNNAMED, fields[0].dtype, (len(fields),), fields[0].nullable)


def _field(name: str, column: Mapping[str, Any]) -> Field:
    kind = column.get("type")
    if kind == "tensor":
        return _tensor(name, column.get("tensor-spec") or {})
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise InvalidInput(
            name,
            f"MLflow's type {kind!r} has no form in a request; convert it inside the model, and log it with numbers, "
            "booleans or strings",
        )
    optional = column.get("required") is False or column.get("optional") is True
    return Field(name, dtype, nullable=optional and dtype in _NULLABLE)


def _tensor(name: str, spec: Mapping[str, Any]) -> Field:
    try:
        dtype = np.dtype(spec["dtype"])
        batch, *shape = [int(size) for size in spec["shape"]]
    except (LookupError, TypeError, ValueError) as error:
        raise InvalidInput(name, "MLflow's type of this tensor cannot be read") from error
    if batch != _BATCH:
        raise InvalidInput(name, f"its first dimension is {batch}, not −1: the model takes batches of one size only")
    if any(size < 1 for size in shape):
        problem = f"its shape {[batch, *shape]} is open beyond the number of rows; requests need one of fixed sizes"
        raise InvalidInput(name, problem)
    kind = "string" if dtype.kind in "OSU" else dtype.name
    if kind not in DTYPES:
        raise InvalidInput(name, f"a tensor of {dtype.name} has no form in a request; log it as numbers or strings")
    return Field(name, kind, tuple(shape))
