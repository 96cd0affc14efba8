"""From what a model answers to named columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelserve.adapters.frameworks.tensorflow.runtime import tensorflow
from modelserve.errors import InferenceFailed
from modelserve.types import SOLE_OUTPUT, Array


def named(answer: Any) -> dict[str, Any]:
    """Name the tensors of an answer.

    A mapping keeps its names and a tuple is numbered. What stands alone goes by ``output``, whatever its name: a
    SavedModel names it even where the model did not.
    """
    found = _parts(answer)
    for name, tensor in found.items():
        if not isinstance(tensor, tensorflow().Tensor):
            raise InferenceFailed(
                f"the model answered a {type(tensor).__name__} in {name!r}, not a tensor; "
                "make it dense (.to_tensor(), tf.sparse.to_dense), and an answer at most a flat list or mapping"
            )
    if len(found) == 1:
        return {SOLE_OUTPUT: found.popitem()[1]}
    return dict(sorted(found.items()))


def as_columns(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Return named tensors as arrays that have a JSON form: strings as text, short floats as float32."""
    return {name: _array(name, tensor) for name, tensor in tensors.items()}


def _parts(answer: Any) -> dict[str, Any]:
    if hasattr(answer, "_asdict"):
        answer = answer._asdict()
    if isinstance(answer, Mapping):
        return {str(name): part for name, part in answer.items()}
    if isinstance(answer, tuple | list):
        return {f"{SOLE_OUTPUT}_{i}": part for i, part in enumerate(answer)}
    return {SOLE_OUTPUT: answer}


def _array(name: str, tensor: Any) -> Array:
    if tensor.dtype.name == "string":
        return _decoded(name, np.asarray(tensor.numpy(), dtype=object))
    array: Array = tensor.numpy()
    return array.astype(np.float32) if tensor.dtype.is_floating and array.dtype.kind != "f" else array


def _decoded(name: str, array: Array) -> Array:
    texts = np.empty(array.shape, dtype=object)
    try:
        texts.ravel()[:] = [each.decode() for each in array.ravel()]
    except UnicodeDecodeError as error:
        raise InferenceFailed(f"the model answered bytes in {name!r} that are no UTF-8 text: {error}") from error
    return texts
