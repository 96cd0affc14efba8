"""Arrays to tensors, and what a network returns to named arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from modelserve import plugins
from modelserve.errors import InferenceFailed, InvalidInput
from modelserve.types import SOLE_OUTPUT, Array, Columns

Tensors: TypeAlias = Mapping[str, Any]


def refuse_strings(columns: Columns) -> None:
    """Raise ``InvalidInput`` that names the first input of strings."""
    for name, column in columns.items():
        if column.dtype.kind not in "biuf":
            problem = "PyTorch has no tensors of strings; turn it into numbers before the model, for example into ids"
            raise InvalidInput(name, problem)


def tensor_of(array: Array) -> Any:
    """Return a tensor on the memory of an array; of a copy where torch could not write to it."""
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = array.copy()
    return plugins.require("torch").from_numpy(array)


def array_of(tensor: Any) -> Array:
    """Return the values of a tensor in memory of its own.

    A network may answer with its input, a weight, or a buffer that it fills again for the next batch, and nothing
    tells such a tensor from a fresh one. The copy takes a fraction of the time that turning it into values takes.
    """
    array: Array = np.array(plain(tensor).cpu().numpy())
    return array


def plain(tensor: Any) -> Any:
    """Return a tensor that NumPy can hold: without gradient, and in float32 where NumPy lacks the type."""
    torch = plugins.require("torch")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise InferenceFailed("the model answered a sparse, nested or quantized tensor; let it return a dense one")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    known = tensor.dtype.is_complex or not tensor.dtype.is_floating_point
    return tensor if known or tensor.dtype in {torch.float16, torch.float32, torch.float64} else tensor.float()


def named(answer: Any) -> dict[str, Any]:
    """Give each tensor of an answer its name: ``output``, ``output_0`` and on, or the key of a mapping."""
    torch = plugins.require("torch")
    if isinstance(answer, torch.Tensor):
        return {SOLE_OUTPUT: answer}
    if dataclasses.is_dataclass(answer) and not isinstance(answer, Mapping):
        answer = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    if isinstance(answer, Mapping):
        # The mappings of model libraries leave out what they did not compute as None.
        parts = {str(name): part for name, part in answer.items() if part is not None}
    elif isinstance(answer, tuple | list):
        parts = {f"{SOLE_OUTPUT}_{i}": part for i, part in enumerate(answer)}
    else:
        parts = {}
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts.values()):
        kinds = ", ".join(sorted({type(part).__name__ for part in parts.values()})) or "nothing else"
        raise InferenceFailed(
            f"the model answered a {type(answer).__name__} of {kinds}; it must return a tensor, or a flat tuple, "
            "list or mapping of tensors"
        )
    return parts
